//! One data-plane thread: it handles commands, and owns its pods.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use mesh::WorkloadUid;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinSet, LocalSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Removal;
use super::pods::{self, RegisteredListeners, ServedPod, ServedPods};
use crate::capture::PodListeners;
use crate::netns::Netns;
use crate::proxy::{ConnectionRegistry, PodContext, SharedContext, WorkerContext, reauthorize};
use crate::readiness::{self, Readiness};

/// How often the bytes of open connections are added to the metrics; shorter than any usual scrape
/// interval.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Reports between two sweeps: one minute.
const REPORTS_PER_SWEEP: u32 = 12;

/// How long a worker may take to reply to a ping of the readiness check. A healthy one takes
/// microseconds.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long aborted connections may take to end.
const ABORT_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) enum Command {
    Add {
        uid: WorkloadUid,
        netns: Arc<Netns>,
        listeners: PodListeners,
        connections: Arc<ConnectionRegistry>,
        reply: oneshot::Sender<io::Result<()>>,
    },
    /// The reply comes when the listeners are closed; the receiver in it resolves when the last
    /// connection has ended.
    Remove {
        uid: WorkloadUid,
        removal: Removal,
        reply: oneshot::Sender<oneshot::Receiver<()>>,
    },
    Purge {
        destination: WorkloadUid,
        reply: oneshot::Sender<()>,
    },
    Ping {
        reply: oneshot::Sender<()>,
    },
    Drain {
        deadline: Instant,
        reply: oneshot::Sender<()>,
    },
}

/// The readiness port and what it checks.
pub(super) struct ReadinessServer {
    pub(super) listener: std::net::TcpListener,
    pub(super) readiness: Arc<Readiness>,
    pub(super) workers: Vec<mpsc::WeakSender<Command>>,
}

pub(super) struct Worker {
    context: Rc<WorkerContext>,
    pods: ServedPods,
    /// One task per pod, and one per removal.
    tasks: JoinSet<()>,
    pod_of_task: HashMap<Id, WorkloadUid>,
    reports: u32,
}

/// Aborts the process if the thread panics.
///
/// New connections of every pod are spread over the workers, so without one worker a part of them
/// would never be accepted while the process looks healthy. After the abort capture stays closed
/// until the next daemon takes over. A panic of a connection's task ends only that connection.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Worker {
    /// Starts the thread of worker `number`.
    ///
    /// # Errors
    /// Fails if the runtime or the thread cannot be created.
    pub(super) fn spawn(
        number: usize,
        shared: Arc<SharedContext>,
        commands: mpsc::Receiver<Command>,
        readiness: Option<ReadinessServer>,
    ) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name(format!("data-{number}"))
            .spawn(move || {
                let _abort_on_panic = AbortOnPanic;
                let serve = Self::serve(number, shared, commands, readiness);
                LocalSet::new().block_on(&runtime, serve);
            })
    }

    async fn serve(
        number: usize,
        shared: Arc<SharedContext>,
        commands: mpsc::Receiver<Command>,
        readiness: Option<ReadinessServer>,
    ) {
        let store = shared.store.clone();
        let worker = Worker {
            context: Rc::new(WorkerContext::new(number, shared)),
            pods: ServedPods::default(),
            tasks: JoinSet::new(),
            pod_of_task: HashMap::new(),
            reports: 0,
        };
        let stop = CancellationToken::new();
        let mut background = JoinSet::new();
        // Runs through the drain too: policies still apply to the connections that are open then.
        let pods = worker.pods.clone();
        let reauthorize = reauthorize::watch(store, move || pods.contexts(), stop.clone());
        background.spawn_local(async move {
            let _abort_on_panic = AbortOnPanic;
            reauthorize.await;
        });
        if let Some(server) = readiness {
            let is_alive = move || all_alive(server.workers.clone());
            background.spawn_local(readiness::serve(
                server.listener,
                server.readiness,
                is_alive,
                stop.clone(),
            ));
        }
        worker.run(commands).await;
        stop.cancel();
        while background.join_next().await.is_some() {}
    }

    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut report = interval(REPORT_INTERVAL);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Drain { deadline, reply }) => {
                        self.drain(deadline).await;
                        // The sender may have stopped waiting.
                        let _ = reply.send(());
                        return;
                    }
                    Some(command) => self.handle(command),
                    None => return self.drain(Instant::now()).await,
                },
                Some(ended) = self.tasks.join_next_with_id() => {
                    let id = ended.map_or_else(|error| error.id(), |(id, ())| id);
                    self.remove_ended(id);
                }
                _ = report.tick() => self.report(),
            }
        }
    }

    /// Handles a command. The sender may have stopped waiting, so a reply that cannot be sent is no
    /// error.
    fn handle(&mut self, command: Command) {
        match command {
            Command::Add {
                uid,
                netns,
                listeners,
                connections,
                reply,
            } => {
                let _ = reply.send(self.add(uid, netns, listeners, connections));
            }
            Command::Remove {
                uid,
                removal,
                reply,
            } => self.remove(&uid, removal, reply),
            Command::Purge { destination, reply } => {
                for pod in self.pods.contexts() {
                    pod.pool.retire_destination(destination.as_str());
                }
                self.context.telemetry.remove_workload(&destination);
                let _ = reply.send(());
            }
            Command::Ping { reply } => {
                let _ = reply.send(());
            }
            // Handled in `run`, which it ends.
            Command::Drain { .. } => {}
        }
    }

    fn add(
        &mut self,
        uid: WorkloadUid,
        netns: Arc<Netns>,
        listeners: PodListeners,
        connections: Arc<ConnectionRegistry>,
    ) -> io::Result<()> {
        let open_listeners = TaskTracker::new();
        let listeners = RegisteredListeners::new(listeners, &open_listeners)?;
        let context = PodContext::new(uid.clone(), netns, connections, self.context.clone());
        let context = Rc::new(context);
        let ended = CancellationToken::new();
        self.pods.add(Rc::new(ServedPod {
            context: context.clone(),
            open_listeners,
            ended: ended.clone(),
        }));
        let task = self.tasks.spawn_local(async move {
            // A drop guard, so that a panic in the pod's task does not leave a removal waiting.
            let _ended = ended.drop_guard();
            pods::serve(context, listeners).await;
        });
        self.pod_of_task.insert(task.id(), uid);
        Ok(())
    }

    /// Removes a pod; see [`Command::Remove`].
    fn remove(
        &mut self,
        uid: &WorkloadUid,
        removal: Removal,
        reply: oneshot::Sender<oneshot::Receiver<()>>,
    ) {
        let removed = self.pods.with_uid(uid);
        for pod in &removed {
            match removal {
                Removal::OptOut => pod.context.drain(),
                Removal::Gone => pod.context.abort("workload_gone"),
            }
        }
        self.tasks.spawn_local(async move {
            for pod in &removed {
                pod.open_listeners.close();
                pod.open_listeners.wait().await;
            }
            let (ended, wait_for_end) = oneshot::channel();
            let _ = reply.send(wait_for_end);
            for pod in removed {
                pod.ended.cancelled().await;
            }
            let _ = ended.send(());
        });
    }

    /// Removes the pod of a task that has ended.
    fn remove_ended(&mut self, task: Id) {
        if let Some(uid) = self.pod_of_task.remove(&task) {
            self.pods.remove_ended(&uid);
        }
    }

    fn report(&mut self) {
        for pod in self.pods.contexts() {
            pod.report_bytes();
        }
        self.reports += 1;
        if self.reports.is_multiple_of(REPORTS_PER_SWEEP) {
            self.context.telemetry.clear_cache();
            // One worker sweeps the metrics of all.
            if self.context.number == 0 {
                self.context.shared.telemetry.sweep();
            }
        }
    }

    /// Stops accepting, waits for open connections until the deadline, and resets the rest.
    async fn drain(mut self, deadline: Instant) {
        for pod in self.pods.contexts() {
            pod.drain();
        }
        if timeout_at(deadline, self.join_tasks()).await.is_err() {
            for pod in self.pods.contexts() {
                pod.abort("drain_deadline");
            }
            let _ = timeout(ABORT_TIMEOUT, self.join_tasks()).await;
        }
        self.tasks.shutdown().await;
    }

    async fn join_tasks(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Whether every worker answers a ping.
async fn all_alive(workers: Vec<mpsc::WeakSender<Command>>) -> bool {
    for worker in workers {
        let (reply, received) = oneshot::channel();
        // Weak, so that the readiness port does not keep the workers of a dropped data plane
        // running.
        let Some(worker) = worker.upgrade() else {
            return false;
        };
        let ping =
            async { worker.send(Command::Ping { reply }).await.is_ok() && received.await.is_ok() };
        if !timeout(PING_TIMEOUT, ping).await.unwrap_or(false) {
            return false;
        }
    }
    true
}
