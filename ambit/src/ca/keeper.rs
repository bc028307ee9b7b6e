//! The authority at work: signs, follows its folder, and remembers.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use component::ErrorChain;
use mesh::certs::{Authority, Clock, Validity};
use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use tonic::Code;
use tracing::{error, info, warn};

use super::folder::{self, FolderError};
use super::refusal::Refusal;
use super::rotation::Rotation;
use super::state::State;

/// Signs with the authority of the moment, and replaces it when the folder does.
pub struct Keeper {
    dir: PathBuf,
    clock: Clock,
    kept: Mutex<Kept>,
}

struct Kept {
    rotation: Rotation,
    state: State,
    /// The latest end that is written down; certificates up to it need no writing.
    written: SystemTime,
    complaint: Option<String>,
}

/// A certificate that was just signed.
#[derive(Debug)]
pub(super) struct Signed {
    /// As Istio's protocol has it: the leaf, the intermediates one by one, the roots together. PEM.
    pub(super) chain: Vec<String>,
    pub(super) serial: String,
    pub(super) not_after: SystemTime,
}

/// How the authority stands; for metrics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    pub(super) issuer_end: SystemTime,
    pub(super) first_root_end: Option<SystemTime>,
    pub(super) roots: usize,
    pub(super) moves_at: Option<SystemTime>,
}

impl Keeper {
    /// Opens the authority's folder, and goes on where the state was left. Where there is no state,
    /// this is the first start, and an authority that is missing is made.
    ///
    /// With a state, one that is missing is an error: a new root would part everybody from those who
    /// have the old one. One that cannot be used, because its files are just being replaced, is
    /// waited for, while the authority of before signs.
    ///
    /// # Errors
    /// Fails if one of the folders cannot be used, or holds what is none.
    pub fn open(dir: &Path, state_dir: &Path, clock: Clock) -> Result<Self, FolderError> {
        let now = clock();
        let (mut state, left) = State::open(state_dir)?;
        if folder::is_empty(dir) && state.remembers() {
            return Err(FolderError::Missing {
                dir: dir.to_owned(),
                state: state_dir.to_owned(),
            });
        }
        let (rotation, found) = match left {
            Some(rotation) => (rotation, folder::open(dir)),
            None => {
                let found = folder::open_or_create(dir)?;
                (Rotation::new(state.keep(dir)?, now), Ok(found))
            }
        };
        let mut kept = Kept {
            written: rotation.last_end(),
            rotation,
            state,
            complaint: None,
        };
        kept.write()?;
        let taken = found.and_then(|found| kept.take_over(dir, &found, now));
        kept.complain(taken);
        kept.told(now);
        Ok(Self {
            dir: dir.to_owned(),
            clock,
            kept: Mutex::new(kept),
        })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What time it is to the authority.
    pub(super) fn now(&self) -> SystemTime {
        (self.clock)()
    }

    /// Signs for an identity. The roots that go with the certificate are those of the moment it is
    /// signed in: nobody is handed a certificate with less than the rotation believes.
    pub(super) fn sign(
        &self,
        identity: &SpiffeId,
        key: &SubjectPublicKeyInfo,
        ttl: Duration,
    ) -> Result<Signed, Refusal> {
        let now = self.now();
        let failed = |reason, message: String| Refusal::new(reason, Code::Unavailable, message);
        let (authority, roots, validity) = {
            let mut kept = self.kept();
            let authority = kept.rotation.signing().clone();
            if authority.not_after() <= now {
                let message = "the authority's own certificate has expired".to_owned();
                return Err(failed("ca_expired", message));
            }
            let mut validity = Validity::new(now, ttl);
            validity.not_after = validity.not_after.min(authority.not_after());
            kept.note(validity.not_after, ttl);
            let roots = kept.rotation.roots().iter();
            let roots: String = roots.map(|published| pem(&published.root)).collect();
            (authority, roots, validity)
        };
        let chain = authority
            .sign(key, identity, validity)
            .map_err(|error| failed("signing_failed", error.to_string()))?;
        let serial = chain.first().map(serial).unwrap_or_default();
        Ok(Signed {
            chain: chain.iter().map(pem).chain([roots]).collect(),
            serial,
            not_after: validity.not_after,
        })
    }

    /// The authority that signs now.
    pub fn signing(&self) -> Arc<Authority> {
        self.kept().rotation.signing().clone()
    }

    pub(super) fn standing(&self) -> Standing {
        let kept = self.kept();
        Standing {
            issuer_end: kept.rotation.signing().not_after(),
            first_root_end: kept
                .rotation
                .bundle()
                .ok()
                .and_then(|b| b.earliest_expiry()),
            roots: kept.rotation.roots().len(),
            moves_at: kept.rotation.next().map(|(_, at)| at),
        }
    }

    /// Looks at the folder and at the clock. What cannot be used is reported once, and changes
    /// nothing.
    pub fn look(&self) {
        let now = self.now();
        let mut kept = self.kept();
        let taken =
            folder::open(&self.dir).and_then(|found| kept.take_over(&self.dir, &found, now));
        // Time goes on even if the folder is not good.
        let advanced = kept.advance(now);
        kept.complain(taken.and(advanced));
    }
}

impl Kept {
    fn take_over(
        &mut self,
        dir: &Path,
        found: &Authority,
        now: SystemTime,
    ) -> Result<(), FolderError> {
        let awaited = self.rotation.next().map(|(next, _)| next);
        if **awaited.unwrap_or(self.rotation.signing()) == *found {
            return Ok(());
        }
        let authority = match *found == **self.rotation.signing() {
            true => self.rotation.signing().clone(),
            false => self.state.keep(dir)?,
        };
        // Files that change while they are copied are looked at again.
        if *authority == *found && self.rotation.found(&authority, now) {
            self.write()?;
            self.told(now);
        }
        Ok(())
    }

    /// Reports what is wrong, once.
    fn complain(&mut self, outcome: Result<(), FolderError>) {
        let complaint = outcome.err().map(|error| ErrorChain(&error).to_string());
        if let Some(error) = complaint.as_ref().filter(|_| complaint != self.complaint) {
            warn!(error, "the authority goes on as it was");
        }
        self.complaint = complaint;
    }

    fn advance(&mut self, now: SystemTime) -> Result<(), FolderError> {
        if self.rotation.advance(now) {
            self.write()?;
            self.told(now);
        }
        Ok(())
    }

    /// Writing each end down would be a write to the disk per certificate: it is done in steps of an
    /// eighth of a life.
    fn note(&mut self, end: SystemTime, ttl: Duration) {
        self.rotation.note(end);
        if end > self.written {
            self.written = end + ttl / 8;
            if let Err(error) = self.write() {
                error!(
                    error = %ErrorChain(&error),
                    "the state was not written; after a restart, roots may go too early"
                );
            }
        }
    }

    fn write(&mut self) -> Result<(), FolderError> {
        self.written = self.written.max(self.rotation.last_end());
        self.state.write(&self.rotation, self.written)
    }

    fn told(&self, now: SystemTime) {
        let left = |at: SystemTime| at.duration_since(now).unwrap_or_default().as_secs();
        let (signing, roots) = (self.rotation.signing(), self.rotation.roots().len());
        let issuer = left(signing.not_after());
        match self.rotation.next() {
            Some((_, at)) => info!(
                roots,
                issuer_seconds_left = issuer,
                signing_moves_in_seconds = left(at),
                "another authority was found: its roots are handed out, and it signs when \
                 everybody has them"
            ),
            None => info!(roots, issuer_seconds_left = issuer, "the authority signs"),
        }
    }
}

/// A certificate as PEM.
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let certificate = pem::Pem::new("CERTIFICATE", certificate.as_ref());
    pem::encode_config(&certificate, config)
}

fn serial(leaf: &CertificateDer<'_>) -> String {
    x509_parser::parse_x509_certificate(leaf)
        .map(|(_, leaf)| format!("{:x}", leaf.serial))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
