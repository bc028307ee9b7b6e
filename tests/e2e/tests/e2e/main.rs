//! The end-to-end suites, one module each, in one binary: real programs in pods of a lab, through the shipped
//! binaries. `ambit_e2e` holds what several suites share.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod balancing;
mod ca;
mod capture;
mod capture_pods;
mod capture_without_ca;
mod daemon;
mod demo_policies;
mod enrolment;
mod hostile;
mod hostile_http2;
mod hostile_server;
mod identity_hostile_ca;
mod identity_rotation;
mod identity_tunnels;
mod input;
mod load;
mod log;
mod matrix;
mod policy_guides;
mod policy_invalid;
mod policy_live;
mod policy_probes;
mod policy_storm;
mod probes;
mod protocols;
mod routing;
mod spire;
mod tcp;
mod telemetry;
