//! The roots: of the file, and those that came with certificates.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tracing::{info, warn};

use super::super::bundle::MAX_ROOTS;
use super::super::{BundleError, TrustBundle};

/// How often the file is looked at.
const LOOK: Duration = Duration::from_secs(1);
const FILE_MOST: u64 = 1 << 20;

/// Whom peers, and the authority itself, are checked against.
///
/// A root is trusted while it is in the file, and after it came with a certificate (or while one
/// came) until the last certificate of that time has expired: peers have certificates of the same
/// time, and may still show them.
#[derive(Debug)]
pub(super) struct Trust {
    file: PathBuf,
    roots: Mutex<Roots>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

/// Together no more than a bundle holds.
#[derive(Clone, Debug, Default)]
struct Roots {
    in_file: Vec<CertificateDer<'static>>,
    /// And until when each is trusted, whatever the file says.
    seen: Vec<(CertificateDer<'static>, SystemTime)>,
}

/// Roots that came with an answer, until it is known whether that is any good.
pub(super) struct Lesson<'a> {
    trust: &'a Trust,
    known: MutexGuard<'a, Roots>,
    roots: Roots,
    bundle: TrustBundle,
}

impl Trust {
    pub(super) fn new(file: PathBuf) -> Self {
        let trust = Self {
            file,
            roots: Mutex::default(),
            bundle: watch::Sender::default(),
        };
        if let Err(error) = trust.look(SystemTime::now()) {
            trust.complain(&error);
        }
        trust
    }

    pub(super) fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// Follows the file. Never returns.
    pub(super) async fn run(&self) {
        let mut complaint = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let complains = self.look(SystemTime::now()).err();
            if let Some(error) = complains.as_ref().filter(|_| complains != complaint) {
                self.complain(error);
            }
            complaint = complains;
        }
    }

    fn complain(&self, error: &impl ToString) {
        warn!(
            target: "mesh::certs",
            file = %self.file.display(),
            error = error.to_string(),
            "the roots of the certificate authority cannot be read; what was good stays"
        );
    }

    /// The roots for a new connection; those of the file as it is now, if it can be read.
    pub(super) fn to_connect(&self) -> io::Result<Arc<TrustBundle>> {
        let looked = self.look(SystemTime::now());
        let bundle = self.bundle.borrow().clone();
        match (bundle.is_empty(), looked) {
            (false, _) => Ok(bundle),
            (true, looked) => {
                let error = looked.err().unwrap_or_else(|| "it is empty".to_owned());
                let message = format!(
                    "no root to recognise it by in {}: {error}",
                    self.file.display()
                );
                Err(io::Error::other(message))
            }
        }
    }

    /// What is to be learned of roots that came with a certificate valid until `end`: all of them, or
    /// none. Nothing is learned before it is [taken](Lesson::take), and nobody else learns meanwhile.
    pub(super) fn lesson(
        &self,
        came: &[CertificateDer<'static>],
        end: SystemTime,
        now: SystemTime,
    ) -> Result<Lesson<'_>, BundleError> {
        let known = lock(&self.roots);
        let mut roots = known.clone();
        roots.forget(now);
        for root in came.iter().chain(&known.in_file) {
            match roots.seen.iter_mut().find(|(seen, _)| seen == root) {
                Some((_, until)) => *until = end.max(*until),
                None => roots.seen.push((root.clone(), end)),
            }
        }
        roots.make_room(came);
        let bundle = roots.bundle()?;
        Ok(Lesson {
            trust: self,
            known,
            roots,
            bundle,
        })
    }

    fn look(&self, now: SystemTime) -> Result<(), String> {
        let found = self.read();
        let mut known = lock(&self.roots);
        let mut roots = known.clone();
        roots.forget(now);
        let outcome = found.map(|found| {
            roots.in_file = found.roots().to_vec();
            roots.make_room(&[]);
        });
        if let Ok(bundle) = roots.bundle() {
            *known = roots;
            self.publish(bundle);
        }
        outcome
    }

    fn read(&self) -> Result<TrustBundle, String> {
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            File::open(&self.file)?
                .take(FILE_MOST)
                .read_to_end(&mut text)?;
            Ok(text)
        };
        let text = read().map_err(|error| error.to_string())?;
        TrustBundle::from_pem(&text).map_err(|error| error.to_string())
    }

    fn publish(&self, found: TrustBundle) {
        self.bundle.send_if_modified(|bundle| {
            let changed = **bundle != found;
            if changed {
                info!(
                    target: "mesh::certs",
                    roots = found.roots().len(),
                    "the roots of the mesh have changed"
                );
                *bundle = Arc::new(found);
            }
            changed
        });
    }
}

impl Lesson<'_> {
    /// Whom peers would be checked against.
    pub(super) fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Learns it.
    pub(super) fn take(mut self) {
        *self.known = self.roots;
        self.trust.publish(self.bundle);
    }
}

impl Roots {
    /// What no certificate that is valid now came with.
    fn forget(&mut self, now: SystemTime) {
        self.seen.retain(|(_, until)| *until > now);
    }

    /// There is a limit to what a bundle holds, and an authority that hands out ever new roots is
    /// not to stop renewals by reaching it: the file and what came last stay, and of the others
    /// those are let go first whose certificates expire first.
    fn make_room(&mut self, came: &[CertificateDer<'static>]) {
        let in_file = &self.in_file;
        let other = |root: &CertificateDer<'static>| !in_file.contains(root);
        while in_file.len() + self.seen.iter().filter(|(root, _)| other(root)).count() > MAX_ROOTS {
            let seen = self.seen.iter().enumerate();
            let spare = seen.filter(|(_, (root, _))| other(root) && !came.contains(root));
            let Some((first, _)) = spare.min_by_key(|(_, (_, until))| *until) else {
                break;
            };
            self.seen.swap_remove(first);
            warn!(
                target: "mesh::certs",
                most = MAX_ROOTS,
                "more roots than a bundle holds; the one whose certificates expire first is let go"
            );
        }
    }

    fn bundle(&self) -> Result<TrustBundle, BundleError> {
        let seen = self.seen.iter().map(|(root, _)| root);
        TrustBundle::new(self.in_file.iter().chain(seen).cloned())
    }
}

/// What is behind the lock is replaced as a whole.
fn lock(roots: &Mutex<Roots>) -> MutexGuard<'_, Roots> {
    roots.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
