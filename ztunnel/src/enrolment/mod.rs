//! Which pods of this node are in the mesh, and the steps that bring them in and let them go.
//!
//! The reconciler is level-triggered: what should be ([the model's][mesh::Model] opted-in pods of
//! this node) is compared with what is, again and again, by a pure function that says the next step
//! of each pod; the steps run as tasks, one per pod at a time. Nothing is remembered as done: a pod
//! counts as enrolled because its rules and its listeners were seen inside its own network
//! namespace a moment ago.
//!
//! A pod whose step fails is tried again, later and later up to [`RETRY_MAX`], for as long as it
//! exists; it keeps neither another pod nor the daemon's readiness waiting. Nor does a certificate
//! that does not come keep a pod from being captured: the pod counts as pending, for that reason,
//! until it has one.

mod certificates;
mod claims;
mod entry;
mod plan;
mod purge;
mod source;
mod status;
mod steps;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh::{Model, Store, WorkloadUid};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub use purge::purge_removed;
pub use source::{NetnsFolder, NetnsSource};
pub use status::{PodState, PodStatus, Statuses};

use crate::dataplane::DataPlane;
use crate::guard::{self, Guard};
use crate::identity::Identities;
use crate::netns::{NetnsId, NetnsThreads};
use crate::telemetry::Telemetry;
use certificates::FirstCertificates;
use claims::Claims;
use entry::{Ears, Entry, Finished, Step};
use plan::{Action, Actual, World, plan};
use steps::Tools;

/// The first wait after a failure: a pod whose namespace appears a moment after its object is
/// enrolled without a visible delay.
pub const RETRY_FIRST: Duration = Duration::from_millis(100);
/// The longest wait between two attempts.
pub const RETRY_MAX: Duration = Duration::from_secs(5);

/// The shortest time between two rounds that nothing but the clock has called for.
const ROUND: Duration = Duration::from_millis(10);
/// How soon a guard that could not be put in place is tried again.
const GUARD_RETRY: Duration = Duration::from_secs(1);

/// Changes heard of in namespaces that may wait to be looked at; a lost one is found by the next
/// round.
const HEARD: usize = 1024;

/// What enrolment is made of.
pub struct Dependencies {
    /// This node's name.
    pub node: Arc<str>,
    /// The node's own network namespace.
    pub node_netns: NetnsId,
    /// What should be.
    pub store: Store,
    /// Where the pods' namespaces are.
    pub source: Arc<dyn NetnsSource>,
    /// Who serves the pods.
    pub data_plane: Arc<DataPlane>,
    /// Their certificates.
    pub identities: Identities,
    /// Where states and repairs are counted.
    pub telemetry: Arc<Telemetry>,
    /// The threads for work inside pods' namespaces.
    pub threads: NetnsThreads,
    /// The node's guard.
    pub guard: Guard,
    /// How often everything is verified.
    pub verify_interval: Duration,
}

/// The reconciler of one node.
pub struct Enrolment {
    node: Arc<str>,
    store: Store,
    tools: Tools,
    guard: Guard,
    guard_due: Instant,
    guard_stands: bool,
    seen: Arc<Model>,
    world: World,
    entries: BTreeMap<WorkloadUid, Entry>,
    steps: JoinSet<(WorkloadUid, Finished)>,
    ears: Ears,
    heard: mpsc::Receiver<WorkloadUid>,
    certificates: FirstCertificates,
    statuses: watch::Sender<Statuses>,
    unpublished: bool,
    settled: watch::Sender<bool>,
}

impl Enrolment {
    /// A reconciler that has not looked yet.
    pub fn new(dependencies: Dependencies) -> Self {
        let tools = Tools {
            threads: dependencies.threads,
            source: dependencies.source,
            data_plane: dependencies.data_plane,
            identities: dependencies.identities.clone(),
            claims: Claims::default(),
            telemetry: dependencies.telemetry,
            node: dependencies.node_netns,
            verify_interval: dependencies.verify_interval,
        };
        let (tell, heard) = mpsc::channel(HEARD);
        Self {
            node: dependencies.node,
            store: dependencies.store,
            tools,
            guard: dependencies.guard,
            guard_due: Instant::now(),
            guard_stands: false,
            seen: Arc::default(),
            world: World::default(),
            entries: BTreeMap::new(),
            steps: JoinSet::new(),
            ears: Ears {
                watches: JoinSet::new(),
                heard: tell,
            },
            heard,
            certificates: FirstCertificates::new(dependencies.identities),
            statuses: watch::Sender::default(),
            unpublished: true,
            settled: watch::Sender::new(false),
        }
    }

    /// The verified state of every pod, as it changes.
    pub fn statuses(&self) -> watch::Receiver<Statuses> {
        self.statuses.subscribe()
    }

    /// Becomes true when every pod that opted in before the start has been enrolled, or tried.
    pub fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }

    /// Reconciles until cancelled. To be called when the store has been filled once: an empty store
    /// says that no pod is in the mesh, and would open the guard.
    ///
    /// When it ends, everything stays as it is: the rules outlive the daemon, so that a pod of the
    /// mesh never speaks in clear.
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
                        // Its pod would be busy for ever; whoever starts the daemon again begins
                        // from what stands in the kernel.
                        tracing::error!(%error, "a step of a pod's enrolment panicked");
                        break;
                    }
                },
                Some(_) = self.ears.watches.join_next() => {}
                Some(uid) = self.heard.recv() => {
                    self.entries.get_mut(&uid).into_iter().for_each(Entry::hear);
                }
                told = self.certificates.next() => self.certified(&told),
                () = sleep_until(next) => {}
            }
        }
        self.steps.shutdown().await;
        self.certificates.stop().await;
        self.ears.watches.shutdown().await;
    }

    /// One round; says when the next is due at the latest.
    async fn reconcile(&mut self) -> Instant {
        let model = self.store.model();
        let news = !Arc::ptr_eq(&model, &self.seen);
        if news {
            self.world = World::of(&model, &self.node);
            let identities = self.world.meshed.values().map(|pod| pod.identity.clone());
            self.tools.identities.set_identities(identities.collect());
            self.seen = model;
            self.unpublished = true;
        }
        self.stand_guard(news).await;
        let now = Instant::now();
        let actual: BTreeMap<WorkloadUid, Actual> = self
            .entries
            .iter()
            .map(|(uid, entry)| (uid.clone(), entry.actual(now)))
            .collect();
        for (uid, action) in plan(&self.world, &actual) {
            // The guard stands before a pod's capture is trusted with anything.
            if action != Action::Enrol || self.guard_stands {
                self.start(uid, action);
            }
        }
        self.publish();
        // What is due and was not begun waits for an event, not for the clock.
        let wakes = self
            .entries
            .values()
            .filter_map(Entry::wakes)
            .filter(|at| *at > now);
        wakes.fold(self.guard_due.max(now + ROUND), Instant::min)
    }

    async fn stand_guard(&mut self, news: bool) {
        let due = self.guard_due <= Instant::now();
        if !due && (!news || !self.guard_stands) {
            return;
        }
        let mut outcome = self.guard.apply(guard::sets(&self.seen, &self.node)).await;
        if outcome.is_ok() && due {
            outcome = self.guard.verify().await.map(|repaired| {
                if repaired {
                    tracing::warn!("the node's guard rules were gone or changed: put back");
                    self.tools.telemetry.record_capture_repair("guard");
                }
            });
        }
        if let Err(error) = &outcome {
            let error = error as &dyn std::error::Error;
            tracing::error!(
                error,
                "the guard does not stand: no pod is enrolled until it does"
            );
            self.guard_due = Instant::now() + GUARD_RETRY;
        } else if due {
            self.guard_due = Instant::now() + self.tools.verify_interval;
        }
        self.guard_stands = outcome.is_ok();
        if due && self.guard_stands {
            match self.guard.dropped().await {
                Ok(packets) => self.tools.telemetry.record_guard_drops(packets),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, "what the guard has dropped could not be counted");
                }
            }
        }
    }

    fn start(&mut self, uid: WorkloadUid, action: Action) {
        let desired = self.world.meshed.get(&uid);
        let step = match (action, desired, self.world.plain.get(&uid)) {
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
            // The plan was made from this very world, so the pod that a step is for is in it.
            (Action::Enrol | Action::Verify | Action::Sweep, _, _) => return,
        };
        let entry = self.entries.entry(uid.clone()).or_default();
        let before = entry.mark();
        if let Step::Enrol(desired) | Step::Verify(desired) = &step {
            entry.needs(&uid, &desired.identity, &mut self.certificates);
        }
        let task = entry.begin(&self.tools, &uid, step);
        self.unpublished |= entry.mark() != before || !entry.tried();
        self.steps.spawn(async move { (uid, task.await) });
    }

    fn finish(&mut self, uid: &WorkloadUid, finished: Finished) {
        if matches!(finished, Finished::Forgotten) {
            self.unpublished = true;
            if self
                .entries
                .remove(uid)
                .is_some_and(|entry| entry.status().is_some())
            {
                tracing::info!(pod = %uid, "pod is gone: forgotten");
            }
        } else if let Some(entry) = self.entries.get_mut(uid) {
            let before = entry.mark();
            entry.end(&self.tools, uid, finished, &mut self.ears);
            self.unpublished |= entry.mark() != before;
        }
    }

    fn certified(&mut self, (uid, identity, outcome): &certificates::Told) {
        if let Some(entry) = self.entries.get_mut(uid) {
            let before = entry.mark();
            entry.certified(uid, identity, *outcome);
            self.unpublished |= entry.mark() != before;
        }
    }

    fn publish(&mut self) {
        if !std::mem::take(&mut self.unpublished) {
            return;
        }
        let tried = |uid| self.entries.get(uid).is_some_and(Entry::tried);
        if self.world.meshed.keys().all(tried) {
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
        self.tools.telemetry.record_enrolment(&counts);
        self.statuses.send_replace(Arc::new(statuses));
    }
}
