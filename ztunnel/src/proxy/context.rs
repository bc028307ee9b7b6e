//! What connections share: with all workers, with their worker, and with their pod.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{Pool, PoolConfig, ServeConfig};
use mesh::{Store, WorkloadUid};
use spiffe::TrustDomain;
use tokio_util::sync::CancellationToken;

use super::connections::{Connection, ConnectionPermit, ConnectionRegistry, Registration};
use super::handshakes::HandshakeLimiter;
use super::sockets::PodSockets;
use crate::identity::Identities;
use crate::netns::Netns;
use crate::telemetry::{Telemetry, WorkerTelemetry};

/// What all workers share. It does not change after the start; its parts are read without a lock.
pub(crate) struct SharedContext {
    pub(crate) store: Store,
    pub(crate) identities: Identities,
    pub(crate) telemetry: Arc<Telemetry>,
    /// Other names of the mesh's trust domain.
    pub(crate) trust_domain_aliases: Vec<TrustDomain>,
    /// How long a tunnel takes new streams, at either end.
    pub(crate) tunnel_max_age: Duration,
    /// Tunnels of one pod that may be in their handshakes on one worker at a time.
    pub(crate) max_handshakes: usize,
}

/// What the pods of one worker share. Never leaves its thread.
pub(crate) struct WorkerContext {
    /// From 0; the worker's shard of every [`ConnectionRegistry`].
    pub(crate) number: usize,
    pub(crate) shared: Arc<SharedContext>,
    pub(crate) telemetry: WorkerTelemetry,
}

impl WorkerContext {
    /// To be called in the worker's runtime, whose metrics it exports.
    pub(crate) fn new(number: usize, shared: Arc<SharedContext>) -> Self {
        Self {
            number,
            telemetry: WorkerTelemetry::new(shared.telemetry.clone()),
            shared,
        }
    }
}

/// The two ways in which a pod stops.
#[derive(Clone, Default)]
pub(crate) struct Shutdown {
    /// Accept nothing more; open connections continue.
    pub(crate) drain: CancellationToken,
    /// End everything now.
    pub(crate) abort: CancellationToken,
}

/// What a pod's connections on one worker share. Never leaves its thread.
pub(crate) struct PodContext {
    pub(crate) uid: WorkloadUid,
    pub(crate) sockets: Rc<PodSockets>,
    pub(crate) pool: Pool,
    pub(crate) serve_config: ServeConfig,
    pub(crate) shutdown: Shutdown,
    pub(crate) random: RefCell<fastrand::Rng>,
    pub(crate) handshakes: Rc<HandshakeLimiter>,
    worker: Rc<WorkerContext>,
    connections: Arc<ConnectionRegistry>,
    abort_reason: Cell<Option<&'static str>>,
}

impl PodContext {
    pub(crate) fn new(
        uid: WorkloadUid,
        netns: Arc<Netns>,
        connections: Arc<ConnectionRegistry>,
        worker: Rc<WorkerContext>,
    ) -> Self {
        let sockets = Rc::new(PodSockets::new(netns));
        let max_age = worker.shared.tunnel_max_age;
        let pool_config = PoolConfig {
            max_age,
            ..PoolConfig::default()
        };
        Self {
            uid,
            pool: Pool::new(pool_config, sockets.clone()),
            sockets,
            serve_config: ServeConfig {
                max_age,
                ..ServeConfig::default()
            },
            shutdown: Shutdown::default(),
            random: RefCell::new(fastrand::Rng::new()),
            handshakes: HandshakeLimiter::new(worker.shared.max_handshakes),
            worker,
            connections,
            abort_reason: Cell::new(None),
        }
    }

    pub(crate) fn store(&self) -> &Store {
        &self.worker.shared.store
    }

    pub(crate) fn identities(&self) -> &Identities {
        &self.worker.shared.identities
    }

    pub(crate) fn telemetry(&self) -> &WorkerTelemetry {
        &self.worker.telemetry
    }

    pub(crate) fn trust_domain_aliases(&self) -> &[TrustDomain] {
        &self.worker.shared.trust_domain_aliases
    }

    /// A permit for one more connection; none if the pod has reached its limit.
    pub(crate) fn try_admit(&self) -> Option<ConnectionPermit> {
        self.connections.try_admit()
    }

    /// Registers a connection, before anything is decided about it.
    pub(crate) fn register(
        &self,
        permit: ConnectionPermit,
        connection: Connection,
    ) -> Registration {
        let registration = permit.register(self.worker.number, connection);
        // A connection that was accepted before the abort, but whose task had not run, was not in
        // the list that the abort stopped.
        if let Some(reason) = self.abort_reason.get() {
            registration.stop.stop(reason);
        }
        registration
    }

    /// See [`ConnectionRegistry::next_batch`]; of this worker.
    pub(crate) fn next_batch(&self, after: u64, batch: &mut Vec<Arc<Connection>>) -> Option<u64> {
        self.connections
            .next_batch(self.worker.number, after, batch)
    }

    /// Adds the bytes that open connections moved since the last call to the metrics.
    pub(crate) fn report_bytes(&self) {
        for connection in self.connections.on_worker(self.worker.number) {
            connection.report_bytes();
        }
    }

    /// Stops accepting, and stops peers from opening new streams. Open connections continue.
    pub(crate) fn drain(&self) {
        self.shutdown.drain.cancel();
    }

    /// Resets every connection now, with this reason code.
    pub(crate) fn abort(&self, reason: &'static str) {
        self.abort_reason.set(Some(reason));
        for connection in self.connections.on_worker(self.worker.number) {
            connection.stop.stop(reason);
        }
        self.shutdown.drain.cancel();
        self.shutdown.abort.cancel();
    }
}

#[cfg(test)]
impl PodContext {
    /// A pod of an empty model, in the network namespace of the test.
    pub(crate) fn for_tests() -> Self {
        Self::with_store("test".into(), Store::new())
    }

    /// A pod of this store, in the network namespace of the test.
    pub(crate) fn with_store(uid: WorkloadUid, store: Store) -> Self {
        Self::with_store_and_aliases(uid, store, vec![])
    }

    /// A pod of this store in a mesh whose trust domain has these aliases.
    pub(crate) fn with_store_and_aliases(
        uid: WorkloadUid,
        store: Store,
        trust_domain_aliases: Vec<TrustDomain>,
    ) -> Self {
        use mesh::certs::{Certificates, CertificatesConfig, LocalCa};
        let folder = tempfile::tempdir().unwrap();
        let ca = Arc::new(LocalCa::create(folder.path()).unwrap());
        let (certificates, _) = Certificates::new(ca, CertificatesConfig::default());
        let shared = SharedContext {
            store,
            identities: Identities::new(certificates, hbone::Revocations::none()),
            telemetry: Arc::new(Telemetry::new(None).unwrap()),
            trust_domain_aliases,
            tunnel_max_age: Duration::from_secs(3600),
            max_handshakes: 16,
        };
        Self::new(
            uid,
            Arc::new(Netns::current().unwrap()),
            Arc::new(ConnectionRegistry::new(1, 32_768)),
            Rc::new(WorkerContext::new(0, Arc::new(shared))),
        )
    }
}
