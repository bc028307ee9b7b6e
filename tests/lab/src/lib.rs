//! A Kubernetes cluster small enough for a test: nodes and pods are network namespaces.
//!
//! The lab reads ordinary manifests (Node, Namespace, ServiceAccount, Service, Pod) and implements
//! the parts of Kubernetes that a mesh daemon depends on: scheduler, address allocation, endpoints
//! controller, kubelet (processes, probes, readiness, graceful deletion), kube-proxy, and the
//! container network interface. It writes the resolved objects, one file each, to a folder that
//! the daemons read. One daemon runs in each node's namespace.
//!
//! ```text
//!   fabric netns        br0 ── 10.0.0.1, fd00:10::1  (outside the cluster); `ambit ca`, if configured
//!                        │ veth
//!   node netns          eth0 10.0.0.11, fd00:10::11; routes; kube-proxy; probes; the daemon
//!                        │ veth per pod, host routes /32 and /128
//!   pod netns           eth0 10.244.1.2/32, fd00:10:244:1::2/128; a container's command
//! ```
//!
//! One process per lab, the *agent*, owns all of this and takes requests over a unix socket.
//! The agent registers every resource on disk before it creates it, and holds a file lock until it
//! exits. Any later lab command finds the labs whose lock is free and removes what they left.
//!
//! ```no_run
//! let lab = lab::Lab::up(lab::TWO_NODES, lab::Options::default())?;
//! lab.apply("{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{name: a, command: [sleep, inf]}]}}")?;
//! lab.wait_ready()?;
//! assert!(lab.exec("a", &["true"])?.success());
//! # anyhow::Ok(())
//! ```
//!
//! Errors are `anyhow::Error`: they are printed on a terminal, and no caller matches on them.

mod agent;
mod capture;
pub mod cli;
mod client;
mod daemon_sync;
mod demo;
mod http;
mod lab;
mod lifecycle;
mod location;
mod model;
mod netns;
mod options;
mod pcap;
mod poll;
mod process;
mod protocol;
mod registry;
mod tools;

pub use capture::{Capture, TlsBytes};
pub use http::Response;
pub use lab::{Lab, Manifests};
pub use location::Location;
pub use options::{Clock, IdentitySource, IpFamily, LaunchOptions, Options};
pub use poll::wait_until;
pub use process::{Output, Process};
pub use protocol::{CaStatus, NodeStatus, PodStatus, ProgramState, ServiceStatus, Status};
pub use registry::remove_orphaned_labs;

/// Manifest of two empty nodes, `a` and `b`: the base of most tests.
pub const TWO_NODES: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Node, metadata: {name: b}}
";
