//! Which pods' namespaces have changed: debounced notifications of changes of rules and routes.

use std::time::Duration;

use mesh::WorkloadUid;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::capture::NetnsWatch;
use crate::netns::Netns;

/// Changes in one namespace within this time count as one: the kernel sends several notifications
/// for one transaction.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Pause after a change before the next one of the same namespace is reported, so that a program
/// that changes rules in a pod all the time cannot keep the daemon busy. A verification with a
/// listing takes 5 ms.
const COOLDOWN: Duration = Duration::from_millis(250);

/// Changed pods that may be queued for the reconciler. A full queue delays the reports.
const MAX_QUEUED_CHANGES: usize = 1024;

/// Listens for changes in the namespaces of enrolled pods.
pub(super) struct ChangeListener {
    tasks: JoinSet<()>,
    sender: mpsc::Sender<WorkloadUid>,
    changes: mpsc::Receiver<WorkloadUid>,
}

impl ChangeListener {
    pub(super) fn new() -> Self {
        let (sender, changes) = mpsc::channel(MAX_QUEUED_CHANGES);
        Self {
            tasks: JoinSet::new(),
            sender,
            changes,
        }
    }

    /// Reports changes in the pod's namespace until the returned guard is dropped. A pod without a
    /// guard is only verified periodically.
    pub(super) fn listen(&mut self, netns: &Netns, uid: &WorkloadUid) -> Option<DropGuard> {
        let watch = match NetnsWatch::new(netns) {
            Ok(watch) => watch,
            Err(error) => {
                let consequence =
                    "changes in its namespace are found only by periodic verification";
                tracing::warn!(pod = %uid, %error, consequence, "cannot watch the pod's namespace");
                return None;
            }
        };
        let (uid, sender, stop) = (uid.clone(), self.sender.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let report = async move {
            while watch.changed().await.is_ok() {
                sleep(DEBOUNCE).await;
                if sender.send(uid.clone()).await.is_err() {
                    return;
                }
                sleep(COOLDOWN).await;
            }
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = report => {}
            }
        });
        Some(stop.drop_guard())
    }

    /// Waits for the next pod whose namespace has changed. Cancel safe.
    pub(super) async fn next(&mut self) -> WorkloadUid {
        loop {
            tokio::select! {
                biased;
                Some(uid) = self.changes.recv() => return uid,
                Some(_) = self.tasks.join_next() => {}
                // Not reached: `self.sender` keeps the channel open.
                else => std::future::pending().await,
            }
        }
    }

    /// Stops to listen.
    pub(super) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }
}
