//! The roots: of the file, and those that came with certificates.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tracing::{info, warn};

use super::super::TrustBundle;

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

#[derive(Debug, Default)]
struct Roots {
    in_file: Vec<CertificateDer<'static>>,
    seen: Vec<(CertificateDer<'static>, SystemTime)>,
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

    /// These roots came with a certificate that is valid until `end`. All of them are taken, or none.
    pub(super) fn learn(
        &self,
        came: &[CertificateDer<'static>],
        end: SystemTime,
        now: SystemTime,
    ) -> Result<(), String> {
        if !came.is_empty() {
            TrustBundle::new(came.to_vec()).map_err(|error| error.to_string())?;
        }
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        let current = came.iter().chain(&roots.in_file).cloned();
        for root in current.collect::<Vec<_>>() {
            match roots.seen.iter_mut().find(|(seen, _)| *seen == root) {
                Some((_, until)) => *until = end.max(*until),
                None => roots.seen.push((root, end)),
            }
        }
        self.publish(&mut roots, now)
    }

    fn look(&self, now: SystemTime) -> Result<(), String> {
        let read = || -> io::Result<Vec<u8>> {
            let mut text = Vec::new();
            File::open(&self.file)?
                .take(FILE_MOST)
                .read_to_end(&mut text)?;
            Ok(text)
        };
        let found = read()
            .map_err(|error| error.to_string())
            .and_then(|text| TrustBundle::from_pem(&text).map_err(|error| error.to_string()));
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = found.map(|found| roots.in_file = found.roots().to_vec());
        outcome.and(self.publish(&mut roots, now))
    }

    fn publish(&self, roots: &mut Roots, now: SystemTime) -> Result<(), String> {
        roots.seen.retain(|(_, until)| *until > now);
        let seen = roots.seen.iter().map(|(root, _)| root);
        let all: Vec<_> = roots.in_file.iter().chain(seen).cloned().collect();
        if all.is_empty() {
            return Ok(());
        }
        let found = TrustBundle::new(all).map_err(|error| error.to_string())?;
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
        Ok(())
    }
}

#[cfg(test)]
mod tests;
