//! Certificates from a folder.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use spiffe::SpiffeId;
use tokio::sync::watch;
use tracing::{info, warn};

use super::authority::files;
use super::bundle::LOOK;
use super::{
    Authority, AuthorityError, CertificateSource, IssueError, IssueFuture, IssuedCertificate,
    RunFuture, TrustBundle, Validity,
};

/// The source that needs nothing but a folder with an [`Authority`]'s files. Files that are replaced
/// are taken over together, as soon as they fit together; until then, and when they are broken, the
/// last good ones stay in force.
///
/// To replace a root without anybody noticing: put old and new into `root-cert.pem`; then replace
/// `ca-key.pem` and `ca-cert.pem`; then wait until every certificate was renewed; then take the old
/// root out.
pub struct LocalCa {
    dir: PathBuf,
    authority: ArcSwap<Authority>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

impl fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa")
            .field("dir", &self.dir)
            .field("authority", &self.authority.load())
            .finish_non_exhaustive()
    }
}

impl LocalCa {
    /// Makes an authority in the folder, which is made if need be. Refuses to overwrite.
    pub fn create(dir: &Path) -> Result<Self, AuthorityError> {
        Ok(Self::new(dir, Authority::create(dir)?))
    }

    /// Reads the authority from the folder.
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

    /// The authority as it is now.
    pub fn authority(&self) -> Arc<Authority> {
        self.authority.load_full()
    }

    /// Issues a certificate for an identity, for at most as long as the authority itself is valid.
    pub fn issue(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<IssuedCertificate, IssueError> {
        self.issue_at(identity, ttl, SystemTime::now())
    }

    /// The same at another time than now.
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

    /// Takes over what is in the folder now, if it is another authority than before.
    fn reload(&self) -> Result<(), AuthorityError> {
        let found = Authority::open(&self.dir)?;
        if found == **self.authority.load() {
            return Ok(());
        }
        info!(
            target: "mesh::certs",
            folder = %self.dir.display(),
            roots = found.bundle().roots().len(),
            "the certificate authority's files have changed"
        );
        let bundle = Arc::new(found.bundle().clone());
        self.authority.store(Arc::new(found));
        self.bundle.send_if_modified(|old| {
            let changed = *old != bundle;
            *old = bundle;
            changed
        });
        Ok(())
    }

    async fn follow(&self) {
        let mut complaint = None;
        let (mut seen, mut settled) = (None, false);
        loop {
            tokio::time::sleep(LOOK).await;
            let found = Some(files::stamps(&self.dir));
            if found == seen && settled {
                continue;
            }
            // Once more after the last change: two writes may have the same time.
            settled = found == seen;
            seen = found;
            let complains = self.reload().err().map(|error| error.to_string());
            if complains != complaint {
                if let Some(error) = &complains {
                    warn!(
                        target: "mesh::certs",
                        error,
                        "the certificate authority cannot be read again; the last good one stays"
                    );
                }
                complaint = complains;
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
        Box::pin(self.follow())
    }
}

#[cfg(test)]
mod tests;
