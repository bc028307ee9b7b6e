//! What every program of Ambit has, in the sense of Kubernetes' `component-base`:
//!
//! - [`admin`]: the HTTP/1.1 server behind admin, metrics and readiness ports;
//! - [`flags`]: values of command-line flags and environment variables, and one report of every
//!   mistake in them;
//! - [`ErrorChain`]: an error with its causes in one line; [`LastError`]: a recurring error, logged
//!   once.
//!
//! The crate depends on no other crate of the workspace.
#![forbid(unsafe_code)]

pub mod admin;
mod error;
pub mod flags;

pub use error::{ErrorChain, LastError};
