//! Helpers of the end-to-end suites, which run real programs in pods of a lab against the shipped binaries.
//!
//! A test brings up a [`lab::Lab`] from manifests, runs curl, nginx, socat and the like in its pods, and checks what a
//! user can observe: responses, source addresses, access log and metrics of the daemons, and packets on the wire. This
//! library has what several suites need: short manifests ([`manifest`]), programs that run in pods ([`programs`]),
//! readers of the daemons' output ([`access_log`], [`metrics`]), and a search for unencrypted bytes on the wire
//! ([`detector`]).
//!
//! Every suite needs root and fails without it.

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
