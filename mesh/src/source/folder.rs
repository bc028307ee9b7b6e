//! A folder of Kubernetes YAML, read again whenever it changes.
//!
//! Changes are noticed by the kernel's notifications and, because those can be lost, by looking at
//! the folder every few seconds. Either way the folder itself is compared with what was read: a
//! notification only says when to look. Reading, parsing and compiling run on a blocking thread;
//! the data path sees nothing but the store changing.

mod documents;
mod files;
mod listing;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use tokio::sync::watch::{Receiver, Sender};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::diagnostic::Diagnostic;
use crate::{Changes, Params, Store, compile};

use files::{AGREE, Files, Look, Patience};
use watch::Watch;

/// How long the folder must be quiet before it is read. Writers save several files, and one file
/// in several steps; 20 ms gathers those and is not felt.
const QUIET: Duration = Duration::from_millis(20);
/// A writer that never pauses is read this often nevertheless.
const PATIENCE: Duration = Duration::from_millis(200);
/// How often the folder is looked at without being told to.
const RESCAN: Duration = Duration::from_secs(3);
/// How long it may take until two looks at a folder that changes see the same; what is seen then
/// counts.
const PATIENCE_TO_AGREE: Duration = Duration::from_millis(300);
/// How long the start waits for a file that cannot be read, and how often it tries.
const UNREADABLE: Duration = Duration::from_secs(3);
const TRY_AGAIN: Duration = Duration::from_millis(200);
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
    /// A file in it cannot be read when the daemon starts, and nobody knows which policies it holds.
    #[error(
        "cannot read a file of the source folder {dir}, and without the policies that it may hold \
         nothing is let through; is it readable for this user, or a link that leads nowhere? \
         {diagnostic}"
    )]
    File {
        /// The folder.
        dir: PathBuf,
        /// The file, and the system's reason.
        diagnostic: Box<Diagnostic>,
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

    /// Reads the folder and follows its changes until cancelled. Fails only when the folder, or a
    /// file in it, cannot be read at the start; later, the last state stays.
    pub async fn run(self, stop: CancellationToken) -> Result<(), FolderError> {
        let mut watch = Watch::new(&self.dir);
        let mut reader = Reader::new(self.dir.clone(), self.params, self.store);
        let patience = Instant::now() + UNREADABLE;
        loop {
            reader = reader.settle().await?;
            if let Some(source) = reader.files.failure.take() {
                return Err(FolderError::Unreadable {
                    dir: self.dir,
                    source,
                });
            }
            let Some(diagnostic) = reader.files.never_read() else {
                break;
            };
            if Instant::now() >= patience {
                let diagnostic = Box::new(diagnostic.clone());
                return Err(FolderError::File {
                    dir: self.dir,
                    diagnostic,
                });
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = sleep(TRY_AGAIN) => {}
            }
        }
        reader = reader.publish().await?;
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
            reader = reader.settle().await?.publish().await?;
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
    reported: BTreeSet<Diagnostic>,
    /// The files have changed since their model was published.
    changed: bool,
}

impl Reader {
    fn new(dir: PathBuf, params: Params, store: Store) -> Self {
        Self {
            files: Files::new(dir),
            params,
            store,
            reported: BTreeSet::new(),
            changed: false,
        }
    }

    /// Looks at the folder until two looks see the same.
    async fn settle(mut self) -> Result<Self, FolderError> {
        let deadline = Instant::now() + PATIENCE_TO_AGREE;
        loop {
            let patience = match Instant::now() < deadline {
                true => Patience::Some,
                false => Patience::None,
            };
            let (reader, look) = blocking(move || {
                let look = self.files.scan(&self.params, SystemTime::now(), patience);
                (self, look)
            })
            .await?;
            self = reader;
            self.changed |= look == Look::Changed;
            if look != Look::Unsettled {
                return Ok(self);
            }
            // A little more, for the clock that the looks are compared by is not this one.
            sleep(AGREE + Duration::from_millis(1)).await;
        }
    }

    /// Makes the model of what was read, if that changed, and puts it into the store.
    async fn publish(mut self) -> Result<Self, FolderError> {
        if !std::mem::take(&mut self.changed) {
            return Ok(self);
        }
        blocking(move || {
            let (model, diagnostics) = compile(&self.files.objects(), &self.params);
            self.log_diagnostics(&diagnostics);
            log_changes(&self.store.apply(model, diagnostics));
            self
        })
        .await
    }

    /// Each diagnostic once, when it appears.
    fn log_diagnostics(&mut self, diagnostics: &[Diagnostic]) {
        let now: BTreeSet<Diagnostic> = diagnostics.iter().cloned().collect();
        for diagnostic in now.difference(&self.reported) {
            match diagnostic.code {
                "unknown_kind" => info!(target: "mesh::source", "{diagnostic}"),
                "folder_unreadable" => error!(target: "mesh::source", "{diagnostic}"),
                _ => warn!(target: "mesh::source", "{diagnostic}"),
            }
        }
        self.reported = now;
    }
}

/// Not cancelled in between: each step is short, and its outcome is whole.
async fn blocking<T: Send + 'static>(
    step: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FolderError> {
    tokio::task::spawn_blocking(step)
        .await
        .map_err(FolderError::Failed)
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
