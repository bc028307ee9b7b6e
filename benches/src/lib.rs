//! Benchmarks of the mesh's decisions.
//!
//! An absolute time depends on the machine and its load. Benchmarks here therefore report ratios of
//! cases that run in turns ([`measure`]). Allocations do not depend on the machine: tests count them.
//!
//! * `make bench`: the cost of policies for a new connection, and of compiling them.
//! * `tests/policy.rs`: policies cost nothing for workloads that they do not select.
#![forbid(unsafe_code)]
#![expect(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has no result"
)]

pub mod cluster;
pub mod connection;
mod measure;

pub use measure::{Case, Times, measure};
