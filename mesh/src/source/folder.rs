//! Reads a folder of Kubernetes YAML into the store, and again whenever the folder changes.
//!
//! Kernel notifications trigger a scan and, because notifications can be lost, so does a timer. A
//! scan always compares the folder with the last read content. Reading, parsing and compiling run on
//! a blocking thread; the data path only reads the store.

mod file;
mod last_good;
mod listing;
mod scan;
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

use scan::{Debounce, Files, STABLE_FOR, ScanResult};
use watch::FolderWatch;

/// How long the folder must be without changes before it is read. Writers save several files, and
/// one file in several steps; 20 ms covers those and is too short to notice.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// The longest debounce: the folder is read this often under a writer that never pauses.
const MAX_DEBOUNCE: Duration = Duration::from_millis(200);
/// Interval of scans without a notification.
const RESCAN: Duration = Duration::from_secs(3);
/// Interval of scans while the kernel gives no notifications.
const RESCAN_UNWATCHED: Duration = Duration::from_secs(1);
/// How long two consecutive scans may disagree; then the changes of the next scan count at once.
const SETTLE_DEADLINE: Duration = Duration::from_millis(300);
/// How long the start waits for a file that cannot be read.
const STARTUP_DEADLINE: Duration = Duration::from_secs(3);
/// Interval of the attempts to read that file.
const STARTUP_RETRY: Duration = Duration::from_millis(200);

/// Reads a folder into a store and keeps the store up to date.
#[derive(Debug)]
pub struct FolderSource {
    dir: PathBuf,
    params: Params,
    store: Store,
    loaded: Sender<bool>,
}

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The folder does not exist or cannot be read when the daemon starts.
    #[error("cannot read the source folder {dir}; check the path and its permissions")]
    Unreadable {
        /// The folder.
        dir: PathBuf,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// A file of the folder cannot be read when the daemon starts, so its policies are unknown.
    #[error(
        "cannot read a file of the source folder {dir}: {diagnostic}; it may hold policies, so no \
         traffic is allowed without it. Check its permissions, and whether it is a dangling link"
    )]
    File {
        /// The folder.
        dir: PathBuf,
        /// The file and the error of the system.
        diagnostic: Box<Diagnostic>,
    },
    /// Reading panicked, which is a bug.
    #[error("reading the source folder panicked")]
    Failed(#[source] tokio::task::JoinError),
}

impl FolderSource {
    /// A source for this folder. Reads nothing before [`FolderSource::run`].
    pub fn new(dir: impl Into<PathBuf>, params: Params, store: Store) -> Self {
        Self {
            dir: dir.into(),
            params,
            store,
            loaded: Sender::new(false),
        }
    }

    /// Becomes true when the store holds the first model of the folder.
    pub fn loaded(&self) -> Receiver<bool> {
        self.loaded.subscribe()
    }

    /// Reads the folder and follows its changes until cancelled.
    ///
    /// # Errors
    ///
    /// The folder or one of its files cannot be read at the start. Later the last state stays in
    /// use.
    pub async fn run(self, stop: CancellationToken) -> Result<(), FolderError> {
        let mut watch = FolderWatch::new(&self.dir);
        let mut reloader = Reloader::new(self.dir.clone(), self.params, self.store);
        let deadline = Instant::now() + STARTUP_DEADLINE;
        loop {
            reloader = reloader.scan().await?;
            if let Some(source) = reloader.files.failure.take() {
                return Err(FolderError::Unreadable {
                    dir: self.dir,
                    source,
                });
            }
            let Some(diagnostic) = reloader.files.never_read() else {
                break;
            };
            if Instant::now() >= deadline {
                let diagnostic = Box::new(diagnostic.clone());
                return Err(FolderError::File {
                    dir: self.dir,
                    diagnostic,
                });
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = sleep(STARTUP_RETRY) => {}
            }
        }
        reloader = reloader.publish().await?;
        self.loaded.send_replace(true);
        while !stop.is_cancelled() {
            let rescan = if watch.is_working() {
                RESCAN
            } else {
                RESCAN_UNWATCHED
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = debounced_change(&mut watch) => {}
                () = sleep_until(Instant::now() + rescan) => watch.renew(&self.dir),
            }
            reloader = reloader.scan().await?.publish().await?;
        }
        Ok(())
    }
}

/// Waits for a change, and then until there is none for [`DEBOUNCE`].
async fn debounced_change(watch: &mut FolderWatch) {
    watch.changed().await;
    let deadline = Instant::now() + MAX_DEBOUNCE;
    while Instant::now() < deadline {
        let quiet = deadline.min(Instant::now() + DEBOUNCE);
        if timeout_at(quiet, watch.changed()).await.is_err() {
            return;
        }
    }
}

/// Scans the folder and publishes its model. Moves to the blocking thread and back.
struct Reloader {
    files: Files,
    params: Params,
    store: Store,
    /// The diagnostics that are logged already.
    logged: BTreeSet<Diagnostic>,
    /// The files changed since the last published model.
    is_changed: bool,
}

impl Reloader {
    fn new(dir: PathBuf, params: Params, store: Store) -> Self {
        Self {
            files: Files::new(dir),
            params,
            store,
            logged: BTreeSet::new(),
            is_changed: false,
        }
    }

    /// Scans the folder until two scans find the same changes.
    async fn scan(mut self) -> Result<Self, FolderError> {
        let deadline = Instant::now() + SETTLE_DEADLINE;
        loop {
            let debounce = match Instant::now() < deadline {
                true => Debounce::Required,
                false => Debounce::Skipped,
            };
            let (reloader, result) = blocking(move || {
                let now = SystemTime::now();
                let result = self.files.scan(&self.params, now, debounce);
                (self, result)
            })
            .await?;
            self = reloader;
            self.is_changed |= result == ScanResult::Changed;
            if result != ScanResult::Unsettled {
                return Ok(self);
            }
            // One millisecond more: scans are compared by the wall clock, not by this one.
            sleep(STABLE_FOR + Duration::from_millis(1)).await;
        }
    }

    /// Compiles the files into a model and stores it, if the files changed.
    async fn publish(mut self) -> Result<Self, FolderError> {
        if !std::mem::take(&mut self.is_changed) {
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

    /// Logs each diagnostic once, when it appears.
    fn log_diagnostics(&mut self, diagnostics: &[Diagnostic]) {
        let now: BTreeSet<Diagnostic> = diagnostics.iter().cloned().collect();
        for diagnostic in now.difference(&self.logged) {
            match diagnostic.code {
                "unknown_kind" => info!(target: "mesh::source", "{diagnostic}"),
                "folder_unreadable" => error!(target: "mesh::source", "{diagnostic}"),
                _ => warn!(target: "mesh::source", "{diagnostic}"),
            }
        }
        self.logged = now;
    }
}

/// Runs a step on a blocking thread. A step is short and never cancelled.
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
