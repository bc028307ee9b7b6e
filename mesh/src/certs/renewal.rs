//! Keeps a certificate for every identity that runs here.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Certificate;

/// Issues certificates.
pub trait CertificateSource: Send + Sync {
    /// Issues a certificate for `identity` that lives for about `ttl`.
    fn issue<'a>(
        &'a self,
        identity: &'a SpiffeId,
        ttl: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Certificate, IssueError>> + Send + 'a>>;
}

/// Why a certificate could not be issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no certificate: {code}: {message}")]
pub struct IssueError {
    /// Stable reason code.
    pub code: &'static str,
    /// For the operator.
    pub message: String,
}

/// How certificates are kept.
#[derive(Clone, Debug)]
pub struct CertificatesConfig {
    /// Life of a leaf.
    pub ttl: Duration,
}

impl Default for CertificatesConfig {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
        }
    }
}

/// The certificates of this node's identities. Clones share them.
#[derive(Clone, Debug)]
pub struct Certificates {
    wanted: watch::Sender<Arc<BTreeSet<SpiffeId>>>,
    version: watch::Sender<u64>,
}

/// The owned task that issues and renews; run it once.
pub struct RenewalTask {}

impl Certificates {
    /// The handle and the task that serves it.
    pub fn new(
        source: Arc<dyn CertificateSource>,
        config: CertificatesConfig,
    ) -> (Self, RenewalTask) {
        let _ = (source, config);
        (
            Self {
                wanted: watch::Sender::default(),
                version: watch::Sender::new(0),
            },
            RenewalTask {},
        )
    }

    /// Says which identities run here now. New ones are issued at once, others are forgotten.
    pub fn wanted(&self, identities: BTreeSet<SpiffeId>) {
        self.wanted.send_replace(Arc::new(identities));
    }

    /// The certificate of an identity, unless it has none or it has expired.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Certificate>> {
        let _ = identity;
        None
    }

    /// Tells of every change; the value counts them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl RenewalTask {
    /// Serves until cancelled.
    pub async fn run(self, stop: CancellationToken) {
        stop.cancelled().await;
    }
}
