//! The state of the running certificate authority: which authority signs now, and how it follows its
//! folder, persists its state and issues certificates.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use component::{ErrorChain, LastError};
use mesh::certs::{Authority, Clock, Validity};
use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use tonic::Code;
use tracing::{error, info, warn};

use super::folder::{self, FolderError, to_pem};
use super::refusal::Refusal;
use super::rotation::RootRotation;
use super::state_dir::StateDir;

/// Issues certificates with the current authority, and follows replacements of its files.
pub struct CaState {
    dir: PathBuf,
    clock: Clock,
    inner: Mutex<Inner>,
}

struct Inner {
    rotation: RootRotation,
    state_dir: StateDir,
    /// The latest expiry on disk. Certificates that expire before it need no write.
    persisted_expiry: SystemTime,
    last_error: LastError,
}

/// A certificate that was just issued.
#[derive(Debug)]
pub(super) struct IssuedCertificate {
    /// In the form of Istio's protocol: the leaf, each intermediate, and all roots in the last
    /// element. PEM.
    pub(super) chain: Vec<String>,
    pub(super) serial: String,
    pub(super) not_after: SystemTime,
}

/// What the metrics report of the authority.
#[derive(Clone, Copy, Debug)]
pub(super) struct CaStatus {
    pub(super) issuer_expiry: SystemTime,
    pub(super) earliest_root_expiry: Option<SystemTime>,
    pub(super) root_count: usize,
    pub(super) next_signs_at: Option<SystemTime>,
}

impl CaState {
    /// Opens the authority's folder and restores the state. Without a state this is the first start,
    /// and a missing authority is created.
    ///
    /// With a state, a missing authority is an error: a new root would separate all new certificates
    /// from the holders of the old root. If the files cannot be used, because they are being
    /// replaced, the previous authority continues to sign until they can.
    ///
    /// # Errors
    /// Fails if one of the folders cannot be used or has invalid content.
    pub fn open(dir: &Path, state_dir: &Path, clock: Clock) -> Result<Self, FolderError> {
        let now = clock();
        let (mut state, restored) = StateDir::open(state_dir)?;
        if folder::is_empty(dir) && state.has_content() {
            return Err(FolderError::Missing {
                dir: dir.to_owned(),
                state: state_dir.to_owned(),
            });
        }
        let (rotation, found) = match restored {
            Some(rotation) => (rotation, folder::open(dir)),
            None => {
                let found = folder::open_or_create(dir)?;
                let copy = state.copy_authority(dir)?;
                (RootRotation::new(copy, now), Ok(found))
            }
        };
        let mut inner = Inner {
            persisted_expiry: rotation.latest_expiry(),
            rotation,
            state_dir: state,
            last_error: LastError::default(),
        };
        inner.persist()?;
        let adopted = found.and_then(|found| inner.adopt(dir, &found, now));
        inner.record_outcome(adopted);
        inner.log_status(now);
        Ok(Self {
            dir: dir.to_owned(),
            clock,
            inner: Mutex::new(inner),
        })
    }

    /// The authority's time.
    pub(super) fn now(&self) -> SystemTime {
        (self.clock)()
    }

    /// The authority that signs now.
    pub fn signing_authority(&self) -> Arc<Authority> {
        self.lock().rotation.signing().clone()
    }

    pub(super) fn status(&self) -> CaStatus {
        let inner = self.lock();
        let bundle = inner.rotation.bundle().ok();
        CaStatus {
            issuer_expiry: inner.rotation.signing().not_after(),
            earliest_root_expiry: bundle.and_then(|bundle| bundle.earliest_expiry()),
            root_count: inner.rotation.roots().len(),
            next_signs_at: inner.rotation.next().map(|next| next.signs_at),
        }
    }

    /// Issues a certificate. The roots are read together with the signing authority, so a certificate
    /// never goes out with fewer roots than the rotation relies on.
    pub(super) fn issue(
        &self,
        identity: &SpiffeId,
        key: &SubjectPublicKeyInfo,
        ttl: Duration,
    ) -> Result<IssuedCertificate, Refusal> {
        let now = self.now();
        let unavailable =
            |reason, message: String| Refusal::new(reason, Code::Unavailable, message);
        let (authority, roots, validity) = {
            let mut inner = self.lock();
            let authority = inner.rotation.signing().clone();
            if authority.not_after() <= now {
                let message = "the authority's own certificate has expired".to_owned();
                return Err(unavailable("ca_expired", message));
            }
            let mut validity = Validity::new(now, ttl);
            validity.not_after = validity.not_after.min(authority.not_after());
            inner.record_issued(validity.not_after, ttl);
            let roots = inner.rotation.roots().iter();
            let roots: String = roots.map(|published| to_pem(&published.root)).collect();
            (authority, roots, validity)
        };
        let chain = authority
            .sign(key, identity, validity)
            .map_err(|error| unavailable("signing_failed", error.to_string()))?;
        let serial = chain.first().map(serial).unwrap_or_default();
        Ok(IssuedCertificate {
            chain: chain.iter().map(to_pem).chain([roots]).collect(),
            serial,
            not_after: validity.not_after,
        })
    }

    /// Reads the folder again and takes the steps that are due. On an error the current authority
    /// stays in use; the error is logged once.
    pub fn reload(&self) {
        let now = self.now();
        let mut inner = self.lock();
        let adopted = folder::open(&self.dir).and_then(|found| inner.adopt(&self.dir, &found, now));
        // Steps become due even while the folder cannot be used.
        let advanced = inner.advance(now);
        inner.record_outcome(adopted.and(advanced));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Starts to replace the signing authority if the folder has another one.
    fn adopt(&mut self, dir: &Path, found: &Authority, now: SystemTime) -> Result<(), FolderError> {
        if **self.rotation.latest_authority() == *found {
            return Ok(());
        }
        let authority = match *found == **self.rotation.signing() {
            true => self.rotation.signing().clone(),
            false => self.state_dir.copy_authority(dir)?,
        };
        // Files that changed during the copy are read again at the next reload.
        if *authority == *found && self.rotation.replace_with(&authority, now) {
            self.persist()?;
            self.log_status(now);
        }
        Ok(())
    }

    fn advance(&mut self, now: SystemTime) -> Result<(), FolderError> {
        if self.rotation.advance(now) {
            self.persist()?;
            self.log_status(now);
        }
        Ok(())
    }

    /// Records a certificate before it is signed. To avoid a disk write per certificate, the
    /// persisted expiry is an eighth of a lifetime ahead.
    fn record_issued(&mut self, expiry: SystemTime, ttl: Duration) {
        self.rotation.record_issued(expiry);
        if expiry > self.persisted_expiry {
            self.persisted_expiry = expiry + ttl / 8;
            if let Err(error) = self.persist() {
                error!(
                    error = %ErrorChain(&error),
                    "cannot write the state: after a restart, roots may be withdrawn too early"
                );
            }
        }
    }

    fn persist(&mut self) -> Result<(), FolderError> {
        self.persisted_expiry = self.persisted_expiry.max(self.rotation.latest_expiry());
        self.state_dir.write(&self.rotation, self.persisted_expiry)
    }

    fn record_outcome(&mut self, outcome: Result<(), FolderError>) {
        let error = outcome.as_ref().err();
        if let Some(error) = self.last_error.record(error.map(|error| error as _)) {
            warn!(
                error,
                "keeping the current authority: its files cannot be used"
            );
        }
    }

    fn log_status(&self, now: SystemTime) {
        let seconds_left = |at: SystemTime| at.duration_since(now).unwrap_or_default().as_secs();
        let (signing, roots) = (self.rotation.signing(), self.rotation.roots().len());
        let issuer_seconds_left = seconds_left(signing.not_after());
        match self.rotation.next() {
            Some(next) => info!(
                roots,
                issuer_seconds_left,
                signing_moves_in_seconds = seconds_left(next.signs_at),
                "replacing the authority: distributing the new roots before the new authority signs"
            ),
            None => info!(roots, issuer_seconds_left, "the authority signs"),
        }
    }
}

fn serial(leaf: &CertificateDer<'_>) -> String {
    x509_parser::parse_x509_certificate(leaf)
        .map(|(_, leaf)| format!("{:x}", leaf.serial))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
