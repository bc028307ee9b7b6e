//! Which roots does a client of a CA trust: those of the file, and those of earlier responses?

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::certs::trust_bundle::{BundleError, MAX_ROOTS, TrustBundle};

/// How often the file is read.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The roots that peers and the CA itself are verified against.
///
/// A root is trusted while it is in the file. It is also trusted after it came with a certificate,
/// or was in the file when one came, until the last such certificate has expired: peers received
/// certificates at the same time, and may still present them.
#[derive(Debug)]
pub(super) struct RootStore {
    file: PathBuf,
    roots: Mutex<Roots>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

/// At most [`MAX_ROOTS`] together.
#[derive(Clone, Debug, Default)]
struct Roots {
    from_file: Vec<CertificateDer<'static>>,
    /// Roots of responses, and until when each is trusted if it is not in the file.
    from_responses: Vec<(CertificateDer<'static>, SystemTime)>,
}

/// The roots after a response, not stored until [committed](Self::commit).
pub(super) struct PendingRoots<'a> {
    store: &'a RootStore,
    current: MutexGuard<'a, Roots>,
    roots: Roots,
    bundle: TrustBundle,
}

impl RootStore {
    pub(super) fn new(file: PathBuf) -> Self {
        let store = Self {
            file,
            roots: Mutex::default(),
            bundle: watch::Sender::default(),
        };
        if let Err(error) = store.reload(SystemTime::now()) {
            store.warn(&error);
        }
        store
    }

    pub(super) fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// Reloads the file periodically. Never returns.
    pub(super) async fn watch_file(&self) {
        let mut last_error = None;
        loop {
            tokio::time::sleep(RELOAD_INTERVAL).await;
            let error = self.reload(SystemTime::now()).err();
            if let Some(error) = error.as_ref().filter(|_| error != last_error) {
                self.warn(error);
            }
            last_error = error;
        }
    }

    fn warn(&self, error: &str) {
        warn!(
            target: "mesh::certs",
            file = %self.file.display(),
            error,
            "cannot read the roots of the certificate authority; the previous ones stay in use"
        );
    }

    /// The roots for a new connection to the CA, with the current content of the file if it can be
    /// read.
    pub(super) fn for_connection(&self) -> io::Result<Arc<TrustBundle>> {
        let reloaded = self.reload(SystemTime::now());
        let bundle = self.bundle.borrow().clone();
        if !bundle.is_empty() {
            return Ok(bundle);
        }
        let error = reloaded.err().unwrap_or_else(|| "it is empty".to_owned());
        let file = self.file.display();
        let message =
            format!("no root to verify the certificate authority with in {file}: {error}");
        Err(io::Error::other(message))
    }

    /// Prepares to add all roots of a response, whose certificate expires at `expiry`. Nothing
    /// changes before [`PendingRoots::commit`]. Until then, other changes of the roots block.
    ///
    /// # Errors
    /// Fails if one of the roots is not usable, or if there are too many.
    pub(super) fn prepare(
        &self,
        received: &[CertificateDer<'static>],
        expiry: SystemTime,
        now: SystemTime,
    ) -> Result<PendingRoots<'_>, BundleError> {
        let current = lock(&self.roots);
        let mut roots = current.clone();
        roots.remove_expired(now);
        for root in received.iter().chain(&current.from_file) {
            match roots.from_responses.iter_mut().find(|(r, _)| r == root) {
                Some((_, until)) => *until = expiry.max(*until),
                None => roots.from_responses.push((root.clone(), expiry)),
            }
        }
        roots.evict_excess(received);
        let bundle = roots.bundle()?;
        Ok(PendingRoots {
            store: self,
            current,
            roots,
            bundle,
        })
    }

    /// Reads the file and removes expired roots. If the file cannot be read, its previous roots
    /// stay.
    fn reload(&self, now: SystemTime) -> Result<(), String> {
        let read = self.read_file();
        let mut current = lock(&self.roots);
        let mut roots = current.clone();
        roots.remove_expired(now);
        let outcome = read.map(|bundle| {
            roots.from_file = bundle.roots().to_vec();
            roots.evict_excess(&[]);
        });
        if let Ok(bundle) = roots.bundle() {
            *current = roots;
            self.publish(bundle);
        }
        outcome
    }

    fn read_file(&self) -> Result<TrustBundle, String> {
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            File::open(&self.file)?
                .take(MAX_FILE_BYTES)
                .read_to_end(&mut text)?;
            Ok(text)
        };
        let text = read().map_err(|error| error.to_string())?;
        TrustBundle::from_pem(&text).map_err(|error| error.to_string())
    }

    fn publish(&self, bundle: TrustBundle) {
        self.bundle.send_if_modified(|current| {
            let is_modified = **current != bundle;
            if is_modified {
                info!(
                    target: "mesh::certs",
                    roots = bundle.roots().len(),
                    "the roots of the certificate authority have changed"
                );
                *current = Arc::new(bundle);
            }
            is_modified
        });
    }
}

impl PendingRoots<'_> {
    /// The bundle after the commit.
    pub(super) fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Stores and publishes the roots.
    pub(super) fn commit(mut self) {
        *self.current = self.roots;
        self.store.publish(self.bundle);
    }
}

impl Roots {
    /// Removes roots of responses whose certificates have all expired.
    fn remove_expired(&mut self, now: SystemTime) {
        self.from_responses.retain(|(_, until)| *until > now);
    }

    /// Enforces the limit of a bundle, so that a CA that sends ever new roots cannot stop renewals.
    /// The roots of the file and of the last response stay. Of the others, those are removed first
    /// whose certificates expire first.
    fn evict_excess(&mut self, last_response: &[CertificateDer<'static>]) {
        let from_file = &self.from_file;
        let is_extra = |root: &CertificateDer<'static>| !from_file.contains(root);
        let count_extra = |roots: &[(CertificateDer<'static>, SystemTime)]| {
            roots.iter().filter(|(root, _)| is_extra(root)).count()
        };
        while from_file.len() + count_extra(&self.from_responses) > MAX_ROOTS {
            let candidates = self
                .from_responses
                .iter()
                .enumerate()
                .filter(|(_, (root, _))| is_extra(root) && !last_response.contains(root));
            let Some((first, _)) = candidates.min_by_key(|(_, (_, until))| *until) else {
                break;
            };
            self.from_responses.swap_remove(first);
            warn!(
                target: "mesh::certs",
                limit = MAX_ROOTS,
                "too many roots; removed the one whose certificates expire first"
            );
        }
    }

    fn bundle(&self) -> Result<TrustBundle, BundleError> {
        let received = self.from_responses.iter().map(|(root, _)| root);
        TrustBundle::new(self.from_file.iter().chain(received).cloned())
    }
}

/// Ignores poisoning: the value is only ever replaced as a whole.
fn lock(roots: &Mutex<Roots>) -> MutexGuard<'_, Roots> {
    roots.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
