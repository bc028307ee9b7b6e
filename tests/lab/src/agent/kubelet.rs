//! The kubelet's part for one pod, from its sandbox to its end.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Container;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::World;
use super::container::{self, Containers};
use super::event::Event;
use super::{daemon, sandbox};
use crate::model::Key;
use crate::model::pod::{Phase, PodEntry, Progress};
use crate::netns;

/// After this long an answer is no longer expected at any moment. The pod goes on waiting: a daemon
/// that comes back must find it.
const ENROLMENT_DEADLINE: Duration = Duration::from_secs(10);

/// How often the daemon is asked meanwhile.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// ... and once the deadline has passed.
const ASK_SELDOM: Duration = Duration::from_millis(500);

/// How long killed processes may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(3);

/// What is wanted of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    /// Opted in: containers wait until the daemon has enrolled the pod.
    pub(super) meshed: bool,
    /// To go, with this grace period in seconds.
    pub(super) delete: Option<u64>,
}

/// One pod, as its task sees it.
pub(super) struct Pod {
    pub(super) world: Rc<World>,
    pub(super) key: Key,
    pub(super) entry: PodEntry,
    pub(super) node_netns: String,
    progress: RefCell<Progress>,
    pub(super) containers: RefCell<Containers>,
    /// Woken when `containers` has changed.
    pub(super) changed: Notify,
}

impl Pod {
    pub(super) fn new(world: &Rc<World>, key: Key, entry: &PodEntry, node_netns: String) -> Self {
        Self {
            world: Rc::clone(world),
            key,
            entry: entry.clone(),
            node_netns,
            progress: RefCell::default(),
            containers: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// Looks after the pod until it is deleted and gone.
    pub(super) async fn run(self, wishes: watch::Receiver<Wish>) {
        let pod = Rc::new(self);
        let mut tasks = JoinSet::new();
        let mut deletion = wishes.clone();
        tokio::select! {
            result = pod.live(wishes.clone(), &mut tasks) => {
                if let Err(error) = result {
                    pod.say(format!("{error:#}")).await;
                }
            }
            _ = deletion.wait_for(|wish| wish.delete.is_some()) => {}
        }
        // The agent drops the wishes only with the whole lab, which aborts this task.
        if deletion
            .wait_for(|wish| wish.delete.is_some())
            .await
            .is_ok()
        {
            pod.end(tasks).await;
        }
    }

    /// Sandbox, enrolment, containers, and reports of how they are. Returns only on failure.
    async fn live(
        self: &Rc<Self>,
        wishes: watch::Receiver<Wish>,
        tasks: &mut JoinSet<()>,
    ) -> Result<()> {
        let dir = self.dir();
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        sandbox::pod(&self.world.dir, &self.entry, &self.node_netns)
            .await
            .context("sandbox")?;
        self.update(|progress| progress.sandbox = true).await;
        if self.world.daemon.is_some() {
            self.enrolled(wishes.clone()).await;
        }
        let spec = self.entry.spec();
        for init in spec.init_containers.iter().flatten() {
            container::init(self, init, wishes.clone()).await?;
        }
        *self.containers.borrow_mut() = Containers::new(&spec);
        for (index, container) in spec.containers.iter().enumerate() {
            tasks.spawn_local(container::supervise(
                Rc::clone(self),
                index,
                container.clone(),
                wishes.clone(),
            ));
        }
        loop {
            let sum = self.containers.borrow().sum();
            self.update(|progress| {
                (progress.phase, progress.ready) = (sum.phase, sum.ready);
                (progress.restarts, progress.message) = (sum.restarts, sum.message);
            })
            .await;
            self.changed.notified().await;
        }
    }

    /// Waits until the daemon of the node has enrolled the pod, for as long as it is opted in.
    async fn enrolled(&self, mut wishes: watch::Receiver<Wish>) {
        let since = Instant::now();
        loop {
            if !wishes.borrow_and_update().meshed {
                break;
            }
            let state = daemon::workload_state(&self.node_netns, &self.entry.uid).await;
            if state.as_deref() == Some("enrolled") {
                break;
            }
            let late = since.elapsed() > ENROLMENT_DEADLINE;
            let known = state.as_deref().unwrap_or("unknown to it");
            self.say(format!(
                "containers not started: the node's daemon has not enrolled the pod ({known})"
            ))
            .await;
            let pause = if late { ASK_SELDOM } else { ASK_AGAIN };
            // A change of mind ends the pause.
            let _ = tokio::time::timeout(pause, wishes.changed()).await;
        }
        self.say(String::new()).await;
    }

    /// SIGTERM has reached the containers by the same wish; when they have ended, or were killed at
    /// the end of the grace period, everything else goes.
    async fn end(&self, mut tasks: JoinSet<()>) {
        while tasks.join_next().await.is_some() {}
        self.update(|progress| {
            progress.ready = false;
            if progress.phase == Phase::Running {
                progress.phase = Phase::Succeeded;
            }
        })
        .await;
        if !self.entry.host_network() && netns::exists(&self.entry.netns) {
            // What was started by exec, and what daemonized itself.
            if let Err(error) = netns::Held::open(&[&self.entry.netns]).kill_all(KILL_DEADLINE) {
                eprintln!("pod {}/{}: {error:#}", self.key.0, self.key.1);
            }
            if let Err(error) =
                sandbox::remove_pod(&self.world.dir, &self.entry, &self.node_netns).await
            {
                eprintln!("pod {}/{}: {error:#}", self.key.0, self.key.1);
            }
        }
        let _ = std::fs::remove_dir_all(self.dir());
        let gone = Event::PodGone {
            key: self.key.clone(),
            uid: self.entry.uid.clone(),
        };
        let _ = self.world.events.send(gone).await;
    }

    /// The pod's working directory, and its TMPDIR.
    pub(super) fn dir(&self) -> std::path::PathBuf {
        self.world.dir.pod_dir(&self.entry.uid)
    }

    pub(super) fn environment(&self, container: &Container) -> BTreeMap<String, String> {
        self.entry
            .environment(Some(container), &self.dir().to_string_lossy())
    }

    async fn say(&self, message: String) {
        self.update(|progress| progress.message = message).await;
    }

    /// Changes the progress and reports it, if that made a difference.
    async fn update(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = self.progress.borrow().clone();
        change(&mut progress);
        if *self.progress.borrow() == progress {
            return;
        }
        self.progress.borrow_mut().clone_from(&progress);
        let event = Event::Pod {
            key: self.key.clone(),
            uid: self.entry.uid.clone(),
            progress,
        };
        let _ = self.world.events.send(event).await;
    }
}
