//! Who may talk to whom, as users find out: a small town of clients and servers, the policies that
//! guides tell people to write, what a client sees, and what an operator reads of it.
//!
//! A policy reaches the daemons as a file in their source folder, word for word as its author wrote
//! it ([`crate::input::SourceFile`]). [`town`] is the scene, [`connection`] one connection and its end,
//! [`guides`] the policies, [`evidence`] the access log, metrics and dump that must agree with what
//! clients saw, [`transfers`] long connections that a change of policy meets half-way, and
//! [`churn`] edits without a pause.

pub mod connection;
pub mod guides;
pub mod telemetry;

pub mod churn;
pub mod fixture;
pub mod transfers;
