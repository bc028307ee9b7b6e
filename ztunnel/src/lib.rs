//! The node daemon: mutual TLS for every opted-in pod of its node, without a change to the pod.
//!
//! The daemon has two halves, which meet in [`dataplane`]:
//!
//! - The **control side** is one thread. It reads the cluster's objects (`mesh`), decides which
//!   pods of this node are in the mesh ([`enrolment`]) and redirects their TCP inside their own
//!   network namespaces ([`capture`]). Rules in the node's namespace ([`guard`]) drop plaintext
//!   between meshed pods, so that a gap in a pod's rules refuses connections instead of leaking
//!   them.
//! - The **data side** is one thread per core. It accepts the redirected connections and forwards
//!   them through `hbone` ([`proxy`]). A connection stays on the thread that accepted it.
//!
//! [`daemon`] starts, joins and stops all parts; [`config`] is the command line; [`ports_and_marks`] holds
//! the port, mark and table numbers.

#![forbid(unsafe_code)]

pub mod admin;
pub mod capture;
pub mod config;
pub mod daemon;
pub mod dataplane;
pub mod enrolment;
pub mod guard;
pub mod identity;
mod netlink;
pub mod netns;
mod nftables;
pub mod ports_and_marks;
pub mod proxy;
pub mod readiness;
pub mod revocation;
pub mod telemetry;
