//! Which pods of this node are in the mesh, and the reconciler that enrols and removes them.
//!
//! The reconciler is level-triggered. A pure function ([`plan`]) compares the desired state (the
//! [model's][mesh::Model] opted-in pods of this node) with the actual state and returns the next
//! step of each pod. Steps run as tasks, one per pod at a time. A pod counts as enrolled only while
//! periodic verification finds its rules and its listeners in its own network namespace.
//!
//! A failed step is retried with exponential backoff up to [`RETRY_MAX`], as long as the pod
//! exists. It delays neither other pods nor the daemon's readiness. A missing certificate does not
//! prevent a pod's capture: the pod is captured and counts as pending, with that reason, until it
//! has a certificate.

mod certificates;
mod changes;
mod entry;
mod plan;
mod pod_netns;
mod steps;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh::{Model, Store, WorkloadUid};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub use entry::{PodState, PodStatus, Statuses};
pub use pod_netns::{NetnsFolder, NetnsSource};

use crate::dataplane::DataPlane;
use crate::guard::{self, Guard};
use crate::identity::Identities;
use crate::netns::{NetnsId, NetnsThreads};
use crate::telemetry::Telemetry;
use certificates::FirstCertificates;
use changes::ChangeListener;
use entry::{Entry, Finished, Step};
use plan::{Action, ActualPod, DesiredState, plan};
use pod_netns::NetnsLeases;
use steps::Context;

/// Backoff after the first failure. Short, because a pod's namespace often appears a moment after
/// its object.
pub const RETRY_FIRST: Duration = Duration::from_millis(100);
/// Longest backoff between two attempts.
pub const RETRY_MAX: Duration = Duration::from_secs(5);

/// Shortest time between two rounds that only a deadline has caused.
const MIN_ROUND_INTERVAL: Duration = Duration::from_millis(10);
/// When a guard that could not be applied is retried.
const GUARD_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The parts of the daemon that enrolment uses.
pub struct Dependencies {
    /// This node's name.
    pub node: Arc<str>,
    /// The node's own network namespace.
    pub node_netns: NetnsId,
    /// The model, from which the desired state is read.
    pub store: Store,
    /// Finds the pods' namespaces.
    pub source: Arc<dyn NetnsSource>,
    /// Serves the enrolled pods.
    pub data_plane: Arc<DataPlane>,
    /// Certificates of the pods' identities.
    pub identities: Identities,
    /// Counts states and repairs.
    pub telemetry: Arc<Telemetry>,
    /// The threads for work inside pods' namespaces.
    pub threads: NetnsThreads,
    /// The node's guard.
    pub guard: Guard,
    /// How often every pod and the guard are verified.
    pub verify_interval: Duration,
}

/// The reconciler of one node.
pub struct Enrolment {
    node: Arc<str>,
    store: Store,
    context: Context,
    guard: Guard,
    guard_due: Instant,
    guard_is_applied: bool,
    /// The model of the last round.
    model: Arc<Model>,
    desired: DesiredState,
    entries: BTreeMap<WorkloadUid, Entry>,
    steps: JoinSet<(WorkloadUid, Finished)>,
    changes: ChangeListener,
    certificates: FirstCertificates,
    statuses: watch::Sender<Statuses>,
    has_unpublished: bool,
    settled: watch::Sender<bool>,
}

impl Enrolment {
    /// Creates a reconciler. [`Enrolment::run`] runs it.
    pub fn new(dependencies: Dependencies) -> Self {
        let context = Context {
            threads: dependencies.threads,
            source: dependencies.source,
            data_plane: dependencies.data_plane,
            identities: dependencies.identities.clone(),
            leases: NetnsLeases::default(),
            telemetry: dependencies.telemetry,
            node_netns: dependencies.node_netns,
            verify_interval: dependencies.verify_interval,
        };
        Self {
            node: dependencies.node,
            store: dependencies.store,
            context,
            guard: dependencies.guard,
            guard_due: Instant::now(),
            guard_is_applied: false,
            model: Arc::default(),
            desired: DesiredState::default(),
            entries: BTreeMap::new(),
            steps: JoinSet::new(),
            changes: ChangeListener::new(),
            certificates: FirstCertificates::new(dependencies.identities),
            statuses: watch::Sender::default(),
            has_unpublished: true,
            settled: watch::Sender::new(false),
        }
    }

    /// Publishes the verified status of every pod.
    pub fn statuses(&self) -> watch::Receiver<Statuses> {
        self.statuses.subscribe()
    }

    /// Becomes true when enrolment of every pod of the first model has been attempted.
    pub fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    /// Reconciles until cancelled. Call it after the store was filled for the first time: in an
    /// empty store no pod is in the mesh, and the guard would drop nothing.
    ///
    /// All rules remain after it returns, so that a meshed pod never sends plaintext while no
    /// daemon runs.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changed = self.store.subscribe();
        loop {
            changed.borrow_and_update();
            let next = self.reconcile().await;
            tokio::select! {
                () = stop.cancelled() => break,
                store = changed.changed() => if store.is_err() { break },
                Some(step) = self.steps.join_next() => match step {
                    Ok((uid, finished)) => self.finish(&uid, finished),
                    Err(error) => {
                        // The pod would stay busy forever. The next daemon starts from the state in
                        // the kernel.
                        tracing::error!(%error, "a step of a pod's enrolment panicked: stopping");
                        break;
                    }
                },
                uid = self.changes.next() => {
                    self.entries.get_mut(&uid).into_iter().for_each(Entry::mark_dirty);
                }
                report = self.certificates.next() => self.record_certificate(&report),
                () = sleep_until(next) => {}
            }
        }
        self.steps.shutdown().await;
        self.certificates.stop().await;
        self.changes.stop().await;
    }

    /// Runs one round, and returns when the next is due without an event.
    async fn reconcile(&mut self) -> Instant {
        let model = self.store.model();
        let is_new = !Arc::ptr_eq(&model, &self.model);
        if is_new {
            self.desired = DesiredState::from_model(&model, &self.node);
            let identities = self.desired.meshed.values().map(|pod| pod.identity.clone());
            self.context.identities.set_identities(identities.collect());
            self.model = model;
            self.has_unpublished = true;
        }
        self.maintain_guard(is_new).await;
        let now = Instant::now();
        let actual: BTreeMap<WorkloadUid, ActualPod> = self
            .entries
            .iter()
            .map(|(uid, entry)| (uid.clone(), entry.actual(now)))
            .collect();
        for (uid, action) in plan(&self.desired, &actual) {
            // No pod is enrolled before the guard is applied: it covers gaps in the pod's capture.
            if action != Action::Enrol || self.guard_is_applied {
                self.start(uid, action);
            }
        }
        self.publish();
        // A pod that is due and has no step waits for an event, so past deadlines are ignored.
        let deadlines = self
            .entries
            .values()
            .filter_map(Entry::next_deadline)
            .filter(|at| *at > now);
        deadlines.fold(self.guard_due.max(now + MIN_ROUND_INTERVAL), Instant::min)
    }

    /// Applies the guard to a new model, and verifies it when that is due.
    async fn maintain_guard(&mut self, is_new_model: bool) {
        let due = self.guard_due <= Instant::now();
        if !due && (!is_new_model || !self.guard_is_applied) {
            return;
        }
        let mut outcome = self.guard.apply(guard::sets(&self.model, &self.node)).await;
        if outcome.is_ok() && due {
            outcome = self.guard.verify().await.map(|repaired| {
                if repaired {
                    tracing::warn!("the node's guard rules were changed or removed: repaired");
                    self.context.telemetry.record_capture_repair("guard");
                }
            });
        }
        if let Err(error) = &outcome {
            let error = error as &dyn std::error::Error;
            tracing::error!(
                error,
                "cannot apply the node's guard rules: no pod is enrolled until that succeeds"
            );
            self.guard_due = Instant::now() + GUARD_RETRY_INTERVAL;
        } else if due {
            self.guard_due = Instant::now() + self.context.verify_interval;
        }
        self.guard_is_applied = outcome.is_ok();
        if due && self.guard_is_applied {
            match self.guard.dropped().await {
                Ok(packets) => self.context.telemetry.record_guard_drops(packets),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, "cannot read the guard's counter of dropped packets");
                }
            }
        }
    }

    /// Starts the step of an action.
    fn start(&mut self, uid: WorkloadUid, action: Action) {
        let desired = self.desired.meshed.get(&uid);
        let step = match (action, desired, self.desired.plain.get(&uid)) {
            (Action::Interrupt, _, _) => {
                self.entries
                    .get(&uid)
                    .into_iter()
                    .for_each(Entry::interrupt);
                return;
            }
            (Action::Forget, _, _) => Step::Forget,
            (Action::Leave, _, _) => Step::Leave,
            (Action::Enrol, Some(desired), _) => Step::Enrol(desired.clone()),
            (Action::Verify, Some(desired), _) => Step::Verify(desired.clone()),
            (Action::Sweep, _, Some(kube_uid)) => Step::Sweep(kube_uid.clone()),
            // Not reached: the plan was made from the same desired state.
            (Action::Enrol | Action::Verify | Action::Sweep, _, _) => return,
        };
        let entry = self.entries.entry(uid.clone()).or_default();
        let before = entry.fingerprint();
        if let Step::Enrol(desired) | Step::Verify(desired) = &step {
            entry.await_certificate(&uid, &desired.identity, &mut self.certificates);
        }
        let task = entry.begin(&self.context, &uid, step);
        self.has_unpublished |= entry.fingerprint() != before || !entry.is_attempted();
        self.steps.spawn(async move { (uid, task.await) });
    }

    /// Records the outcome of a step.
    fn finish(&mut self, uid: &WorkloadUid, finished: Finished) {
        if matches!(finished, Finished::Forgotten) {
            self.has_unpublished = true;
            let entry = self.entries.remove(uid);
            if entry.is_some_and(|entry| entry.status().is_some()) {
                tracing::info!(pod = %uid, "pod was deleted: removed");
            }
        } else if let Some(entry) = self.entries.get_mut(uid) {
            let before = entry.fingerprint();
            entry.end(&self.context, uid, finished, &mut self.changes);
            self.has_unpublished |= entry.fingerprint() != before;
        }
    }

    fn record_certificate(&mut self, (uid, identity, outcome): &certificates::Report) {
        if let Some(entry) = self.entries.get_mut(uid) {
            let before = entry.fingerprint();
            entry.record_certificate(uid, identity, *outcome);
            self.has_unpublished |= entry.fingerprint() != before;
        }
    }

    /// Publishes the statuses if they may have changed.
    fn publish(&mut self) {
        if !std::mem::take(&mut self.has_unpublished) {
            return;
        }
        let is_attempted = |uid| self.entries.get(uid).is_some_and(Entry::is_attempted);
        if self.desired.meshed.keys().all(is_attempted) {
            self.settled
                .send_if_modified(|settled| !std::mem::replace(settled, true));
        }
        let with_status =
            |(uid, entry): (&WorkloadUid, &Entry)| Some((uid.clone(), entry.status()?));
        let statuses: BTreeMap<_, _> = self.entries.iter().filter_map(with_status).collect();
        let counts = [PodState::Pending, PodState::Enrolled, PodState::Leaving].map(|state| {
            (
                state.name(),
                statuses
                    .values()
                    .filter(|status| status.state == state)
                    .count(),
            )
        });
        self.context.telemetry.record_enrolment(&counts);
        self.statuses.send_replace(Arc::new(statuses));
    }
}
