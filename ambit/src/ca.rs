//! The certificate authority: Istio's `CreateCertificate` over TLS. A caller authenticates with a
//! bearer token and gets certificates for the identities that the token permits.
//!
//! ```text
//! connection -- TLS --> service -- token --> Authenticator -- Caller --+
//!                          |                                           v
//!                          +-- CSR: its public key only --> authorization --> CaState signs
//! ```
//!
//! Three invariants.
//!
//! * **The server decides the name.** A certificate names an identity that the caller may
//!   impersonate, checked here. Of a certificate signing request only the public key is used, after
//!   the request's signature has proven possession of the private key.
//! * **Roots overlap.** A new root is distributed long before anything is signed under it, and the
//!   old one is distributed until the last certificate under it has expired ([`RootRotation`]).
//! * **Everything has a bound**: connections, requests, sizes, waits. What exceeds a bound is refused
//!   with a reason that is the same for the caller, in the log and in the metrics. None of the three
//!   contains a key or a token.

mod authentication;
mod authorization;
mod config;
mod csr;
mod folder;
mod log;
mod metrics;
mod refusal;
mod rotation;
mod run;
mod server;
mod service;
mod service_account;
mod serving_cert;
mod state;
mod state_dir;
mod token;

pub use authentication::{Authenticating, Authenticator, Caller};
pub use config::{CaArguments, CaConfig, ConfigError, TtlLimits};
pub use folder::FolderError;
pub use log::{Format, LogConfig};
pub use metrics::Metrics;
pub use refusal::Refusal;
pub use rotation::{NextAuthority, PublishedRoot, RootRotation};
pub use run::{Error, Running, run, start};
pub use service_account::{ServiceAccount, ServiceAccountPatterns};
pub use state::CaState;
pub use token::{Claims, KeyFileError, TokenAuthenticator, TokenSigner, create_keys};

#[cfg(test)]
mod tests;
