//! The kubelet of one pod: sandbox, enrolment, containers, deletion.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Container;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::LabContext;
use super::container::{self, Containers};
use super::events::Event;
use super::{daemon, sandbox};
use crate::model::Key;
use crate::model::pod::{KubeletStatus, Phase, PodEntry};
use crate::netns;

/// Interval at which the daemon is polled until it has enrolled a pod.
const ENROLMENT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The interval once [`ENROLMENT_TIMEOUT`] has passed.
const SLOW_ENROLMENT_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// After this time the pod polls slowly. It does not stop: a restarted daemon enrols it later.
const ENROLMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long killed processes may take to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// The desired state of a pod, set by the agent's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DesiredState {
    /// Whether the pod is opted in to the mesh: then containers wait until the daemon has enrolled it.
    pub(super) meshed: bool,
    /// Set when the pod is deleted: the grace period in seconds.
    pub(super) deletion_grace: Option<u64>,
}

/// One pod, owned by its task.
pub(super) struct Pod {
    pub(super) context: Rc<LabContext>,
    pub(super) key: Key,
    pub(super) entry: PodEntry,
    pub(super) node_netns: String,
    status: RefCell<KubeletStatus>,
    pub(super) containers: RefCell<Containers>,
    /// Notified when `containers` has changed.
    pub(super) changed: Notify,
}

impl Pod {
    pub(super) fn new(
        context: &Rc<LabContext>,
        key: Key,
        entry: &PodEntry,
        node_netns: String,
    ) -> Self {
        Self {
            context: Rc::clone(context),
            key,
            entry: entry.clone(),
            node_netns,
            status: RefCell::default(),
            containers: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// Runs the pod until it is deleted and its resources are removed.
    pub(super) async fn run(self, desired: watch::Receiver<DesiredState>) {
        let pod = Rc::new(self);
        let mut tasks = JoinSet::new();
        let mut deletion = desired.clone();
        tokio::select! {
            result = pod.start(desired.clone(), &mut tasks) => {
                if let Err(error) = result {
                    pod.set_message(format!("{error:#}")).await;
                }
            }
            _ = deletion.wait_for(|state| state.deletion_grace.is_some()) => {}
        }
        // The sender is dropped only when the lab is removed, which aborts this task.
        if deletion
            .wait_for(|state| state.deletion_grace.is_some())
            .await
            .is_ok()
        {
            pod.tear_down(tasks).await;
        }
    }

    /// Creates the sandbox, waits for enrolment, starts the containers and reports their status.
    /// Returns only on failure.
    async fn start(
        self: &Rc<Self>,
        desired: watch::Receiver<DesiredState>,
        tasks: &mut JoinSet<()>,
    ) -> Result<()> {
        let dir = self.dir();
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("cannot create {}", dir.display()))?;
        sandbox::create_pod(&self.context.dir, &self.entry, &self.node_netns)
            .await
            .context("sandbox")?;
        self.update_status(|status| status.has_sandbox = true).await;
        if self.context.daemon.is_some() {
            self.wait_enrolled(desired.clone()).await;
        }
        let spec = self.entry.spec();
        for init in spec.init_containers.iter().flatten() {
            container::run_init(self, init, desired.clone()).await?;
        }
        *self.containers.borrow_mut() = Containers::new(&spec);
        for (index, container) in spec.containers.iter().enumerate() {
            tasks.spawn_local(container::supervise(
                Rc::clone(self),
                index,
                container.clone(),
                desired.clone(),
            ));
        }
        loop {
            let summary = self.containers.borrow().summary();
            self.update_status(|status| {
                (status.phase, status.ready) = (summary.phase, summary.ready);
                (status.restarts, status.message) = (summary.restarts, summary.message);
            })
            .await;
            self.changed.notified().await;
        }
    }

    /// Waits until the node's daemon has enrolled the pod, or the pod is no longer opted in.
    async fn wait_enrolled(&self, mut desired: watch::Receiver<DesiredState>) {
        let started = Instant::now();
        loop {
            if !desired.borrow_and_update().meshed {
                break;
            }
            let state = daemon::workload_state(&self.node_netns, &self.entry.uid).await;
            if state.as_deref() == Some("enrolled") {
                break;
            }
            let state = state.as_deref().unwrap_or("unknown to it");
            self.set_message(format!(
                "containers not started: the node's daemon has not enrolled the pod ({state})"
            ))
            .await;
            let interval = if started.elapsed() > ENROLMENT_TIMEOUT {
                SLOW_ENROLMENT_POLL_INTERVAL
            } else {
                ENROLMENT_POLL_INTERVAL
            };
            // A change of the desired state ends the wait.
            let _ = tokio::time::timeout(interval, desired.changed()).await;
        }
        self.set_message(String::new()).await;
    }

    /// Waits until the containers have exited, then removes everything else of the pod. The tasks of
    /// the containers watch the same desired state: they send SIGTERM, and SIGKILL at the end of the
    /// grace period.
    async fn tear_down(&self, mut tasks: JoinSet<()>) {
        while tasks.join_next().await.is_some() {}
        self.update_status(|status| {
            status.ready = false;
            if status.phase == Phase::Running {
                status.phase = Phase::Succeeded;
            }
        })
        .await;
        if !self.entry.host_network() && netns::exists(&self.entry.netns) {
            // Processes started by exec, and daemonized children of containers.
            let open = netns::OpenNamespaces::open(&[&self.entry.netns]);
            if let Err(error) = open.kill_all(KILL_TIMEOUT) {
                eprintln!("pod {}/{}: {error:#}", self.key.0, self.key.1);
            }
            if let Err(error) =
                sandbox::remove_pod(&self.context.dir, &self.entry, &self.node_netns).await
            {
                eprintln!("pod {}/{}: {error:#}", self.key.0, self.key.1);
            }
        }
        let _ = std::fs::remove_dir_all(self.dir());
        let removed = Event::PodRemoved {
            key: self.key.clone(),
            uid: self.entry.uid.clone(),
        };
        let _ = self.context.events.send(removed).await;
    }

    /// The pod's working directory, and its TMPDIR.
    pub(super) fn dir(&self) -> std::path::PathBuf {
        self.context.dir.pod_dir(&self.entry.uid)
    }

    pub(super) fn environment(&self, container: &Container) -> BTreeMap<String, String> {
        self.entry
            .environment(Some(container), &self.dir().to_string_lossy())
    }

    async fn set_message(&self, message: String) {
        self.update_status(|status| status.message = message).await;
    }

    /// Changes the status, and reports it if it differs.
    async fn update_status(&self, change: impl FnOnce(&mut KubeletStatus)) {
        let mut status = self.status.borrow().clone();
        change(&mut status);
        if *self.status.borrow() == status {
            return;
        }
        self.status.borrow_mut().clone_from(&status);
        let event = Event::Pod {
            key: self.key.clone(),
            uid: self.entry.uid.clone(),
            status,
        };
        let _ = self.context.events.send(event).await;
    }
}
