//! One data-plane thread: it obeys commands, owns its pods, and answers for its own life.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use mesh::{Store, WorkloadUid};
use spiffe::TrustDomain;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinSet, LocalSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::pod::{self, Listening, PodContext, PodParts};
use super::pods::{Pods, Served};
use super::recheck;
use super::registry::Registry;
use super::{PodListeners, Removal};
use crate::admin::readiness::{self, Readiness};
use crate::identity::Identities;
use crate::netns::Netns;
use crate::telemetry::{Telemetry, WorkerTelemetry};

/// How often the bytes of open connections reach the metrics; shorter than any scrape interval.
const REPORT: Duration = Duration::from_secs(5);

/// Reports between two clean-ups: one minute.
const REPORTS_PER_SWEEP: u32 = 12;

/// How long a worker may take to answer readiness' question; it answers a live one in microseconds.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// How long ended tasks may take to notice that they were aborted.
const LAST_TASKS: Duration = Duration::from_secs(2);

pub(super) enum Command {
    Add {
        uid: WorkloadUid,
        netns: Arc<Netns>,
        listeners: PodListeners,
        registry: Arc<Registry>,
        answer: oneshot::Sender<io::Result<()>>,
    },
    Remove {
        uid: WorkloadUid,
        how: Removal,
        answer: oneshot::Sender<oneshot::Receiver<()>>,
    },
    Purge {
        destination: WorkloadUid,
        answer: oneshot::Sender<()>,
    },
    Ping {
        answer: oneshot::Sender<()>,
    },
    Drain {
        until: Instant,
        answer: oneshot::Sender<()>,
    },
}

/// What a worker is made of.
pub(super) struct Parts {
    pub(super) number: usize,
    pub(super) store: Store,
    pub(super) identities: Identities,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) trust_domain_aliases: Arc<[TrustDomain]>,
    pub(super) tunnel_max_age: Duration,
    /// On this worker.
    pub(super) unproven_per_pod: usize,
    pub(super) readiness: Option<(
        std::net::TcpListener,
        Arc<Readiness>,
        Vec<mpsc::WeakSender<Command>>,
    )>,
}

pub(super) struct Worker {
    number: usize,
    store: Store,
    identities: Identities,
    shared: Arc<Telemetry>,
    telemetry: Rc<WorkerTelemetry>,
    trust_domain_aliases: Arc<[TrustDomain]>,
    tunnel_max_age: Duration,
    unproven_per_pod: usize,
    pods: Pods,
    tasks: JoinSet<()>,
    served: HashMap<Id, WorkloadUid>,
    reports: u32,
}

/// A worker that is gone would leave its share of every pod's new connections to nobody, while the
/// process looks alive. So a panic of the thread itself, not of a connection's task, ends the
/// process: capture stays closed, and the next daemon takes over.
struct WholeOrNothing;

impl Drop for WholeOrNothing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Worker {
    /// Starts the thread. Its runtime is made here so that a failure is the caller's to report.
    pub(super) fn spawn(
        parts: Parts,
        commands: mpsc::Receiver<Command>,
    ) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name(format!("data-{}", parts.number))
            .spawn(move || {
                let _whole = WholeOrNothing;
                LocalSet::new().block_on(&runtime, async move {
                    let readiness = parts.readiness;
                    let worker = Worker {
                        number: parts.number,
                        store: parts.store,
                        identities: parts.identities,
                        telemetry: Rc::new(WorkerTelemetry::new(parts.telemetry.clone())),
                        shared: parts.telemetry,
                        trust_domain_aliases: parts.trust_domain_aliases,
                        tunnel_max_age: parts.tunnel_max_age,
                        unproven_per_pod: parts.unproven_per_pod,
                        pods: Pods::default(),
                        tasks: JoinSet::new(),
                        served: HashMap::new(),
                        reports: 0,
                    };
                    let stop = CancellationToken::new();
                    let mut beside = JoinSet::new();
                    // Runs through the drain too: what is open then is still subject to policy.
                    let recheck =
                        recheck::follow(worker.store.clone(), worker.pods.clone(), stop.clone());
                    beside.spawn_local(async move {
                        let _whole = WholeOrNothing;
                        recheck.await;
                    });
                    if let Some((listener, state, workers)) = readiness {
                        let alive = move || alive(workers.clone());
                        beside.spawn_local(readiness::serve(listener, state, alive, stop.clone()));
                    }
                    worker.run(commands).await;
                    stop.cancel();
                    while beside.join_next().await.is_some() {}
                });
            })
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut report = interval(REPORT);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Drain { until, answer }) => {
                        self.end(until).await;
                        // Whoever asked may have stopped waiting.
                        let _ = answer.send(());
                        return;
                    }
                    Some(command) => self.obey(command),
                    None => return self.end(Instant::now()).await,
                },
                Some(ended) = self.tasks.join_next_with_id() => {
                    let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                    self.forget(id);
                }
                _ = report.tick() => self.report(),
            }
        }
    }

    /// Whoever asked may have stopped waiting; an answer that nobody takes is no error.
    fn obey(&mut self, command: Command) {
        match command {
            Command::Add {
                uid,
                netns,
                listeners,
                registry,
                answer,
            } => {
                let _ = answer.send(self.add(uid, netns, listeners, registry));
            }
            Command::Remove { uid, how, answer } => {
                self.remove(&uid, how, answer);
            }
            Command::Purge {
                destination,
                answer,
            } => {
                for pod in self.pods.all() {
                    pod.pool.retire_destination(destination.as_str());
                }
                self.telemetry.forget(&destination);
                let _ = answer.send(());
            }
            Command::Ping { answer } => {
                let _ = answer.send(());
            }
            // Taken by the caller, which ends with it.
            Command::Drain { .. } => {}
        }
    }

    fn add(
        &mut self,
        uid: WorkloadUid,
        netns: Arc<Netns>,
        listeners: PodListeners,
        registry: Arc<Registry>,
    ) -> io::Result<()> {
        let context = Rc::new(PodContext::new(PodParts {
            uid: uid.clone(),
            netns,
            registry,
            worker: self.number,
            store: self.store.clone(),
            identities: self.identities.clone(),
            telemetry: self.telemetry.clone(),
            trust_domain_aliases: self.trust_domain_aliases.clone(),
            tunnel_max_age: self.tunnel_max_age,
            unproven: self.unproven_per_pod,
        }));
        let listening = Listening::new(listeners, &context.ends)?;
        let ended = CancellationToken::new();
        let served = Rc::new(Served {
            context: context.clone(),
            ended: ended.clone(),
        });
        let task = self.tasks.spawn_local(async move {
            // Told by a guard, so that even a panic in the pod's own loop lets the waiting control
            // side go on.
            let _ended = ended.drop_guard();
            pod::serve(context, listening).await;
        });
        self.served.insert(task.id(), uid.clone());
        self.pods.add(uid, served);
        Ok(())
    }

    /// Answers when the pod's listeners are closed, with what tells when its last connection has
    /// ended.
    fn remove(
        &mut self,
        uid: &WorkloadUid,
        how: Removal,
        answer: oneshot::Sender<oneshot::Receiver<()>>,
    ) {
        let leaving = self.pods.of(uid);
        for served in &leaving {
            match how {
                Removal::OptOut => served.context.drain(),
                Removal::Gone => served.context.abort("workload_gone"),
            }
        }
        self.tasks.spawn_local(async move {
            for served in &leaving {
                let open = &served.context.ends.open;
                open.close();
                open.wait().await;
            }
            let (tell, told) = oneshot::channel();
            let _ = answer.send(told);
            for served in leaving {
                served.ended.cancelled().await;
            }
            let _ = tell.send(());
        });
    }

    /// A pod's task has ended: nothing of the pod is left.
    fn forget(&mut self, task: Id) {
        if let Some(uid) = self.served.remove(&task) {
            self.pods.forget_ended(&uid);
        }
    }

    fn report(&mut self) {
        self.pods.all().iter().for_each(|pod| pod.report());
        self.reports += 1;
        if self.reports.is_multiple_of(REPORTS_PER_SWEEP) {
            self.telemetry.refresh();
            if self.number == 0 {
                self.shared.sweep();
            }
        }
    }

    /// Stops accepting, waits for what is open until the deadline, and resets the rest.
    async fn end(mut self, until: Instant) {
        let all = |worker: &Self, tell: fn(&PodContext)| {
            worker.pods.all().iter().for_each(|pod| tell(pod));
        };
        all(&self, PodContext::drain);
        let finished = timeout_at(until, async {
            while self.tasks.join_next().await.is_some() {}
        })
        .await;
        if finished.is_err() {
            all(&self, |pod| pod.abort("drain_deadline"));
            let _ = timeout(LAST_TASKS, async {
                while self.tasks.join_next().await.is_some() {}
            })
            .await;
        }
        self.tasks.shutdown().await;
    }
}

/// Whether every worker answers.
async fn alive(workers: Vec<mpsc::WeakSender<Command>>) -> bool {
    for worker in workers {
        let (answer, answered) = oneshot::channel();
        // Weak, so that asking does not keep a data plane alive that its owner has dropped.
        let Some(worker) = worker.upgrade() else {
            return false;
        };
        let exchange =
            async { worker.send(Command::Ping { answer }).await.is_ok() && answered.await.is_ok() };
        if !timeout(SIGN_OF_LIFE, exchange).await.unwrap_or(false) {
            return false;
        }
    }
    true
}
