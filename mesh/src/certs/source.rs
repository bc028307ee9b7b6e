//! What must a source of certificates implement, and how does issuing fail?

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;

use super::certificate::IssuedCertificate;
use super::trust_bundle::TrustBundle;

/// Issues certificates, and publishes the roots that peers must chain to.
pub trait CertificateSource: Send + Sync {
    /// Issues a certificate for `identity` with a lifetime of about `ttl`. The caller verifies the
    /// result, drops the future at its deadline, and retries.
    ///
    /// A source that receives roots together with a certificate publishes the roots first: the
    /// certificate is verified against what [`bundle`](Self::bundle) holds when it arrives.
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a>;

    /// The current roots and every change of them. The bundle is empty until they are known. During
    /// a root rotation it holds the old and the new roots.
    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>>;

    /// Identities for which the source has received a newer certificate than it has returned, if it
    /// detects that by itself. The caller requests these again at once.
    fn updates(&self) -> Option<watch::Receiver<UpdateCounts>> {
        None
    }

    /// Called after the last pod of the identity has left the node. The source wipes every copy of
    /// the identity's key.
    fn remove_identity(&self, _identity: &SpiffeId) {}

    /// Runs the source's background work: streams, watched files. One task polls this future for as
    /// long as certificates are renewed, and drops it at the end. Never returns.
    fn run(&self) -> RunFuture<'_> {
        Box::pin(std::future::pending())
    }
}

/// A certificate request in progress.
pub type IssueFuture<'a> =
    Pin<Box<dyn Future<Output = Result<IssuedCertificate, IssueError>> + Send + 'a>>;

/// How many updates the source has received for each identity. An identity is requested again when
/// its count changes, so two updates that are observed as one are not lost.
pub type UpdateCounts = BTreeMap<SpiffeId, u64>;

/// The background work of a source.
pub type RunFuture<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Why a certificate could not be issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate for {identity}: {code}: {message}")]
pub struct IssueError {
    /// The identity that was requested.
    pub identity: SpiffeId,
    /// Stable reason code: `ca_unreachable`, `issue_timeout`, `ca_denied`, `ca_expired`,
    /// `signing_failed`, and those of rejected responses: `issued_garbage`, `wrong_identity`,
    /// `key_mismatch`, `issued_expired`, `issued_in_future`, `chain_too_long`, `chain_untrusted`.
    /// Sources define further codes.
    pub code: &'static str,
    /// Message for the operator.
    pub message: String,
}

impl IssueError {
    /// The source could not be reached.
    pub const UNREACHABLE: &'static str = "ca_unreachable";
    /// The source did not respond before the deadline.
    pub const TIMEOUT: &'static str = "issue_timeout";
    /// The source refuses to issue for this identity, or for this caller.
    pub const DENIED: &'static str = "ca_denied";

    /// An error with one of the reason codes above.
    pub fn new(identity: &SpiffeId, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            identity: identity.clone(),
            code,
            message: message.into(),
        }
    }

    /// Whether the source did not respond at all, so that requests for other identities would fail
    /// too.
    pub(super) fn is_unavailable(&self) -> bool {
        let codes = [
            Self::UNREACHABLE,
            Self::TIMEOUT,
            "spire_unreachable",
            "spire_silent",
        ];
        codes.contains(&self.code)
    }
}

/// An [`IssueError`] without its identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IssueFailure {
    /// Stable reason code.
    pub(super) code: &'static str,
    /// Message for the operator.
    pub(super) message: String,
}

impl IssueFailure {
    /// A response that cannot be parsed.
    pub(super) const MALFORMED: &'static str = "issued_garbage";

    pub(super) fn new(code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }

    pub(super) fn malformed(message: impl Into<String>) -> Self {
        Self::new(Self::MALFORMED, message)
    }

    pub(super) fn for_identity(self, identity: &SpiffeId) -> IssueError {
        IssueError::new(identity, self.code, self.message)
    }
}
