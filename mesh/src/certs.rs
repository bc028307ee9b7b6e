//! Certificates: how a workload proves who it is.
//!
//! A [`CertificateSource`] issues; [`Certificates`] keeps one good certificate for every identity
//! that runs here, and renews it at half of its life. [`LocalCa`] is the source that needs nothing
//! else: a root and its key in a folder.

mod certificate;
pub mod istio_ca;
mod local_ca;
mod renewal;
mod slots;

use std::pin::Pin;
use std::time::Duration;

use spiffe::SpiffeId;

pub use certificate::Certificate;
pub use istio_ca::{IstioCa, IstioCaConfig, IstioCaError};
pub use local_ca::{LocalCa, LocalCaError};
pub use renewal::{Certificates, CertificatesConfig, Clock, RenewalTask};
pub use slots::{IdentityState, IdentityStatus};

/// Issues certificates.
pub trait CertificateSource: Send + Sync {
    /// Issues a certificate for `identity` that lives for about `ttl`.
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> Issuing<'a>;
}

/// A certificate that is being issued.
pub type Issuing<'a> = Pin<Box<dyn Future<Output = Result<Certificate, IssueError>> + Send + 'a>>;

/// Why a certificate could not be issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate for {identity}: {code}: {message}")]
pub struct IssueError {
    /// For whom.
    pub identity: SpiffeId,
    /// Stable reason code.
    pub code: &'static str,
    /// For the operator.
    pub message: String,
}
