//! What the mesh costs, measured side by side.
//!
//! A time by itself says little: it changes with the machine and with whoever else is on it. So
//! everything here is a ratio within one run, of contenders that take turns ([`race`]). What can be
//! counted is counted instead, and is a test: allocations do not depend on the machine.
//!
//! * `make bench`: what policies cost a new connection, and what compiling them costs.
//! * `tests/policy.rs`: that a workload that no policy selects does not pay for those of the others.
#![forbid(unsafe_code)]
#![expect(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has nothing to tell"
)]

pub mod cluster;
pub mod connection;
mod rounds;

pub use rounds::{Contender, Times, race};
