//! The data plane: one thread per core, each with its own runtime, its own listeners in every pod,
//! and its own tunnels.
//!
//! Workers share only the store, the certificates and the counters, all of which are read without a
//! lock. The control side sends them commands through bounded channels and waits for each reply
//! with a deadline: a worker that does not reply is an error that names it, and never blocks the
//! control side. A connection is accepted, served and ended on one thread; [`crate::proxy`] serves
//! it.

mod listener;
mod pods;
mod worker;

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use mesh::{Store, WorkloadUid};
use spiffe::TrustDomain;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

pub use crate::proxy::{ConnectionInfo, Direction};

use crate::capture::PodListeners;
use crate::identity::Identities;
use crate::netns::Netns;
use crate::proxy::{ConnectionRegistry, SharedContext};
use crate::readiness::Readiness;
use crate::telemetry::Telemetry;
use worker::{Command, ReadinessServer, Worker};

/// Commands that may be queued for one worker. The control side sends a few per pod event and waits
/// for each reply.
const MAX_QUEUED_COMMANDS: usize = 256;

/// How long a worker may take to reply. It never blocks, so one that takes longer is stuck.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that one pod may have open at a time, both directions together, unless configured
/// otherwise. At 5 KB each before their buffers grow this is 160 MB. Without a limit one pod can
/// exhaust the node's memory and file descriptors.
pub const MAX_CONNECTIONS_PER_POD: usize = 32_768;

/// Tunnels of one pod that may be in their handshakes at a time, unless configured otherwise. A
/// handshake takes milliseconds, so this admits thousands of new peers a second; and it bounds what
/// unverified peers can hold.
pub const MAX_HANDSHAKES_PER_POD: usize = 1024;

/// The configuration of a data plane.
pub struct DataPlaneConfig {
    /// Number of threads; at least one is started.
    pub workers: usize,
    /// Connections that one pod may have open at a time; see [`MAX_CONNECTIONS_PER_POD`].
    pub max_connections_per_pod: usize,
    /// Tunnels of one pod that may be in their handshakes; see [`MAX_HANDSHAKES_PER_POD`].
    pub max_handshakes_per_pod: usize,
    /// The certificates that the workers serve and dial with.
    pub identities: Identities,
    /// Other names of the mesh's trust domain. A peer with an identity in one of them is of this
    /// mesh.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// How long a tunnel takes new connections, at either end.
    pub tunnel_max_age: Duration,
    /// The readiness port, which the first worker serves; none in tests.
    pub readiness: Option<(TcpListener, Arc<Readiness>)>,
}

/// A pod to be added to the data plane.
pub struct Pod {
    /// Its workload. Everything else about it is looked up for each connection, and so is current.
    pub workload: WorkloadUid,
    /// Its network namespace, in which the workers make the sockets that they dial with.
    pub netns: Arc<Netns>,
    /// One set per worker.
    pub listeners: Vec<PodListeners>,
}

/// How a pod leaves the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The pod left the mesh but still runs: nothing new is accepted, open connections continue.
    OptOut,
    /// The pod was deleted: every connection is reset now.
    Gone,
}

/// Why an operation of the data plane failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A worker's thread or runtime could not be created.
    #[error("cannot start data-plane worker {worker}")]
    Start {
        /// Number of the worker, from 0.
        worker: usize,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
    /// A worker did not reply in time, or has ended.
    #[error("data-plane worker {worker} does not reply: it is stuck or has ended")]
    Unresponsive {
        /// Number of the worker, from 0.
        worker: usize,
    },
    /// The number of listener sets is not the number of workers.
    #[error("pod {uid} has {listeners} sets of listeners for {workers} workers")]
    Listeners {
        /// The pod.
        uid: WorkloadUid,
        /// The sets that it has.
        listeners: usize,
        /// The sets that it needs.
        workers: usize,
    },
    /// A listener could not be registered with the worker's runtime.
    #[error("cannot accept on the listeners of pod {uid}")]
    Accept {
        /// The pod.
        uid: WorkloadUid,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
}

/// A pod that was removed: its listeners are closed, and its last connections may still be open.
#[must_use = "the pod's return path may be removed only after its last connection has ended"]
pub struct Draining {
    ended: Vec<oneshot::Receiver<()>>,
}

impl Draining {
    /// Resolves when the pod's last connection has ended on every worker, which can take as long as
    /// its applications keep connections open.
    pub async fn finished(self) {
        // A worker that ended without a reply has ended its connections too.
        join_all(self.ended).await;
    }
}

/// A running data plane.
pub struct DataPlane {
    workers: Vec<mpsc::Sender<Command>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    connections: Mutex<HashMap<WorkloadUid, Arc<ConnectionRegistry>>>,
    max_connections_per_pod: usize,
}

impl DataPlane {
    /// Starts the workers, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails if a thread or its runtime cannot be created.
    pub fn start(
        config: DataPlaneConfig,
        store: Store,
        telemetry: Arc<Telemetry>,
    ) -> Result<Self, Error> {
        let count = config.workers.max(1);
        let shared = Arc::new(SharedContext {
            store,
            identities: config.identities,
            telemetry,
            trust_domain_aliases: config.trust_domain_aliases,
            tunnel_max_age: config.tunnel_max_age,
            // The kernel spreads new connections evenly over the workers.
            max_handshakes: config.max_handshakes_per_pod.div_ceil(count),
        });
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..count)
            .map(|_| mpsc::channel(MAX_QUEUED_COMMANDS))
            .unzip();
        let mut readiness = config
            .readiness
            .map(|(listener, readiness)| ReadinessServer {
                listener,
                readiness,
                workers: senders.iter().map(mpsc::Sender::downgrade).collect(),
            });
        let mut threads = Vec::with_capacity(count);
        for (worker, commands) in receivers.into_iter().enumerate() {
            let thread = Worker::spawn(worker, shared.clone(), commands, readiness.take())
                .map_err(|source| Error::Start { worker, source })?;
            threads.push(thread);
        }
        Ok(Self {
            workers: senders,
            threads: Mutex::new(threads),
            connections: Mutex::default(),
            max_connections_per_pod: config.max_connections_per_pod,
        })
    }

    /// Number of workers, and so of the listener sets of a [`Pod`].
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Adds a pod. Resolves when every worker accepts on its listeners.
    ///
    /// # Errors
    /// Fails if a worker does not reply or cannot use its listeners; then no worker serves the pod.
    pub async fn add(&self, pod: Pod) -> Result<(), Error> {
        if pod.listeners.len() != self.workers.len() {
            return Err(Error::Listeners {
                listeners: pod.listeners.len(),
                workers: self.workers.len(),
                uid: pod.workload,
            });
        }
        let uid = pod.workload.clone();
        let connections = Arc::new(ConnectionRegistry::new(
            self.workers.len(),
            self.max_connections_per_pod,
        ));
        if let Err(error) = self.add_on_workers(pod, &connections).await {
            // Not all workers serve the pod, so none may. The first failure is the one to report.
            let _ = self.remove(&uid, Removal::Gone).await;
            return Err(error);
        }
        self.lock_connections().insert(uid, connections);
        Ok(())
    }

    /// Adds a pod on every worker, and waits for all of them. Fails with the failure of the lowest
    /// worker.
    async fn add_on_workers(
        &self,
        pod: Pod,
        connections: &Arc<ConnectionRegistry>,
    ) -> Result<(), Error> {
        let uid = pod.workload;
        let requests = pod
            .listeners
            .into_iter()
            .enumerate()
            .map(|(worker, listeners)| {
                self.request(worker, |reply| Command::Add {
                    uid: uid.clone(),
                    netns: pod.netns.clone(),
                    listeners,
                    connections: connections.clone(),
                    reply,
                })
            });
        for reply in join_all(requests).await {
            reply?.map_err(|source| Error::Accept {
                uid: uid.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Removes a pod. Resolves when its listeners are closed on every worker; the result resolves
    /// when its connections have ended. A pod that is unknown, or was removed before, is no error.
    /// [`Removal::Gone`] after [`Removal::OptOut`] resets the connections that were left open.
    ///
    /// # Errors
    /// Fails if a worker does not reply.
    pub async fn remove(&self, uid: &WorkloadUid, removal: Removal) -> Result<Draining, Error> {
        let ended = self
            .request_all(|reply| Command::Remove {
                uid: uid.clone(),
                removal,
                reply,
            })
            .await;
        if removal == Removal::Gone {
            self.lock_connections().remove(uid);
        }
        Ok(Draining { ended: ended? })
    }

    /// Drops the tunnels to a deleted workload from every pool, and its labels from every cache.
    ///
    /// # Errors
    /// Fails if a worker does not reply.
    pub async fn purge(&self, destination: &WorkloadUid) -> Result<(), Error> {
        self.request_all(|reply| Command::Purge {
            destination: destination.clone(),
            reply,
        })
        .await?;
        Ok(())
    }

    /// Checks that every worker replies.
    ///
    /// # Errors
    /// Fails with the first worker that does not reply.
    pub async fn ping(&self) -> Result<(), Error> {
        self.request_all(|reply| Command::Ping { reply }).await?;
        Ok(())
    }

    /// The open connections of one pod; empty for a pod that is unknown.
    pub fn connections(&self, uid: &WorkloadUid) -> Vec<ConnectionInfo> {
        let registry = self.lock_connections().get(uid).cloned();
        registry.map(|registry| registry.list()).unwrap_or_default()
    }

    /// Drains and ends the data plane: stops accepting, stops peers from opening new streams, waits
    /// for open connections until the deadline, resets the rest, and joins the threads. Every later
    /// request fails.
    pub async fn drain(&self, grace_period: Duration) {
        let deadline = Instant::now() + grace_period;
        let drains = self.workers.iter().map(|commands| async move {
            let (reply, ended) = oneshot::channel();
            let drain = Command::Drain { deadline, reply };
            if timeout(REPLY_TIMEOUT, commands.send(drain))
                .await
                .is_ok_and(|sent| sent.is_ok())
            {
                // A worker joins its tasks after the deadline. One that is stuck must not keep the
                // process running.
                let _ = timeout(grace_period + REPLY_TIMEOUT, ended).await;
            }
        });
        join_all(drains).await;
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads
            .into_iter()
            .filter(std::thread::JoinHandle::is_finished)
        {
            let _ = thread.join();
        }
    }

    /// Sends a command to every worker and waits for the replies. Fails with the first worker that
    /// does not reply.
    async fn request_all<T>(
        &self,
        command: impl Fn(oneshot::Sender<T>) -> Command,
    ) -> Result<Vec<T>, Error> {
        let requests = (0..self.workers.len()).map(|worker| self.request(worker, &command));
        join_all(requests).await.into_iter().collect()
    }

    async fn request<T>(
        &self,
        worker: usize,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Error> {
        let (reply, received) = oneshot::channel();
        let exchange = async {
            self.workers.get(worker)?.send(command(reply)).await.ok()?;
            received.await.ok()
        };
        timeout(REPLY_TIMEOUT, exchange)
            .await
            .ok()
            .flatten()
            .ok_or(Error::Unresponsive { worker })
    }

    fn lock_connections(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<WorkloadUid, Arc<ConnectionRegistry>>> {
        // No statement leaves the map half changed, so a poisoned lock is safe to use.
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
