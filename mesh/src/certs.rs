//! Certificates: how a workload proves who it is.
//!
//! A [`CertificateSource`] issues, and knows whom the mesh trusts; [`Certificates`] keeps one good
//! certificate for every identity that runs here, and renews it at half of its life. [`LocalCa`] is
//! the source that needs nothing else: an [`Authority`] in a folder.
//!
//! ```text
//! source -- Issued --> verify -- Certificate --+
//!        -- TrustBundle ------------------------+--> Certificates --> TLS
//! ```
//!
//! Whom to trust ([`TrustBundle`]) is kept beside the certificates and not in them: it changes when
//! roots are replaced, they change when they are renewed, and TLS is built again from both when
//! either does. Nothing that a source says is relied on before it is verified: an answer that is
//! not what was asked for is refused with its reason, and what was good stays.

mod authority;
mod bundle;
mod certificate;
pub mod istio_ca;
mod local_ca;
mod renewal;
mod slots;
mod spire;
mod verify;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;

pub use authority::{Authority, AuthorityError, BACKDATE, Validity};
pub use bundle::{BundleError, BundleFile, TrustBundle};
pub use certificate::{Certificate, IssuedCertificate};
pub use istio_ca::{IstioCa, IstioCaConfig, IstioCaError};
pub use local_ca::LocalCa;
pub use renewal::{
    Certificates, CertificatesConfig, CertificatesState, Clock, Counters, RenewalTask,
};
pub use slots::{IdentityState, IdentityStatus, Priority};
pub use spire::{Spire, SpireConfig};

/// Issues certificates, and knows the roots that peers must chain to.
pub trait CertificateSource: Send + Sync {
    /// Issues a certificate for `identity` that lives for about `ttl`. Whoever asks verifies what
    /// comes, drops the future if it takes too long, and asks again.
    ///
    /// A source that learns roots together with a certificate publishes them first: the certificate
    /// is verified against what [`bundle`](Self::bundle) holds when it arrives.
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a>;

    /// The roots, now and whenever they change; empty until they are known. Old and new roots are in
    /// it together while one replaces the other.
    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>>;

    /// Identities for which the source has something newer than it has answered with, where it
    /// notices by itself. They are asked for again at once.
    fn updates(&self) -> Option<watch::Receiver<UpdateCounts>> {
        None
    }

    /// The identity's last pod is gone. Its key is to be wiped wherever the source holds a copy.
    fn forget(&self, _identity: &SpiffeId) {}

    /// What the source does beside answering: streams, files that may change. Runs for as long as
    /// certificates are renewed, in one task, and is dropped at the end. Never returns.
    fn run(&self) -> RunFuture<'_> {
        Box::pin(std::future::pending())
    }
}

/// A certificate that is being issued.
pub type IssueFuture<'a> =
    Pin<Box<dyn Future<Output = Result<IssuedCertificate, IssueError>> + Send + 'a>>;

/// How often the source has had something new for an identity, counted by the source. An identity
/// whose count has changed is asked for again, so that nothing is lost when two changes are seen as
/// one.
pub type UpdateCounts = BTreeMap<SpiffeId, u64>;

/// A source at work.
pub type RunFuture<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Why a certificate could not be issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate for {identity}: {code}: {message}")]
pub struct IssueError {
    /// For whom.
    pub identity: SpiffeId,
    /// Stable reason code: `ca_unreachable`, `issue_timeout`, `ca_denied`, `ca_expired`,
    /// `signing_failed`, and those of answers that are refused: `issued_garbage`,
    /// `wrong_identity`, `key_mismatch`, `issued_expired`, `issued_in_future`, `chain_too_long`,
    /// `chain_untrusted`. Sources have further ones of their own.
    pub code: &'static str,
    /// For the operator.
    pub message: String,
}

impl IssueError {
    /// The source could not be reached at all.
    pub const UNREACHABLE: &'static str = "ca_unreachable";
    /// The source did not answer in time.
    pub const TIMEOUT: &'static str = "issue_timeout";
    /// The source refuses to issue for this identity, or for whoever asks.
    pub const DENIED: &'static str = "ca_denied";

    /// Whether nobody answered, so that others have nothing to hope for either.
    pub(crate) fn is_unavailable(&self) -> bool {
        let codes = [
            Self::UNREACHABLE,
            Self::TIMEOUT,
            "spire_unreachable",
            "spire_silent",
        ];
        codes.contains(&self.code)
    }

    /// An error with one of the codes above.
    pub fn new(identity: &SpiffeId, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            identity: identity.clone(),
            code,
            message: message.into(),
        }
    }
}
