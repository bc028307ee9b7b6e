//! Who runs the requests to the source, and publishes their outcomes?
//!
//! The decisions are made elsewhere: which identity is next in `store`, when in `renewal_time`.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::certificate::IssuedCertificate;
use super::clock::Clock;
use super::source::{CertificateSource, IssueError, UpdateCounts};
use super::state::{CertificatesState, Counters, Shared};
use super::store::{CertStore, Completion, IssueOutcome, IssueRequest};
use super::trust_bundle::TrustBundle;
use super::verify_response::verify_response;

/// Longest time between two checks of the clocks: the time of day can be set, and timers stop while
/// the machine is suspended.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// Shortest time between two published states. Each state holds every identity, so at startup with
/// thousands of identities, changes are published in batches.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(10);
/// A request that started longer ago than this when an outage ends may hang on a broken connection.
const STALE_AFTER: Duration = Duration::from_secs(1);

/// How certificates are issued and renewed.
#[derive(Clone)]
pub struct CertificatesConfig {
    /// Requested lifetime of a leaf.
    pub ttl: Duration,
    /// Maximum number of concurrent requests.
    pub concurrency: usize,
    /// Deadline of one request.
    pub deadline: Duration,
    /// The time of day.
    pub clock: Clock,
}

impl Default for CertificatesConfig {
    fn default() -> Self {
        Self {
            // Istio's default.
            ttl: Duration::from_secs(24 * 3600),
            // A node starts with tens of identities. The limit keeps that from being a burst at the
            // source.
            concurrency: 8,
            deadline: Duration::from_secs(10),
            clock: Arc::new(SystemTime::now),
        }
    }
}

impl fmt::Debug for CertificatesConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificatesConfig")
            .field("ttl", &self.ttl)
            .field("concurrency", &self.concurrency)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// The task that issues and renews certificates. Its creator runs it once.
pub struct RenewalTask {
    shared: Arc<Shared>,
    source: Arc<dyn CertificateSource>,
    config: CertificatesConfig,
    identities: watch::Receiver<Arc<BTreeSet<SpiffeId>>>,
    bundles: watch::Receiver<Arc<TrustBundle>>,
    updates: Option<watch::Receiver<UpdateCounts>>,
    /// The identities and the update counts that were applied last.
    applied_identities: Arc<BTreeSet<SpiffeId>>,
    applied_updates: UpdateCounts,
    /// The last bundle that was not empty.
    bundle: Arc<TrustBundle>,
    store: CertStore,
    counters: Counters,
    requests: JoinSet<Result<IssuedCertificate, IssueError>>,
    in_flight: HashMap<Id, InFlight>,
    last_published: Option<Instant>,
    has_unpublished_changes: bool,
}

/// A request that was sent to the source.
struct InFlight {
    request: IssueRequest,
    started: Instant,
    abort: AbortHandle,
}

/// The end of a task in `requests`.
type Joined = Result<(Id, Result<IssuedCertificate, IssueError>), JoinError>;

impl RenewalTask {
    pub(super) fn new(
        shared: Arc<Shared>,
        source: Arc<dyn CertificateSource>,
        config: CertificatesConfig,
    ) -> Self {
        let mut task = Self {
            identities: shared.identities.subscribe(),
            shared,
            bundles: source.bundle(),
            updates: source.updates(),
            applied_identities: Arc::default(),
            applied_updates: UpdateCounts::new(),
            bundle: Arc::default(),
            store: CertStore::new(config.ttl),
            counters: Counters::default(),
            requests: JoinSet::new(),
            in_flight: HashMap::new(),
            last_published: None,
            has_unpublished_changes: true,
            source,
            config,
        };
        task.apply_bundle();
        task.apply_updates();
        task.publish();
        task
    }

    /// Issues and renews until cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut background = JoinSet::new();
        let source = self.source.clone();
        background.spawn(async move { source.run().await });
        loop {
            self.step();
            let pause = self.pause();
            tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = self.identities.changed() => {}
                Ok(()) = self.bundles.changed() => {}
                () = changed(self.updates.as_mut()) => self.apply_updates(),
                () = self.shared.priority_added.notified() => {}
                Some(joined) = self.requests.join_next_with_id() => self.complete(joined),
                Some(_) = background.join_next() => {
                    error!(
                        target: "mesh::certs",
                        "the background work of the certificate source has ended; certificates are no longer renewed"
                    );
                    break;
                }
                () = sleep(pause) => {}
            }
            while let Some(joined) = self.requests.try_join_next_with_id() {
                self.complete(joined);
            }
        }
        self.requests.shutdown().await;
        background.shutdown().await;
    }

    /// Applies all changes from outside, starts the requests that are due, and publishes the state.
    fn step(&mut self) {
        self.apply_bundle();
        self.apply_identities();
        let now = self.shared.now();
        for identity in self.store.remove_expired(now) {
            error!(
                target: "mesh::certs",
                %identity,
                "certificate_expired: it was not renewed before its end"
            );
            self.has_unpublished_changes = true;
        }
        let priorities = std::mem::take(&mut *self.shared.priorities());
        for (identity, priority) in &priorities {
            self.store.prioritize(identity, *priority, now);
        }
        let free = self.config.concurrency.saturating_sub(self.requests.len());
        for request in self.store.start_due(now, free) {
            self.spawn(request);
        }
        if self.has_unpublished_changes && self.publish_delay() == Duration::ZERO {
            self.publish();
        }
    }

    /// An empty bundle never replaces another one.
    fn apply_bundle(&mut self) {
        let bundle = self.bundles.borrow_and_update().clone();
        if bundle.is_empty() || bundle == self.bundle {
            return;
        }
        info!(target: "mesh::certs", roots = bundle.roots().len(), "the trust bundle has changed");
        let now = self.shared.now();
        self.store.set_bundle(&bundle, now, fastrand::f64);
        self.bundle = bundle;
        self.has_unpublished_changes = true;
    }

    fn apply_identities(&mut self) {
        let identities = self.identities.borrow_and_update().clone();
        if Arc::ptr_eq(&identities, &self.applied_identities) {
            return;
        }
        let now = self.shared.now();
        for identity in &self.store.set_identities(&identities, now) {
            self.source.remove_identity(identity);
        }
        self.applied_identities = identities;
        self.has_unpublished_changes = true;
        // Requests for removed identities give their capacity to others.
        let store = &self.store;
        let unneeded = self
            .in_flight
            .values()
            .filter(|one| !store.is_in_flight(&one.request));
        unneeded.for_each(|one| one.abort.abort());
    }

    fn apply_updates(&mut self) {
        let Some(updates) = &mut self.updates else {
            return;
        };
        let updates = updates.borrow_and_update().clone();
        let now = self.shared.now();
        for (identity, count) in &updates {
            if self.applied_updates.get(identity) != Some(count) {
                self.store.request_update(identity, now);
            }
        }
        self.applied_updates = updates;
    }

    fn spawn(&mut self, request: IssueRequest) {
        let (source, ttl) = (self.source.clone(), self.config.ttl);
        let (identity, deadline) = (request.identity.clone(), self.config.deadline);
        let abort = self.requests.spawn(async move {
            let issued = timeout(deadline, source.issue(&identity, ttl)).await;
            issued.unwrap_or_else(|_| {
                let message = format!("not issued within {deadline:?}");
                Err(IssueError::new(&identity, IssueError::TIMEOUT, message))
            })
        });
        let in_flight = InFlight {
            request,
            started: Instant::now(),
            abort: abort.clone(),
        };
        self.in_flight.insert(abort.id(), in_flight);
    }

    fn complete(&mut self, joined: Joined) {
        let id = match &joined {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Some(InFlight { request, .. }) = self.in_flight.remove(&id) else {
            return;
        };
        match joined {
            Ok((_, response)) => self.process(&request, response),
            Err(error) if error.is_cancelled() => self.store.cancel(&request, self.shared.now()),
            Err(_) => {
                let message = "the certificate source panicked";
                let error = IssueError::new(&request.identity, "source_failed", message);
                self.process(&request, Err(error));
            }
        }
    }

    /// Verifies a response, stores its certificate, and logs the outcome.
    fn process(&mut self, request: &IssueRequest, response: Result<IssuedCertificate, IssueError>) {
        // The response may have brought new roots.
        self.apply_bundle();
        let now = self.shared.now();
        let identity = &request.identity;
        let verified =
            response.and_then(|issued| verify_response(issued, identity, &self.bundle, now));
        let serial_or_error = match &verified {
            Ok(certificate) => Ok(certificate.serial.clone()),
            Err(error) => Err(error.clone()),
        };
        let completed = self.store.complete(request, verified, now, fastrand::f64);
        let Some(completion) = completed else {
            return;
        };
        self.has_unpublished_changes = true;
        match serial_or_error {
            Ok(serial) => self.record_success(identity, &serial, completion.outcome),
            Err(error) => self.record_failure(&error, &completion),
        }
        if completion.is_recovery {
            info!(target: "mesh::certs", "the certificate source responds again");
            self.abort_stale();
        }
    }

    fn record_success(&mut self, identity: &SpiffeId, serial: &str, outcome: Option<IssueOutcome>) {
        let is_renewal = match outcome {
            Some(IssueOutcome::First) => {
                self.counters.first_issues += 1;
                false
            }
            Some(IssueOutcome::Renewal) => {
                self.counters.renewals += 1;
                true
            }
            // Unchanged, or for an identity that was removed meanwhile.
            Some(IssueOutcome::Unchanged) | None => {
                debug!(target: "mesh::certs", %identity, serial, "no newer certificate yet");
                return;
            }
        };
        info!(target: "mesh::certs", %identity, serial, renewed = is_renewal, "certificate issued");
    }

    /// Logs a repeated failure at debug level: a waiting connection causes one request per second.
    fn record_failure(&mut self, error: &IssueError, completion: &Completion) {
        match completion.is_repeated_failure {
            false => warn!(target: "mesh::certs", "{error}"),
            true => debug!(target: "mesh::certs", "{error}"),
        }
        *self.counters.failures.entry(error.code).or_default() += 1;
    }

    /// Aborts requests from the time of the outage, which are then sent again: they may hang until
    /// their deadline on connections to a process that no longer exists.
    fn abort_stale(&self) {
        let stale = self
            .in_flight
            .values()
            .filter(|one| one.started.elapsed() > STALE_AFTER);
        stale.for_each(|one| one.abort.abort());
    }

    fn publish(&mut self) {
        self.shared.publish(CertificatesState {
            identities: self.store.status(),
            bundle: self.bundle.clone(),
            counters: self.counters.clone(),
        });
        self.last_published = Some(Instant::now());
        self.has_unpublished_changes = false;
    }

    /// The time until the next state may be published.
    fn publish_delay(&self) -> Duration {
        self.last_published.map_or(Duration::ZERO, |at| {
            PUBLISH_INTERVAL.saturating_sub(at.elapsed())
        })
    }

    /// The time until the next step, unless something changes before.
    fn pause(&self) -> Duration {
        let has_capacity = self.requests.len() < self.config.concurrency;
        let next = self.store.next_deadline(self.shared.now(), has_capacity);
        let next = next.map_or(CLOCK_CHECK_INTERVAL, |next| {
            next.saturating_duration_since(Instant::now())
        });
        let next = match self.has_unpublished_changes {
            true => next.min(self.publish_delay()),
            false => next,
        };
        next.clamp(Duration::from_millis(1), CLOCK_CHECK_INTERVAL)
    }
}

/// Waits for a change. Never returns for a source that reports none.
async fn changed(updates: Option<&mut watch::Receiver<UpdateCounts>>) {
    let is_open = match updates {
        Some(updates) => updates.changed().await.is_ok(),
        None => false,
    };
    if !is_open {
        std::future::pending::<()>().await;
    }
}
