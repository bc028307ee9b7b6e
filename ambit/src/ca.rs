//! The certificate authority: Istio's `CreateCertificate` over TLS, for callers who prove who they
//! are and ask for what they may speak for.
//!
//! ```text
//! connection -- TLS --> service -- token --> Authenticator -- Caller --+
//!                          |                                           v
//!                          +------- CSR: its key, and nothing else --> decide --> Rotation signs
//! ```
//!
//! Three rules.
//!
//! * **The server decides the name.** A certificate says what the caller may speak for, checked
//!   here; of a certificate signing request only the key is used, after it has proven that its
//!   sender holds the other half.
//! * **Roots overlap.** A new root is handed out long before anything is signed under it, and the
//!   old one is handed out until the last certificate under it has expired ([`Rotation`]).
//! * **Everything has a bound**: connections, requests, sizes, waits. What does not fit is refused
//!   with a reason, which the caller, the log and the metrics see alike. Keys and tokens are in
//!   none of them.

mod account;
mod authenticate;
mod config;
mod decide;
mod folder;
mod keeper;
mod log;
mod metrics;
mod refusal;
mod rotation;
mod run;
mod server;
mod service;
mod serving;
mod state;
mod token;

pub use account::{Account, Accounts};
pub use authenticate::{Authenticating, Authenticator, Caller, Unauthenticated};
pub use config::{CaArguments, CaConfig, ConfigError, Limits};
pub use folder::FolderError;
pub use keeper::Keeper;
pub use log::{Format, LogConfig};
pub use metrics::Metrics;
pub use refusal::Refusal;
pub use rotation::{PublishedRoot, Rotation};
pub use run::{Error, Running, run, start};
pub use token::{Claims, KeyFileError, SignedTokens, TokenKey, create_keys};

#[cfg(test)]
mod tests;
