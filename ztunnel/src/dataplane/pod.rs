//! One pod on one worker: its listeners, its tunnels, its connections, and their ends.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{Pool, PoolConfig, ServeConfig};
use mesh::{Store, WorkloadUid};
use socket2::SockRef;
use spiffe::TrustDomain;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::PodListeners;
use super::listen::{Ends, Listener, accept_loop};
use super::registry::{Connection, Registered, Registry, Slot};
use super::sockets::{PodSockets, prepare};
use super::unproven::Unproven;
use crate::identity::Identities;
use crate::netns::Netns;
use crate::proxy;
use crate::telemetry::WorkerTelemetry;

/// What a pod's connections on this worker share. Never leaves its thread.
pub(crate) struct PodContext {
    pub(crate) uid: WorkloadUid,
    pub(crate) store: Store,
    pub(crate) identities: Identities,
    pub(crate) telemetry: Rc<WorkerTelemetry>,
    pub(crate) sockets: Rc<PodSockets>,
    pub(crate) pool: Pool,
    pub(crate) serve: ServeConfig,
    pub(crate) ends: Ends,
    pub(crate) random: RefCell<fastrand::Rng>,
    pub(crate) trust_domain_aliases: Arc<[TrustDomain]>,
    pub(crate) unproven: Rc<Unproven>,
    worker: usize,
    registry: Arc<Registry>,
    aborted: Cell<Option<&'static str>>,
}

impl PodContext {
    /// Room for one more connection, or none if the pod has as many as it may.
    pub(crate) fn admit(&self) -> Option<Slot> {
        self.registry.admit()
    }

    /// Enters a connection, before anything is decided about it.
    pub(crate) fn register(&self, slot: Slot, connection: Connection) -> Registered {
        let registered = slot.register(self.worker, connection);
        // One that was accepted but had not run when the pod was aborted is not in the list that
        // was stopped.
        if let Some(reason) = self.aborted.get() {
            registered.stop.stop(reason);
        }
        registered
    }

    /// Walks through the connections on this worker, see [`Registry::walk`].
    pub(super) fn walk(&self, after: u64, piece: &mut Vec<Arc<Connection>>) -> Option<u64> {
        self.registry.walk(self.worker, after, piece)
    }

    /// Adds what moved since the last time to the metrics.
    pub(super) fn report(&self) {
        self.registry
            .on(self.worker)
            .iter()
            .for_each(|connection| connection.report());
    }

    /// Nothing new is accepted; peers are told to open nothing new.
    pub(super) fn drain(&self) {
        self.ends.drain.cancel();
    }

    /// Resets everything now.
    pub(super) fn abort(&self, reason: &'static str) {
        self.aborted.set(Some(reason));
        self.registry
            .on(self.worker)
            .iter()
            .for_each(|connection| connection.stop.stop(reason));
        self.ends.drain.cancel();
        self.ends.abort.cancel();
    }
}

/// What a worker needs to make a [`PodContext`].
pub(super) struct PodParts {
    pub(super) uid: WorkloadUid,
    pub(super) netns: Arc<Netns>,
    pub(super) registry: Arc<Registry>,
    pub(super) worker: usize,
    pub(super) store: Store,
    pub(super) identities: Identities,
    pub(super) telemetry: Rc<WorkerTelemetry>,
    pub(super) trust_domain_aliases: Arc<[TrustDomain]>,
    pub(super) tunnel_max_age: Duration,
    /// Tunnels in their handshakes at a time.
    pub(super) unproven: usize,
}

impl PodContext {
    pub(super) fn new(parts: PodParts) -> Self {
        let sockets = Rc::new(PodSockets::new(parts.netns));
        let (dial, serve) = (PoolConfig::default(), ServeConfig::default());
        let max_age = parts.tunnel_max_age;
        let dial = PoolConfig { max_age, ..dial };
        Self {
            uid: parts.uid,
            store: parts.store,
            identities: parts.identities,
            telemetry: parts.telemetry,
            pool: Pool::new(dial, sockets.clone()),
            sockets,
            serve: ServeConfig { max_age, ..serve },
            ends: Ends {
                drain: CancellationToken::new(),
                abort: CancellationToken::new(),
                open: TaskTracker::new(),
            },
            random: RefCell::new(fastrand::Rng::new()),
            trust_domain_aliases: parts.trust_domain_aliases,
            unproven: Unproven::new(parts.unproven),
            worker: parts.worker,
            registry: parts.registry,
            aborted: Cell::new(None),
        }
    }
}

#[cfg(test)]
impl PodContext {
    /// A pod of which nothing is known, in the namespace of the test.
    pub(crate) fn for_tests() -> Self {
        Self::of("test".into(), Store::new())
    }

    /// A pod of this store, in the namespace of the test.
    pub(crate) fn of(uid: WorkloadUid, store: Store) -> Self {
        use mesh::certs::{Certificates, CertificatesConfig, LocalCa};
        let folder = tempfile::tempdir().unwrap();
        let ca = Arc::new(LocalCa::create(folder.path()).unwrap());
        let (certificates, _) = Certificates::new(ca, CertificatesConfig::default());
        let telemetry = crate::telemetry::Telemetry::new(None).unwrap();
        Self::new(PodParts {
            uid,
            netns: Arc::new(Netns::current().unwrap()),
            registry: Arc::new(Registry::new(1, 32_768)),
            worker: 0,
            store,
            identities: Identities::new(certificates, hbone::Revocations::none()),
            telemetry: Rc::new(WorkerTelemetry::new(Arc::new(telemetry))),
            trust_domain_aliases: Arc::default(),
            tunnel_max_age: Duration::from_secs(3600),
            unproven: 16,
        })
    }
}

/// The pod's listeners in the worker's runtime.
pub(super) struct Listening {
    outbound: Listener,
    inbound_plain: Listener,
    inbound_hbone: Listener,
}

impl Listening {
    /// Hands the listeners to the runtime of this thread. They are open until the pod's ends come.
    pub(super) fn new(listeners: PodListeners, ends: &Ends) -> io::Result<Self> {
        Ok(Self {
            outbound: Listener::new(listening(listeners.outbound)?, ends),
            inbound_plain: Listener::new(listening(listeners.inbound_plain)?, ends),
            inbound_hbone: Listener::new(listening(listeners.inbound_hbone)?, ends),
        })
    }
}

fn listening(listener: TcpListener) -> io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    prepare(&SockRef::from(&listener))?;
    tokio::net::TcpListener::from_std(listener)
}

/// Serves the pod until it is drained or aborted and its last connection has ended.
pub(super) async fn serve(pod: Rc<PodContext>, listening: Listening) {
    let mut loops = JoinSet::new();
    let (ends, telemetry) = (pod.ends.clone(), pod.telemetry.clone());
    let serving = pod.clone();
    loops.spawn_local(async move {
        let serve = |stream, peer| proxy::outbound::serve(serving.clone(), stream, peer);
        accept_loop(listening.outbound, ends, &telemetry, serve).await;
    });
    let (ends, telemetry, serving) = (pod.ends.clone(), pod.telemetry.clone(), pod.clone());
    loops.spawn_local(async move {
        let serve = |stream, peer| proxy::inbound_plain::serve(serving.clone(), stream, peer);
        accept_loop(listening.inbound_plain, ends, &telemetry, serve).await;
    });
    let (ends, telemetry, serving) = (pod.ends.clone(), pod.telemetry.clone(), pod.clone());
    loops.spawn_local(async move {
        let serve = |stream, peer| proxy::inbound::serve(serving.clone(), stream, peer);
        accept_loop(listening.inbound_hbone, ends, &telemetry, serve).await;
    });
    while loops.join_next().await.is_some() {}
    // Every connection has ended, so the tunnels carry nothing.
    pod.pool.close(Instant::now()).await;
}
