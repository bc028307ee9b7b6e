//! The connections of one pod that are open now: what the limit counts, what a removal stops, what
//! the admin page lists.
//!
//! A connection is registered before anybody decides about it, so that a decision that changes
//! meanwhile finds it here. Each worker has its own shard, which only the worker itself and the
//! rare reader from the control side ever lock.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use hbone::{Counters, StopToken};
use mesh::Denial;
use spiffe::SpiffeId;

use crate::telemetry::Series;

/// Which way a connection crosses the pod's border.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Someone reached the pod.
    Inbound,
    /// The pod reached someone.
    Outbound,
}

impl Direction {
    /// The word of the access log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// One open connection, as the admin page shows it.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Which way it goes.
    pub direction: Direction,
    /// Who opened it.
    pub source: SocketAddr,
    /// Where its opener wanted to go.
    pub original_destination: SocketAddr,
    /// Where it went; none while that is being decided.
    pub actual_destination: Option<SocketAddr>,
    /// Whether it is inside a tunnel on the network.
    pub hbone: bool,
    /// Bytes from the opener to the destination so far.
    pub sent: u64,
    /// Bytes from the destination to the opener so far.
    pub received: u64,
}

/// The connections of one pod on all workers.
pub(crate) struct Registry {
    shards: Box<[Mutex<Shard>]>,
    open: AtomicUsize,
    limit: usize,
}

#[derive(Default)]
struct Shard {
    /// The key of the newest; the first is 1.
    newest: u64,
    /// In the order in which they began, so that they can be walked through in pieces.
    connections: BTreeMap<u64, Arc<Connection>>,
}

impl Registry {
    pub(crate) fn new(workers: usize, limit: usize) -> Self {
        Self {
            shards: (0..workers).map(|_| Mutex::default()).collect(),
            open: AtomicUsize::new(0),
            limit,
        }
    }

    /// Room for one more connection, or none if the pod has as many as it may.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<Slot> {
        if self.open.fetch_add(1, Ordering::Relaxed) >= self.limit {
            self.open.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        Some(Slot {
            registry: self.clone(),
        })
    }

    /// Everything that is open now.
    pub(crate) fn list(&self) -> Vec<ConnectionInfo> {
        (0..self.shards.len())
            .flat_map(|worker| self.on(worker))
            .map(|connection| connection.info())
            .collect()
    }

    /// Everything that is open on one worker. A copy, so that nothing is done under the lock.
    pub(crate) fn on(&self, worker: usize) -> Vec<Arc<Connection>> {
        self.shard(worker)
            .map(|shard| shard.connections.values().cloned().collect())
            .unwrap_or_default()
    }

    /// Fills `piece` with the connections on one worker that began after the one with this key, up
    /// to its capacity. Answers with the key to go on from; none if nothing is left. A key of 0 is
    /// before the first.
    pub(crate) fn walk(
        &self,
        worker: usize,
        after: u64,
        piece: &mut Vec<Arc<Connection>>,
    ) -> Option<u64> {
        let shard = self.shard(worker)?;
        let rest = shard
            .connections
            .range((Bound::Excluded(after), Bound::Unbounded));
        let mut last = None;
        for (key, connection) in rest.take(piece.capacity()) {
            piece.push(connection.clone());
            last = Some(*key);
        }
        last
    }

    fn shard(&self, worker: usize) -> Option<MutexGuard<'_, Shard>> {
        // The maps are whole between any two statements, so a panic elsewhere has not broken them.
        self.shards
            .get(worker)
            .map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Room for one connection; given back on drop.
pub(crate) struct Slot {
    registry: Arc<Registry>,
}

impl Slot {
    /// Enters the connection that the room was taken for.
    pub(crate) fn register(self, worker: usize, connection: Connection) -> Registered {
        let connection = Arc::new(connection);
        let key = self.registry.shard(worker).map_or(0, |mut shard| {
            shard.newest += 1;
            let key = shard.newest;
            shard.connections.insert(key, connection.clone());
            key
        });
        Registered {
            connection,
            slot: self,
            worker,
            key,
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.registry.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's entry; removed on drop.
pub(crate) struct Registered {
    connection: Arc<Connection>,
    slot: Slot,
    worker: usize,
    key: u64,
}

impl std::ops::Deref for Registered {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(mut shard) = self.slot.registry.shard(self.worker) {
            shard.connections.remove(&self.key);
        }
    }
}

/// What an inbound connection asks for. It stays the same while the connection lives; what is known
/// of the two workloads does not, so they are looked up for each decision.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// Who the source proved to be; none for what came in clear.
    pub(crate) identity: Option<Arc<SpiffeId>>,
    /// The pod's own address and port.
    pub(crate) destination: SocketAddr,
}

/// What is shared about an open connection between the task that serves it and everybody who
/// watches or ends it.
pub(crate) struct Connection {
    pub(crate) direction: Direction,
    pub(crate) source: SocketAddr,
    pub(crate) original_destination: SocketAddr,
    pub(crate) actual_destination: OnceLock<SocketAddr>,
    pub(crate) hbone: OnceLock<bool>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) stop: StopToken,
    request: OnceLock<Request>,
    denial: OnceLock<Denial>,
    /// The policy on trial that would have denied it, as of the last decision that said so.
    on_trial: Mutex<Option<Arc<str>>>,
    series: OnceLock<Arc<Series>>,
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
            request: OnceLock::new(),
            denial: OnceLock::new(),
            on_trial: Mutex::default(),
            series: OnceLock::new(),
            reported_sent: AtomicU64::new(0),
            reported_received: AtomicU64::new(0),
        }
    }

    /// Says what it asks for, once: from now on whoever re-checks connections finds it. Answers with
    /// what is to be decided about.
    pub(crate) fn asks(&self, request: Request) -> &Request {
        self.request.get_or_init(|| request)
    }

    /// What the policies are to be asked about again: it has asked to be let in, and nobody has told
    /// it to end.
    pub(crate) fn subject(&self) -> Option<&Request> {
        self.request.get().filter(|_| self.stop.reason().is_none())
    }

    /// Ends it because a policy denies it. The policy is known to whoever hears of the end.
    pub(crate) fn deny(&self, denial: Denial) {
        // The first denial wins, as the first reason of a stop does.
        let _ = self.denial.set(denial);
        self.stop.stop(Denial::CODE);
    }

    /// The policy that ended it, if one did.
    pub(crate) fn denial(&self) -> Option<&Denial> {
        self.denial
            .get()
            .filter(|_| self.stop.reason() == Some(Denial::CODE))
    }

    /// Remembers the policy on trial that would deny it. True the first time, so that a connection
    /// counts once for a policy however often it is re-checked.
    pub(crate) fn first_tried_by(&self, policy: &Arc<str>) -> bool {
        // A name is whole whoever panicked.
        let mut last = self.on_trial.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() == Some(policy) {
            return false;
        }
        *last = Some(policy.clone());
        true
    }

    /// Counts the connection as opened, once, under the labels that it keeps until it is closed.
    pub(crate) fn opened(&self, series: Arc<Series>) {
        self.series.get_or_init(|| {
            series.opened();
            series
        });
    }

    /// The labels under which it was opened.
    pub(crate) fn series(&self) -> Option<&Arc<Series>> {
        self.series.get()
    }

    /// Adds the bytes that moved since the last time to the metrics. Long connections are reported
    /// while they live.
    pub(crate) fn report(&self) {
        let Some(series) = self.series.get() else {
            return;
        };
        let since = |now: &AtomicU64, reported: &AtomicU64| {
            let now = now.load(Ordering::Relaxed);
            now.saturating_sub(reported.swap(now, Ordering::Relaxed))
        };
        let sent = since(&self.counters.sent, &self.reported_sent);
        let received = since(&self.counters.received, &self.reported_received);
        series.moved(sent, received);
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
    fn a_pod_opens_no_more_connections_than_it_may_and_closing_one_makes_room() {
        let registry = Arc::new(Registry::new(1, 2));
        let first = registry.admit();
        let second = registry.admit();
        assert!(first.is_some() && second.is_some());
        assert!(registry.admit().is_none());
        drop(first);
        assert!(registry.admit().is_some());
    }

    #[test]
    fn an_entry_is_listed_while_its_connection_lives_and_no_longer() {
        let registry = Arc::new(Registry::new(2, 10));
        let entry = registry.admit().map(|slot| slot.register(1, connection()));
        assert_eq!(registry.list().len(), 1);
        assert_eq!(registry.on(0).len(), 0);
        assert_eq!(registry.on(1).len(), 1);
        drop(entry);
        assert_eq!(registry.list().len(), 0);
    }

    fn request() -> Request {
        Request {
            identity: None,
            destination: SocketAddr::from(([10, 0, 0, 1], 80)),
        }
    }

    #[test]
    fn a_connection_is_re_checked_from_when_it_asks_until_it_is_told_to_end() {
        let registry = Arc::new(Registry::new(1, 10));
        let entry = registry
            .admit()
            .map(|slot| slot.register(0, connection()))
            .unwrap();
        assert!(entry.subject().is_none());
        entry.asks(request());
        assert!(entry.subject().is_some());
        entry.stop.stop("workload_gone");
        assert!(entry.subject().is_none());
    }

    #[test]
    fn a_walk_in_pieces_meets_each_connection_once_though_others_come_and_go() {
        let registry = Arc::new(Registry::new(1, 100));
        let enter = || registry.admit().unwrap().register(0, connection());
        let mut open: Vec<_> = (0..10).map(|_| enter()).collect();
        let (mut met, mut at) = (0, 0);
        let mut piece = Vec::with_capacity(3);
        while let Some(last) = registry.walk(0, at, &mut piece) {
            met += piece.len();
            at = last;
            piece.clear();
            if met == 3 {
                // One that was met, one that was not, and a new one.
                open.remove(9);
                open.remove(0);
                open.push(enter());
            }
        }
        assert_eq!(met, 10);
    }

    #[test]
    fn a_denial_names_its_policy_unless_something_else_ended_the_connection_before() {
        let denial = Denial {
            policy: "AuthorizationPolicy shop/deny".into(),
        };
        let denied = connection();
        assert_eq!(denied.denial(), None);
        denied.deny(denial.clone());
        assert_eq!(denied.stop.reason(), Some(Denial::CODE));
        assert_eq!(denied.denial(), Some(&denial));
        let gone = connection();
        gone.stop.stop("workload_gone");
        gone.deny(denial);
        assert_eq!(gone.stop.reason(), Some("workload_gone"));
        assert_eq!(gone.denial(), None);
    }

    #[test]
    fn a_policy_on_trial_is_told_of_once_for_each_connection() {
        let connection = connection();
        let (one, other) = ("one".into(), "other".into());
        assert!(connection.first_tried_by(&one));
        assert!(!connection.first_tried_by(&one));
        assert!(connection.first_tried_by(&other));
    }
}
