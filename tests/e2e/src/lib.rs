//! End-to-end suites: real programs in pods of a lab, through the shipped binaries.
//!
//! A test brings up a [`lab::Lab`] from manifests, runs curl, nginx, socat and the like in its pods,
//! and judges by what a user can see: the answer, the source address that the server saw, the access
//! log and metrics of the daemons, and the packets on the wire. This library holds what several
//! suites need: manifests in a few words ([`manifest`]), the programs that run in pods
//! ([`programs`]), and readers of what the daemons say ([`access_log`], [`metrics`]) and of what
//! crossed the wire ([`detector`]).
//!
//! Every suite needs root, and says so if it is not; none passes silently where it cannot run.

pub mod access_log;
pub mod ca;
pub mod capture;
pub mod detector;
pub mod hostile;
pub mod identity;
pub mod input;
pub mod manifest;
pub mod matrix;
pub mod metrics;
pub mod open_connections;
pub mod policy;
pub mod programs;
pub mod spire;
pub mod sync;
pub mod tcp;
pub mod tcp_load;
pub mod web_service;
