//! The end-to-end suites, one module each, in one binary. `ambit_e2e` has the helpers that several suites share.

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
mod identity_fake_ca;
mod identity_rotation;
mod identity_tunnels;
mod input;
mod matrix;
mod policy_changes;
mod policy_guides;
mod policy_invalid;
mod policy_probes;
mod probes;
mod protocols;
mod rogue_server;
mod routing;
mod serial;
mod spire;
mod tcp;
mod telemetry;
