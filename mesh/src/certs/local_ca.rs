//! How are certificates issued from a CA in a local folder?

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use spiffe::SpiffeId;
use tokio::sync::watch;
use tracing::{info, warn};

use super::authority::{Authority, AuthorityError, Validity, file_stamps};
use super::certificate::IssuedCertificate;
use super::source::{CertificateSource, IssueError, IssueFuture, RunFuture};
use super::trust_bundle::TrustBundle;

/// How often the files are checked for changes. Checking their metadata detects a write in place, a
/// rename, and a change of the symbolic links of a mounted volume above the file.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// A source that needs only a folder with the files of an [`Authority`]. Replaced files take effect
/// together, as soon as they match. Until then, and while they are invalid, the previous ones stay
/// in use.
///
/// To rotate the root without failed handshakes: put the old and the new root into `root-cert.pem`;
/// then replace `ca-key.pem` and `ca-cert.pem`; then wait until every certificate has been renewed;
/// then remove the old root.
pub struct LocalCa {
    dir: PathBuf,
    authority: ArcSwap<Authority>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

impl LocalCa {
    /// Creates a CA in the folder, which is created if needed.
    ///
    /// # Errors
    /// Fails if the folder already has a CA, or cannot be written.
    pub fn create(dir: &Path) -> Result<Self, AuthorityError> {
        Ok(Self::new(dir, Authority::create(dir)?))
    }

    /// Reads the CA from the folder.
    ///
    /// # Errors
    /// Fails as [`Authority::open`].
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        Ok(Self::new(dir, Authority::open(dir)?))
    }

    fn new(dir: &Path, authority: Authority) -> Self {
        Self {
            dir: dir.to_owned(),
            bundle: watch::Sender::new(Arc::new(authority.bundle().clone())),
            authority: ArcSwap::from_pointee(authority),
        }
    }

    /// The current CA.
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.load_full()
    }

    /// Issues a certificate that expires no later than the CA.
    ///
    /// # Errors
    /// Fails with `ca_expired` after the CA's own expiry, and with `signing_failed`.
    pub fn issue(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<IssuedCertificate, IssueError> {
        self.issue_at(identity, ttl, SystemTime::now())
    }

    /// Like [`issue`](Self::issue), with `now` as the current time.
    pub fn issue_at(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<IssuedCertificate, IssueError> {
        let authority = self.authority.load();
        if authority.not_after() <= now {
            let message = "the certificate authority has expired";
            return Err(IssueError::new(identity, "ca_expired", message));
        }
        authority
            .issue(identity, Validity::new(now, ttl))
            .map_err(|error| IssueError::new(identity, "signing_failed", error.to_string()))
    }

    /// Reads the folder, and replaces the CA if it has changed.
    fn reload(&self) -> Result<(), AuthorityError> {
        let found = Authority::open(&self.dir)?;
        if found == **self.authority.load() {
            return Ok(());
        }
        info!(
            target: "mesh::certs",
            folder = %self.dir.display(),
            roots = found.bundle().roots().len(),
            "the files of the certificate authority have changed"
        );
        let bundle = Arc::new(found.bundle().clone());
        self.authority.store(Arc::new(found));
        self.bundle.send_if_modified(|old| {
            let is_modified = *old != bundle;
            *old = bundle;
            is_modified
        });
        Ok(())
    }

    /// Reloads changed files. Never returns.
    async fn watch_files(&self) {
        let mut last_error = None;
        let (mut last_stamps, mut is_settled) = (None, false);
        loop {
            tokio::time::sleep(RELOAD_INTERVAL).await;
            let stamps = Some(file_stamps(&self.dir));
            if stamps == last_stamps && is_settled {
                continue;
            }
            // Reload once more after the last change: two writes may have the same time stamp.
            is_settled = stamps == last_stamps;
            last_stamps = stamps;
            let error = self.reload().err().map(|error| error.to_string());
            if error != last_error {
                if let Some(error) = &error {
                    warn!(
                        target: "mesh::certs",
                        error,
                        "reloading the certificate authority failed; the previous one stays in use"
                    );
                }
                last_error = error;
            }
        }
    }
}

impl CertificateSource for LocalCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move { LocalCa::issue(self, identity, ttl) })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    fn run(&self) -> RunFuture<'_> {
        Box::pin(self.watch_files())
    }
}

impl fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa")
            .field("dir", &self.dir)
            .field("authority", &self.authority.load())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
