//! The node daemon: every opted-in pod of its node speaks mutual TLS to the others without knowing
//! it.
//!
//! Two halves, which meet in [`dataplane`]:
//!
//! - the **control side** is one thread that reads what the mesh knows (`mesh`), decides which pods
//!   of this node belong in it ([`enrolment`]), redirects their traffic inside their own network
//!   namespaces ([`capture`]), and stands behind that with rules in the node's namespace
//!   ([`guard`]), so that a gap in the first is a refused connection and never plaintext;
//! - the **data side** is one thread per core that accepts the redirected connections and carries
//!   them through `hbone` ([`proxy`]). A connection never leaves its thread.
//!
//! [`daemon`] starts, joins and stops all of it; [`config`] is its command line.

#![forbid(unsafe_code)]

pub mod admin;
pub mod capture;
pub mod config;
pub mod contract;
pub mod daemon;
pub mod dataplane;
pub mod enrolment;
pub mod guard;
pub mod identity;
mod netlink;
pub mod netns;
mod nftables;
pub mod proxy;
pub mod readiness;
pub mod revocation;
pub mod telemetry;
