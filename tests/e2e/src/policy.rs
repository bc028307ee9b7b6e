//! Policies of users, enforced by the daemons: the published examples, invalid policies, and changes
//! under traffic.
//!
//! A policy reaches the daemons as a file in their source folder, as its author wrote it
//! ([`crate::input::SourceFile`]). [`fixture`] is the lab, [`connection`] one connection and its
//! outcome, [`guides`] the published examples, [`telemetry`] the access log, metrics and dump that
//! must agree with what clients observe, [`transfers`] connections that are open during a change,
//! and [`churn`] continuous edits.

pub mod churn;
pub mod connection;
pub mod fixture;
pub mod guides;
pub mod telemetry;
pub mod transfers;
