//! A trust bundle in a file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::{BundleError, TrustBundle};

/// How often files that may be replaced are looked at. They are small, and to read them finds every
/// way of replacing them: in place, by a rename, and by the symbolic links of mounted volumes, which
/// change somewhere above the file.
pub(in crate::certs) const LOOK: Duration = Duration::from_secs(1);
/// No bundle is larger.
const MAX_FILE: u64 = 1 << 20;

/// A trust bundle in a PEM file, which is read again whenever the file is replaced. A file that is
/// empty, gone or not understood leaves the last good bundle in force, and is reported.
#[derive(Debug)]
pub struct BundleFile {
    path: PathBuf,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

impl BundleFile {
    /// Reads the file for the first time.
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        let bundle = watch::Sender::new(Arc::new(read(path)?));
        Ok(Self {
            path: path.to_owned(),
            bundle,
        })
    }

    /// The roots, now and whenever they change.
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// Follows the file. Never returns.
    pub async fn run(&self) {
        let mut complaint = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let complains = self.look().err().map(|error| error.to_string());
            if complains != complaint {
                if let Some(error) = &complains {
                    warn!(
                        target: "mesh::certs",
                        file = %self.path.display(),
                        error,
                        "the trust bundle cannot be read again; the last good one stays"
                    );
                }
                complaint = complains;
            }
        }
    }

    fn look(&self) -> Result<(), BundleError> {
        let found = read(&self.path)?;
        self.bundle.send_if_modified(|bundle| {
            let changed = **bundle != found;
            if changed {
                info!(
                    target: "mesh::certs",
                    file = %self.path.display(),
                    roots = found.roots().len(),
                    "the trust bundle has changed"
                );
                *bundle = Arc::new(found);
            }
            changed
        });
        Ok(())
    }
}

fn read(path: &Path) -> Result<TrustBundle, BundleError> {
    let read = || {
        let mut text = Vec::new();
        File::open(path)?.take(MAX_FILE).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| BundleError::File {
        file: path.to_owned(),
        source,
    })?;
    TrustBundle::from_pem(&text)
}
