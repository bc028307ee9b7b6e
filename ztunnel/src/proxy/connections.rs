//! The open connections of one pod: what its limit counts, what a removal or a policy change stops,
//! and what the config dump lists.
//!
//! A connection is registered before it is authorized, so that a policy that changes meanwhile
//! finds it here. Each worker has its own shard, which only the worker and the infrequent readers
//! on the control side lock.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use hbone::{Counters, StopToken};
use mesh::Denial;
use spiffe::SpiffeId;

use crate::telemetry::TrafficSeries;

pub use crate::telemetry::Direction;

/// One open connection, as the config dump shows it.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Seen from the pod.
    pub direction: Direction,
    /// The client.
    pub source: SocketAddr,
    /// The destination before the redirect.
    pub original_destination: SocketAddr,
    /// The address that was dialled; none until both sides are connected.
    pub actual_destination: Option<SocketAddr>,
    /// Whether it is inside a tunnel on the network.
    pub hbone: bool,
    /// Bytes from the client to the destination so far.
    pub sent: u64,
    /// Bytes from the destination to the client so far.
    pub received: u64,
}

/// The connections of one pod on all workers.
pub(crate) struct ConnectionRegistry {
    shards: Box<[Mutex<Shard>]>,
    open: AtomicUsize,
    limit: usize,
}

#[derive(Default)]
struct Shard {
    /// The key of the newest connection; the first key is 1.
    last_key: u64,
    /// By age, so that they can be iterated in batches.
    connections: BTreeMap<u64, Arc<Connection>>,
}

impl ConnectionRegistry {
    pub(crate) fn new(workers: usize, limit: usize) -> Self {
        Self {
            shards: (0..workers).map(|_| Mutex::default()).collect(),
            open: AtomicUsize::new(0),
            limit,
        }
    }

    /// A permit for one more connection; none at the limit.
    pub(crate) fn try_admit(self: &Arc<Self>) -> Option<ConnectionPermit> {
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.limit {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(ConnectionPermit {
            registry: self.clone(),
        })
    }

    /// The open connections on all workers.
    pub(crate) fn list(&self) -> Vec<ConnectionInfo> {
        (0..self.shards.len())
            .flat_map(|worker| self.on_worker(worker))
            .map(|connection| connection.info())
            .collect()
    }

    /// The open connections on one worker. A copy, so that callers hold no lock.
    pub(crate) fn on_worker(&self, worker: usize) -> Vec<Arc<Connection>> {
        self.shard(worker)
            .map(|shard| shard.connections.values().cloned().collect())
            .unwrap_or_default()
    }

    /// Fills `batch`, up to its capacity, with connections of one worker that are newer than the
    /// key `after`; 0 is older than the first. Returns the key to continue from; none if nothing is
    /// left.
    pub(crate) fn next_batch(
        &self,
        worker: usize,
        after: u64,
        batch: &mut Vec<Arc<Connection>>,
    ) -> Option<u64> {
        let shard = self.shard(worker)?;
        let newer = shard
            .connections
            .range((Bound::Excluded(after), Bound::Unbounded));
        let mut last = None;
        for (key, connection) in newer.take(batch.capacity()) {
            batch.push(connection.clone());
            last = Some(*key);
        }
        last
    }

    fn shard(&self, worker: usize) -> Option<MutexGuard<'_, Shard>> {
        // No statement leaves a shard half changed, so a poisoned lock is safe to use.
        self.shards
            .get(worker)
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Permits one connection; released on drop.
pub(crate) struct ConnectionPermit {
    registry: Arc<ConnectionRegistry>,
}

impl ConnectionPermit {
    /// Registers the connection that this permits.
    pub(crate) fn register(self, worker: usize, connection: Connection) -> Registration {
        let connection = Arc::new(connection);
        let key = self.registry.shard(worker).map_or(0, |mut shard| {
            shard.last_key += 1;
            let key = shard.last_key;
            shard.connections.insert(key, connection.clone());
            key
        });
        Registration {
            connection,
            permit: self,
            worker,
            key,
        }
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.registry.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's entry in the registry; removed on drop.
pub(crate) struct Registration {
    connection: Arc<Connection>,
    permit: ConnectionPermit,
    worker: usize,
    key: u64,
}

impl std::ops::Deref for Registration {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(mut shard) = self.permit.registry.shard(self.worker) {
            shard.connections.remove(&self.key);
        }
    }
}

/// What policies decide about for an inbound connection. It is fixed for the connection; the two
/// workloads are not, so each decision looks them up.
#[derive(Clone, Debug)]
pub(crate) struct AuthzRequest {
    /// The verified identity of the source; none for a plain connection.
    pub(crate) identity: Option<Arc<SpiffeId>>,
    /// The pod's own address and port.
    pub(crate) destination: SocketAddr,
}

/// The state of an open connection that the task that serves it shares with those that list, check
/// or stop it.
pub(crate) struct Connection {
    pub(crate) direction: Direction,
    pub(crate) source: SocketAddr,
    pub(crate) original_destination: SocketAddr,
    pub(crate) actual_destination: OnceLock<SocketAddr>,
    pub(crate) hbone: OnceLock<bool>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) stop: StopToken,
    authz_request: OnceLock<AuthzRequest>,
    denial: OnceLock<Denial>,
    /// The dry-run policy that would have denied it at the last decision that found one.
    dry_run_denial: Mutex<Option<Arc<str>>>,
    series: OnceLock<Arc<TrafficSeries>>,
    reported_sent: AtomicU64,
    reported_received: AtomicU64,
}

impl Connection {
    pub(crate) fn new(
        direction: Direction,
        source: SocketAddr,
        original_destination: SocketAddr,
    ) -> Self {
        Self {
            direction,
            source,
            original_destination,
            actual_destination: OnceLock::new(),
            hbone: OnceLock::new(),
            counters: Arc::default(),
            stop: StopToken::new(),
            authz_request: OnceLock::new(),
            denial: OnceLock::new(),
            dry_run_denial: Mutex::default(),
            series: OnceLock::new(),
            reported_sent: AtomicU64::new(0),
            reported_received: AtomicU64::new(0),
        }
    }

    /// Sets the request, once, and returns it. From now on every reauthorization checks it.
    pub(crate) fn set_request(&self, request: AuthzRequest) -> &AuthzRequest {
        self.authz_request.get_or_init(|| request)
    }

    /// The request to authorize again; none before it is set and after the connection is stopped.
    pub(crate) fn authz_request(&self) -> Option<&AuthzRequest> {
        self.authz_request
            .get()
            .filter(|_| self.stop.reason().is_none())
    }

    /// Stops the connection because a policy denies it.
    pub(crate) fn deny(&self, denial: Denial) {
        // The first denial wins, as the first reason of a stop does.
        let _ = self.denial.set(denial);
        self.stop.stop(Denial::CODE);
    }

    /// The denial that stopped the connection; none if something else did.
    pub(crate) fn denial(&self) -> Option<&Denial> {
        self.denial
            .get()
            .filter(|_| self.stop.reason() == Some(Denial::CODE))
    }

    /// Records that a dry-run policy would deny the connection. Returns whether that is new, so
    /// that a connection counts once per policy regardless of how often it is checked.
    pub(crate) fn record_dry_run_denial(&self, policy: &Arc<str>) -> bool {
        // A single assignment, so a poisoned lock is safe to use.
        let mut last = self
            .dry_run_denial
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(policy) {
            return false;
        }
        *last = Some(policy.clone());
        true
    }

    /// Counts the connection as opened, once, under the labels that it keeps until it is closed.
    pub(crate) fn mark_opened(&self, series: Arc<TrafficSeries>) {
        self.series.get_or_init(|| {
            series.record_opened();
            series
        });
    }

    /// The series in which it was opened.
    pub(crate) fn series(&self) -> Option<&Arc<TrafficSeries>> {
        self.series.get()
    }

    /// Adds the bytes that moved since the last call to the metrics, so that long connections are
    /// counted while they are open.
    pub(crate) fn report_bytes(&self) {
        let Some(series) = self.series.get() else {
            return;
        };
        let since = |now: &AtomicU64, reported: &AtomicU64| {
            let now = now.load(Ordering::Relaxed);
            now.saturating_sub(reported.swap(now, Ordering::Relaxed))
        };
        let sent = since(&self.counters.sent, &self.reported_sent);
        let received = since(&self.counters.received, &self.reported_received);
        series.add_bytes(sent, received);
    }

    fn info(&self) -> ConnectionInfo {
        ConnectionInfo {
            direction: self.direction,
            source: self.source,
            original_destination: self.original_destination,
            actual_destination: self.actual_destination.get().copied(),
            hbone: self.hbone.get().copied().unwrap_or(false),
            sent: self.counters.sent.load(Ordering::Relaxed),
            received: self.counters.received.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> Connection {
        let address = SocketAddr::from(([10, 0, 0, 1], 80));
        Connection::new(Direction::Outbound, address, address)
    }

    #[test]
    fn connection_limit_refuses_until_a_connection_closes() {
        let registry = Arc::new(ConnectionRegistry::new(1, 2));
        let first = registry.try_admit();
        let second = registry.try_admit();
        assert!(first.is_some() && second.is_some());
        assert!(registry.try_admit().is_none());
        drop(first);
        assert!(registry.try_admit().is_some());
    }

    #[test]
    fn connection_is_listed_on_its_worker_until_it_closes() {
        let registry = Arc::new(ConnectionRegistry::new(2, 10));
        let entry = registry
            .try_admit()
            .map(|permit| permit.register(1, connection()));
        assert_eq!(registry.list().len(), 1);
        assert_eq!(registry.on_worker(0).len(), 0);
        assert_eq!(registry.on_worker(1).len(), 1);
        drop(entry);
        assert_eq!(registry.list().len(), 0);
    }

    fn request() -> AuthzRequest {
        AuthzRequest {
            identity: None,
            destination: SocketAddr::from(([10, 0, 0, 1], 80)),
        }
    }

    #[test]
    fn request_is_authorized_again_until_the_connection_is_stopped() {
        let registry = Arc::new(ConnectionRegistry::new(1, 10));
        let entry = registry
            .try_admit()
            .map(|permit| permit.register(0, connection()))
            .unwrap();
        assert!(entry.authz_request().is_none());
        entry.set_request(request());
        assert!(entry.authz_request().is_some());
        entry.stop.stop("workload_gone");
        assert!(entry.authz_request().is_none());
    }

    #[test]
    fn batches_visit_each_connection_once_while_others_open_and_close() {
        let registry = Arc::new(ConnectionRegistry::new(1, 100));
        let register = || registry.try_admit().unwrap().register(0, connection());
        let mut open: Vec<_> = (0..10).map(|_| register()).collect();
        let (mut visited, mut after) = (0, 0);
        let mut batch = Vec::with_capacity(3);
        while let Some(last) = registry.next_batch(0, after, &mut batch) {
            visited += batch.len();
            after = last;
            batch.clear();
            if visited == 3 {
                // One that was visited, one that was not, and a new one.
                open.remove(9);
                open.remove(0);
                open.push(register());
            }
        }
        assert_eq!(visited, 10);
    }

    #[test]
    fn denial_names_its_policy_unless_another_stop_came_first() {
        let denial = Denial {
            policy: "AuthorizationPolicy shop/deny".into(),
        };
        let denied = connection();
        assert_eq!(denied.denial(), None);
        denied.deny(denial.clone());
        assert_eq!(denied.stop.reason(), Some(Denial::CODE));
        assert_eq!(denied.denial(), Some(&denial));
        let removed = connection();
        removed.stop.stop("workload_gone");
        removed.deny(denial);
        assert_eq!(removed.stop.reason(), Some("workload_gone"));
        assert_eq!(removed.denial(), None);
    }

    #[test]
    fn dry_run_denial_is_new_once_per_connection_and_policy() {
        let connection = connection();
        let (one, other) = ("one".into(), "other".into());
        assert!(connection.record_dry_run_denial(&one));
        assert!(!connection.record_dry_run_denial(&one));
        assert!(connection.record_dry_run_denial(&other));
    }
}
