//! A folder of Kubernetes YAML, read again whenever it changes.
//!
//! Changes are noticed by the kernel's notifications and, because those can be lost, by looking at
//! the folder every few seconds. Either way the folder itself is compared with what was read: a
//! notification only says when to look. Reading, parsing and compiling run on a blocking thread;
//! the data path sees nothing but the store changing.

mod documents;
mod files;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::sync::watch::{Receiver, Sender};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::problem::Problem;
use crate::{Changes, Params, Store, compile};

use files::Files;
use watch::Watch;

/// How long the folder must be quiet before it is read. Writers save several files, and one file
/// in several steps; 20 ms gathers those and is not felt.
const QUIET: Duration = Duration::from_millis(20);
/// A writer that never pauses is read this often nevertheless.
const PATIENCE: Duration = Duration::from_millis(200);
/// How often the folder is looked at without being told to.
const RESCAN: Duration = Duration::from_secs(3);
/// The same while the kernel gives no notifications.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);

/// Reads a folder into a store and keeps it up to date.
#[derive(Debug)]
pub struct FolderSource {
    dir: PathBuf,
    params: Params,
    store: Store,
    loaded: Sender<bool>,
}

/// Why a folder cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It is not there, or may not be read, when the daemon starts.
    #[error("cannot read the source folder {dir}; is the path right?")]
    Unreadable {
        /// The folder.
        dir: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A bug: reading panicked.
    #[error("reading the source folder failed")]
    Failed(#[source] tokio::task::JoinError),
}

impl FolderSource {
    /// A source for this folder; nothing is read yet.
    pub fn new(dir: impl Into<PathBuf>, params: Params, store: Store) -> Self {
        Self {
            dir: dir.into(),
            params,
            store,
            loaded: Sender::new(false),
        }
    }

    /// Becomes true when the folder has been read once and the store holds its model.
    pub fn loaded(&self) -> Receiver<bool> {
        self.loaded.subscribe()
    }

    /// Reads the folder and follows its changes until cancelled. Fails only when the folder
    /// cannot be read at the start; later, the last state stays.
    pub async fn run(self, stop: CancellationToken) -> Result<(), FolderError> {
        let mut watch = Watch::new(&self.dir);
        let mut reader = Reader::new(self.dir.clone(), self.params, self.store);
        reader = reader.read().await?;
        if let Some(source) = reader.files.failure.take() {
            return Err(FolderError::Unreadable {
                dir: self.dir,
                source,
            });
        }
        self.loaded.send_replace(true);
        while !stop.is_cancelled() {
            let rescan = if watch.is_working() {
                RESCAN
            } else {
                RESCAN_UNWATCHED
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = settled(&mut watch) => {}
                () = sleep_until(Instant::now() + rescan) => watch.renew(&self.dir),
            }
            reader = reader.read().await?;
        }
        Ok(())
    }
}

/// Waits for a change, and then until the folder is quiet.
async fn settled(watch: &mut Watch) {
    watch.changed().await;
    let patience = Instant::now() + PATIENCE;
    while Instant::now() < patience {
        let quiet = patience.min(Instant::now() + QUIET);
        if timeout_at(quiet, watch.changed()).await.is_err() {
            return;
        }
    }
}

/// All that reading needs; it moves to the blocking thread and back.
struct Reader {
    files: Files,
    params: Params,
    store: Store,
    reported: BTreeSet<Problem>,
}

impl Reader {
    fn new(dir: PathBuf, params: Params, store: Store) -> Self {
        Self {
            files: Files::new(dir),
            params,
            store,
            reported: BTreeSet::new(),
        }
    }

    /// One look at the folder. Not cancelled in between: it is short, and its outcome is whole.
    async fn read(mut self) -> Result<Self, FolderError> {
        let read = move || {
            self.look();
            self
        };
        tokio::task::spawn_blocking(read)
            .await
            .map_err(FolderError::Failed)
    }

    fn look(&mut self) {
        if !self.files.scan(&self.params, SystemTime::now()) {
            return;
        }
        let (model, problems) = compile(&self.files.objects(), &self.params);
        self.log_problems(&problems);
        log_changes(&self.store.apply(model, problems));
    }

    /// Each problem once, when it appears.
    fn log_problems(&mut self, problems: &[Problem]) {
        let now: BTreeSet<Problem> = problems.iter().cloned().collect();
        for problem in now.difference(&self.reported) {
            match problem.code {
                "unknown_kind" => info!(target: "mesh::source", "{problem}"),
                "folder_unreadable" => error!(target: "mesh::source", "{problem}"),
                _ => warn!(target: "mesh::source", "{problem}"),
            }
        }
        self.reported = now;
    }
}

fn log_changes(changes: &Changes) {
    if changes.is_empty() {
        return;
    }
    info!(
        target: "mesh::source",
        added = changes.added.len(),
        removed = changes.removed.len(),
        changed = changes.changed.len(),
        services = changes.services.len(),
        "model updated"
    );
}

#[cfg(test)]
mod tests;
