//! The kernel's notifications, reduced to "something changed".

use std::path::Path;
use std::sync::Arc;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::warn;

/// Watches a folder and what is below it.
pub(super) struct Watch {
    changed: Arc<Notify>,
    watcher: Option<RecommendedWatcher>,
    watched: Option<u64>,
}

impl Watch {
    pub(super) fn new(dir: &Path) -> Self {
        let mut watch = Self {
            changed: Arc::new(Notify::new()),
            watcher: None,
            watched: None,
        };
        watch.renew(dir);
        watch
    }

    /// Without notifications the caller has to look more often.
    pub(super) fn is_working(&self) -> bool {
        self.watcher.is_some()
    }

    /// Waits until something changed since the last call.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Watches anew if the folder is another one than the one that is watched: a watch follows
    /// the folder, not its name.
    pub(super) fn renew(&mut self, dir: &Path) {
        let now = identity(dir);
        if self.watcher.is_some() && now == self.watched {
            return;
        }
        self.watcher = None;
        self.watched = now;
        if now.is_none() {
            return;
        }
        match self.watcher(dir) {
            Ok(watcher) => self.watcher = Some(watcher),
            Err(error) => warn!(
                target: "mesh::source",
                %error,
                "no notifications for {}; it is looked at every second instead",
                dir.display()
            ),
        }
    }

    fn watcher(&self, dir: &Path) -> notify::Result<RecommendedWatcher> {
        let changed = self.changed.clone();
        let mut watcher =
            notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
                // Reading makes access events itself; following those would never end.
                if !matches!(&event, Ok(event) if matches!(event.kind, EventKind::Access(_))) {
                    changed.notify_one();
                }
            })?;
        watcher.watch(dir, RecursiveMode::Recursive)?;
        Ok(watcher)
    }
}

#[cfg(unix)]
fn identity(dir: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(dir).ok().map(|meta| meta.ino())
}
