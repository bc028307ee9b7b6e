//! A Kubernetes cluster small enough for a test: nodes and pods as network namespaces.
//!
//! The lab reads ordinary manifests (Node, Namespace, ServiceAccount, Service, Pod) and plays the
//! parts of Kubernetes that a mesh daemon leans on: scheduler, address allocation, endpoints
//! controller, kubelet (processes, probes, readiness, graceful deletion), kube-proxy, and the
//! container network interface. The resolved objects are written, one file each, to a folder that
//! the daemons read; one daemon runs in each node's namespace.
//!
//! ```text
//!   fabric netns        br0 ── 10.0.0.1, fd00:10::1  ("outside the cluster"); `ambit ca`, if asked for
//!                        │ veth
//!   node netns          eth0 10.0.0.11, fd00:10::11; routes; kube-proxy; probes; the daemon
//!                        │ veth per pod, host routes /32 and /128
//!   pod netns           eth0 10.244.1.2/32, fd00:10:244:1::2/128; a container's command
//! ```
//!
//! A process per lab, the *agent*, owns all of it and is told what to do over a unix socket.
//! Everything is registered on disk before it is created, and the agent holds a lock for as long
//! as it lives: whoever comes next finds the labs whose agent is gone and removes what they left.
//!
//! ```no_run
//! let lab = lab::Lab::up(lab::TWO_NODES, lab::Options::default())?;
//! lab.apply("{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{name: a, command: [sleep, inf]}]}}")?;
//! lab.wait_ready()?;
//! assert!(lab.exec("a", &["true"])?.success());
//! # anyhow::Ok(())
//! ```
//!
//! Errors are `anyhow::Error`: they end on a terminal, and nobody matches on them.

mod agent;
mod capture;
pub mod cli;
mod client;
mod demo;
mod http;
mod lab;
mod model;
mod netns;
mod options;
mod pcap;
mod poll;
mod process;
mod protocol;
mod registry;
mod settled;
mod tools;

pub use capture::{Capture, Location};
pub use http::Response;
pub use lab::{Lab, Manifests};
pub use options::{Clock, IdentitySource, IpFamily, LaunchOptions, Options};
pub use poll::wait_until;
pub use process::{Output, Process};
pub use protocol::{CaStatus, NodeStatus, PodStatus, ProgramState, ServiceStatus, Status};
pub use registry::remove_dead_labs;

/// Two empty nodes, `a` and `b`: the start of most tests.
pub const TWO_NODES: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Node, metadata: {name: b}}
";
