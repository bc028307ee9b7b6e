//! Which certificate does each workload identity of this node have, and which roots must a peer's
//! certificate chain to?
//!
//! A [`CertificateSource`] issues certificates and publishes the trust bundle: [`IstioCa`] (Istio's
//! CSR protocol over gRPC), [`Spire`] (SPIRE's Delegated Identity API) or [`LocalCa`] (an
//! [`Authority`] in a folder). [`Certificates`] holds one verified certificate for every identity on
//! this node and renews it at about half of its lifetime.
//!
//! ```text
//! source -- IssuedCertificate --> verify_response -- Certificate --+
//!        -- TrustBundle -------------------------------------------+--> Certificates --> TLS
//! ```
//!
//! The trust bundle is separate from the certificates, because each changes without the other. TLS
//! configurations are rebuilt from both when either changes. Every response of a source is verified
//! before use: an invalid one is rejected with a reason code, and the previous certificate stays in
//! use.
//!
//! | question | file |
//! |---|---|
//! | What must a source implement, and how does issuing fail? | `source.rs` |
//! | Is a CA's response what was requested? | `verify_response.rs` |
//! | Does a chain lead to a root of the bundle? | `verify_chain.rs` |
//! | When is a certificate renewed, and when is a failed request repeated? | `renewal_time.rs` |
//! | Which identity is issued next? | `store.rs` |
//! | Who runs the requests and publishes their outcomes? | `renewal_task.rs` |
//! | What do the users of certificates call? | `certificates.rs` |

mod authority;
mod certificate;
mod certificates;
mod clock;
mod grpc_status;
pub mod istio_ca;
mod local_ca;
mod renewal_task;
mod renewal_time;
mod source;
mod spire;
mod state;
mod store;
mod trust_bundle;
mod verify_chain;
mod verify_response;

pub use authority::{Authority, AuthorityError, BACKDATE, Validity};
pub use certificate::{Certificate, IssuedCertificate};
pub use certificates::Certificates;
pub use clock::Clock;
pub use istio_ca::{IstioCa, IstioCaConfig, IstioCaError};
pub use local_ca::LocalCa;
pub use renewal_task::{CertificatesConfig, RenewalTask};
pub use source::{CertificateSource, IssueError, IssueFuture, RunFuture, UpdateCounts};
pub use spire::{Spire, SpireConfig};
pub use state::{CertificatesState, Counters};
pub use store::{IdentityState, IdentityStatus, Priority};
pub use trust_bundle::{BundleError, TrustBundle};
