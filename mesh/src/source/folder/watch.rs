//! Watches a folder tree for changes (inotify).

use std::path::Path;
use std::sync::Arc;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::warn;

/// Notifies of any change in a folder or below it.
pub(super) struct FolderWatch {
    changed: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
    /// The inode of the watched folder.
    watched: Option<u64>,
}

impl FolderWatch {
    pub(super) fn new(dir: &Path) -> Self {
        let mut watch = Self {
            changed: Arc::new(Notify::new()),
            watcher: None,
            watched: None,
        };
        watch.renew(dir);
        watch
    }

    /// Whether notifications work. Without them the caller scans more often.
    pub(super) fn is_working(&self) -> bool {
        self.watcher.is_some()
    }

    /// Waits for a change since the last call.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Watches again if the folder at the path was replaced: a watch follows the inode, not the
    /// path.
    pub(super) fn renew(&mut self, dir: &Path) {
        let inode = inode(dir);
        if self.watcher.is_some() && inode == self.watched {
            return;
        }
        self.watcher = None;
        self.watched = inode;
        if inode.is_none() {
            return;
        }
        match self.watcher(dir) {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => warn!(
                target: "mesh::source",
                %error,
                "cannot watch {} for changes; it is scanned every second instead",
                dir.display()
            ),
        }
    }

    fn watcher(&self, dir: &Path) -> notify::Result<RecommendedWatcher> {
        let changed = self.changed.clone();
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // A scan causes access events itself; reacting to them would never end.
                if !matches!(&event, Ok(event) if matches!(event.kind, EventKind::Access(_))) {
                    changed.notify_one();
                }
            })?;
        watcher.watch(dir, RecursiveMode::Recursive)?;
        Ok(watcher)
    }
}

#[cfg(unix)]
fn inode(dir: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(dir).ok().map(|meta| meta.ino())
}
