//! The data plane: one thread per core, each with its own runtime, its own listeners in every pod
//! and its own tunnels.
//!
//! Workers share nothing but the store, the certificates and the counters, all of which are read
//! without a lock. The control side speaks to them through bounded channels and waits for the
//! answer with a deadline: a worker that does not answer is an error with its number in it, never a
//! control side that hangs. A connection is accepted, served and ended on one thread.

mod authorize;
mod listen;
mod pod;
mod pods;
pub(crate) mod recheck;
pub(crate) mod registry;
mod sockets;
pub(crate) mod unproven;
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

pub use registry::{ConnectionInfo, Direction};

use crate::admin::readiness::Readiness;
use crate::identity::Identities;
use crate::netns::Netns;
use crate::telemetry::Telemetry;
use registry::Registry;
use worker::{Command, Worker};

pub(crate) use pod::PodContext;

/// Commands that may wait for one worker. The control side sends a few per pod event and waits for
/// each answer.
const COMMANDS: usize = 256;

/// How long a worker may take to answer. It never blocks, so silence for this long means that it is
/// stuck.
const ANSWER: Duration = Duration::from_secs(5);

/// Connections that one pod may have open at a time, both directions together, unless configured
/// otherwise. At 5 KB each before its buffers grow this is 160 MB; without a bound one pod can take
/// the node's whole memory and every descriptor.
pub const CONNECTIONS_PER_POD: usize = 32_768;

/// Tunnels of one pod that may be in their handshakes at a time, unless configured otherwise. A
/// handshake takes milliseconds, so this is room for thousands of new peers a second; and it is all
/// that those can hold who prove nothing.
pub const UNPROVEN_PER_POD: usize = 1024;

/// What a data plane is made of.
pub struct DataPlaneConfig {
    /// Number of threads; at least one is started.
    pub workers: usize,
    /// Connections that one pod may have open at a time; see [`CONNECTIONS_PER_POD`].
    pub connections_per_pod: usize,
    /// Tunnels of one pod whose peers have not proven who they are; see [`UNPROVEN_PER_POD`].
    pub unproven_per_pod: usize,
    /// The certificates that the workers serve and dial with.
    pub identities: Identities,
    /// Other names of the mesh's trust domain: whoever proves an identity in one of them is of this
    /// mesh.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// How long a tunnel takes new connections, at either end.
    pub tunnel_max_age: Duration,
    /// The listener of the readiness port, which the first worker answers; none in tests.
    pub readiness: Option<(TcpListener, Arc<Readiness>)>,
}

/// A pod that takes part in the mesh.
pub struct Pod {
    /// Which workload it is; everything else about it is looked up when a connection needs it, and
    /// so is never stale.
    pub workload: WorkloadUid,
    /// Its network namespace, in which the workers make the sockets that they dial with.
    pub netns: Arc<Netns>,
    /// One set per worker.
    pub listeners: Vec<PodListeners>,
}

/// The three listeners of one pod for one worker, made inside the pod's network namespace.
pub struct PodListeners {
    /// 15001: what the pod opens.
    pub outbound: TcpListener,
    /// 15006: what reaches the pod in clear.
    pub inbound_plain: TcpListener,
    /// 15008: what reaches the pod through the mesh.
    pub inbound_hbone: TcpListener,
}

/// How a pod leaves the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It left the mesh but lives: nothing new is accepted, what is established lives on.
    OptOut,
    /// It is gone: every connection is reset now.
    Gone,
}

/// Why the data plane did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system gave no thread or no runtime.
    #[error("cannot start data-plane worker {worker}")]
    Start {
        /// Number of the worker, from 0.
        worker: usize,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A worker did not answer in time, or has ended.
    #[error("data-plane worker {worker} does not answer: it is stuck or has ended")]
    Unresponsive {
        /// Number of the worker, from 0.
        worker: usize,
    },
    /// The pod came with another number of listeners than there are workers.
    #[error("pod {uid} came with {listeners} sets of listeners for {workers} workers")]
    Listeners {
        /// The pod.
        uid: WorkloadUid,
        /// How many it came with.
        listeners: usize,
        /// How many are needed.
        workers: usize,
    },
    /// A listener could not be handed to the worker's runtime.
    #[error("cannot accept on the listeners of pod {uid}")]
    Accept {
        /// The pod.
        uid: WorkloadUid,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A pod that stopped accepting and whose last connections may still be open.
#[must_use = "the pod's return path may be removed only after its last connection has ended"]
pub struct Leaving {
    ended: Vec<oneshot::Receiver<()>>,
}

impl Leaving {
    /// Resolves when the pod's last connection has ended on every worker. This can take as long as
    /// the applications like.
    pub async fn ended(self) {
        // A worker that ended without an answer has ended its connections too.
        join_all(self.ended).await;
    }
}

/// The running data plane.
pub struct DataPlane {
    workers: Vec<mpsc::Sender<Command>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    registries: Mutex<HashMap<WorkloadUid, Arc<Registry>>>,
    connections_per_pod: usize,
}

impl DataPlane {
    /// Starts the workers. They live in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Fails if a thread or its runtime cannot be made.
    pub fn start(
        config: DataPlaneConfig,
        store: Store,
        telemetry: Arc<Telemetry>,
    ) -> Result<Self, Error> {
        let count = config.workers.max(1);
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mpsc::channel(COMMANDS)).unzip();
        let mut readiness = config.readiness;
        let trust_domain_aliases: Arc<[TrustDomain]> = config.trust_domain_aliases.into();
        let mut threads = Vec::with_capacity(count);
        for (worker, commands) in receivers.into_iter().enumerate() {
            let parts = worker::Parts {
                number: worker,
                store: store.clone(),
                identities: config.identities.clone(),
                telemetry: telemetry.clone(),
                trust_domain_aliases: trust_domain_aliases.clone(),
                tunnel_max_age: config.tunnel_max_age,
                // The kernel spreads new connections evenly over the workers.
                unproven_per_pod: config.unproven_per_pod.div_ceil(count),
                readiness: readiness.take().map(|(listener, state)| {
                    (
                        listener,
                        state,
                        senders.iter().map(mpsc::Sender::downgrade).collect(),
                    )
                }),
            };
            threads.push(
                Worker::spawn(parts, commands).map_err(|source| Error::Start { worker, source })?,
            );
        }
        Ok(Self {
            workers: senders,
            threads: Mutex::new(threads),
            registries: Mutex::default(),
            connections_per_pod: config.connections_per_pod,
        })
    }

    /// Number of workers, and so of listener sets that a [`Pod`] brings.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Takes a pod in. Resolves when every worker accepts on its listeners.
    ///
    /// # Errors
    /// Fails if a worker does not answer or cannot use its listeners; no worker serves the pod
    /// then.
    pub async fn add(&self, pod: Pod) -> Result<(), Error> {
        let Pod {
            workload,
            netns,
            listeners,
        } = pod;
        if listeners.len() != self.workers.len() {
            return Err(Error::Listeners {
                uid: workload,
                listeners: listeners.len(),
                workers: self.workers.len(),
            });
        }
        let registry = Arc::new(Registry::new(self.workers.len(), self.connections_per_pod));
        let answers = join_all(
            listeners
                .into_iter()
                .enumerate()
                .map(|(worker, listeners)| {
                    let (uid, netns, registry) =
                        (workload.clone(), netns.clone(), registry.clone());
                    self.ask(worker, |answer| Command::Add {
                        uid,
                        netns,
                        listeners,
                        registry,
                        answer,
                    })
                }),
        )
        .await;
        let failure = answers.into_iter().find_map(|answer| match answer {
            Ok(Ok(())) => None,
            Ok(Err(source)) => Some(Error::Accept {
                uid: workload.clone(),
                source,
            }),
            Err(error) => Some(error),
        });
        if let Some(error) = failure {
            // Workers that did accept must not go on serving half a pod; their answers add nothing
            // to the first failure.
            let _ = self.remove(&workload, Removal::Gone).await;
            return Err(error);
        }
        self.lock_registries().insert(workload, registry);
        Ok(())
    }

    /// Lets a pod go. Resolves when its listeners are closed on every worker; the answer tells when
    /// its connections have ended. A pod that is unknown, or has left before, is no error.
    /// [`Removal::Gone`] after [`Removal::OptOut`] ends what lived on.
    ///
    /// # Errors
    /// Fails if a worker does not answer.
    pub async fn remove(&self, uid: &WorkloadUid, how: Removal) -> Result<Leaving, Error> {
        let answers = join_all((0..self.workers.len()).map(|worker| {
            let uid = uid.clone();
            self.ask(worker, move |answer| Command::Remove { uid, how, answer })
        }))
        .await;
        if how == Removal::Gone {
            self.lock_registries().remove(uid);
        }
        let ended = answers.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(Leaving { ended })
    }

    /// Makes every pool forget its tunnels to a workload that is gone, and every cache its labels.
    ///
    /// # Errors
    /// Fails if a worker does not answer.
    pub async fn purge(&self, destination: &WorkloadUid) -> Result<(), Error> {
        let answers = join_all((0..self.workers.len()).map(|worker| {
            let destination = destination.clone();
            self.ask(worker, move |answer| Command::Purge {
                destination,
                answer,
            })
        }))
        .await;
        answers.into_iter().collect()
    }

    /// Asks every worker for a sign of life.
    ///
    /// # Errors
    /// Fails with the first worker that does not answer.
    pub async fn ping(&self) -> Result<(), Error> {
        let answers = join_all(
            (0..self.workers.len())
                .map(|worker| self.ask(worker, |answer| Command::Ping { answer })),
        )
        .await;
        answers.into_iter().collect()
    }

    /// Connections of one pod that are open now; empty for a pod that is not here.
    pub fn connections(&self, uid: &WorkloadUid) -> Vec<ConnectionInfo> {
        let registry = self.lock_registries().get(uid).cloned();
        registry.map(|registry| registry.list()).unwrap_or_default()
    }

    /// Ends the data plane: stops accepting, tells peers to open nothing new, waits for what is
    /// open until the deadline, resets the rest, and joins the threads. The data plane answers
    /// nothing afterwards.
    pub async fn drain(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        let ends = self.workers.iter().map(|commands| async move {
            let (answer, ended) = oneshot::channel();
            if timeout(ANSWER, commands.send(Command::Drain { until, answer }))
                .await
                .is_ok_and(|sent| sent.is_ok())
            {
                // A worker joins its tasks after the deadline; one that is stuck must not keep the
                // process alive.
                let _ = timeout(deadline + ANSWER, ended).await;
            }
        });
        join_all(ends).await;
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads
            .into_iter()
            .filter(std::thread::JoinHandle::is_finished)
        {
            let _ = thread.join();
        }
    }

    async fn ask<T>(
        &self,
        worker: usize,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let exchange = async {
            self.workers.get(worker)?.send(command(answer)).await.ok()?;
            answered.await.ok()
        };
        timeout(ANSWER, exchange)
            .await
            .ok()
            .flatten()
            .ok_or(Error::Unresponsive { worker })
    }

    fn lock_registries(&self) -> std::sync::MutexGuard<'_, HashMap<WorkloadUid, Arc<Registry>>> {
        // The map is whole between any two statements, so a panic elsewhere while it was held has
        // not broken it.
        self.registries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
