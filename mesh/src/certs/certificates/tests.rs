//! Issuing and renewing against a simulated source, in virtual time.

mod outages;

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::certs::{
    Authority, Clock, IdentityState, IssueError, IssueFuture, IssuedCertificate, TrustBundle,
    UpdateCounts, Validity,
};

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

/// Issues from a real CA at virtual time. The test sets its behavior.
struct Source {
    authority: Mutex<Arc<Authority>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    updates: watch::Sender<UpdateCounts>,
    clock: Clock,
    behavior: watch::Sender<Behavior>,
    /// Identity and time of each request that ended.
    requests: Mutex<Vec<(SpiffeId, SystemTime)>>,
    removed: Mutex<Vec<SpiffeId>>,
    concurrency: Mutex<Concurrency>,
}

/// Requests in flight.
#[derive(Clone, Copy, Debug, Default)]
struct Concurrency {
    current: usize,
    max: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Behavior {
    Issue,
    Slow(Duration),
    /// Responds with an error.
    Fail,
    /// Refuses the connection.
    Unreachable,
    /// Never responds.
    Hang,
    Panic,
    Invalid(InvalidResponse),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum InvalidResponse {
    Malformed,
    AnotherIdentity,
    AnotherKey,
    AnotherRoot,
    Expired,
    Future,
    LongChain,
}

impl CertificateSource for Source {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            self.count(1);
            // Also counts a request that is dropped before it ends.
            let _guard = CountGuard(self);
            let behavior = *self.behavior.borrow();
            match behavior {
                Behavior::Slow(delay) => sleep(delay).await,
                Behavior::Hang => std::future::pending().await,
                _ => {}
            }
            let request = (identity.clone(), (self.clock)());
            self.requests.lock().unwrap().push(request);
            match behavior {
                Behavior::Fail => Err(IssueError::new(
                    identity,
                    "test_failure",
                    "simulated failure",
                )),
                Behavior::Unreachable => Err(IssueError::new(
                    identity,
                    "ca_unreachable",
                    "connection refused",
                )),
                Behavior::Panic => panic!("simulated panic"),
                Behavior::Invalid(how) => Ok(self.invalid(how, identity, ttl)),
                _ => Ok(self.valid(identity, ttl)),
            }
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    fn updates(&self) -> Option<watch::Receiver<UpdateCounts>> {
        Some(self.updates.subscribe())
    }

    fn remove_identity(&self, identity: &SpiffeId) {
        self.removed.lock().unwrap().push(identity.clone());
    }
}

struct CountGuard<'a>(&'a Source);

impl Drop for CountGuard<'_> {
    fn drop(&mut self) {
        self.0.count(-1);
    }
}

impl Source {
    fn count(&self, by: isize) {
        let mut concurrency = self.concurrency.lock().unwrap();
        concurrency.current = concurrency.current.checked_add_signed(by).unwrap();
        concurrency.max = concurrency.max.max(concurrency.current);
    }

    fn valid(&self, identity: &SpiffeId, ttl: Duration) -> IssuedCertificate {
        let validity = Validity::new((self.clock)(), ttl);
        self.authority().issue(identity, validity).unwrap()
    }

    fn invalid(
        &self,
        how: InvalidResponse,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> IssuedCertificate {
        let now = (self.clock)();
        let mut issued = self.valid(identity, ttl);
        let with_validity = |not_before, not_after| {
            let validity = Validity {
                not_before,
                not_after,
            };
            self.authority().issue(identity, validity).unwrap()
        };
        match how {
            InvalidResponse::Malformed => issued.chain[0] = b"not DER".to_vec().into(),
            InvalidResponse::AnotherIdentity => return self.valid(&id("other"), ttl),
            InvalidResponse::AnotherKey => issued.key = self.valid(identity, ttl).key,
            InvalidResponse::AnotherRoot => {
                return authority()
                    .issue(identity, Validity::new(now, ttl))
                    .unwrap();
            }
            InvalidResponse::Expired => return with_validity(now - HOUR, now - SECOND),
            InvalidResponse::Future => return with_validity(now + HOUR, now + 2 * HOUR),
            InvalidResponse::LongChain => issued.chain = vec![issued.chain[0].clone(); 50],
        }
        issued
    }

    fn authority(&self) -> Arc<Authority> {
        self.authority.lock().unwrap().clone()
    }

    fn set_behavior(&self, behavior: Behavior) {
        self.behavior.send_replace(behavior);
    }

    fn set_authority(&self, authority: &Arc<Authority>) {
        *self.authority.lock().unwrap() = authority.clone();
    }

    fn publish_roots_of(&self, authorities: &[&Arc<Authority>]) {
        let roots = authorities
            .iter()
            .flat_map(|one| one.bundle().roots().to_vec());
        self.bundle
            .send_replace(Arc::new(TrustBundle::new(roots).unwrap()));
    }

    fn request_count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

fn authority() -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(Authority::create(folder.path()).unwrap())
}

struct Fixture {
    source: Arc<Source>,
    certificates: Certificates,
    stop: CancellationToken,
    task: JoinHandle<()>,
    clock: Clock,
    /// Seconds by which this node's time of day is ahead of the source's.
    skew: Arc<AtomicI64>,
}

impl Fixture {
    fn new() -> Self {
        Self::with(CertificatesConfig::default())
    }

    fn with_ttl(ttl: Duration) -> Self {
        Self::with(CertificatesConfig {
            ttl,
            ..CertificatesConfig::default()
        })
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the test owns and joins the task"
    )]
    fn with(config: CertificatesConfig) -> Self {
        let (start, base) = (Instant::now(), SystemTime::now());
        let source_clock: Clock = Arc::new(move || base + start.elapsed());
        let skew = Arc::new(AtomicI64::new(0));
        let (correct, offset) = (source_clock.clone(), skew.clone());
        let clock: Clock = Arc::new(move || {
            let by = offset.load(SeqCst);
            match Duration::from_secs(by.unsigned_abs()) {
                ahead if by > 0 => correct() + ahead,
                behind => correct() - behind,
            }
        });
        let authority = authority();
        let source = Arc::new(Source {
            bundle: watch::Sender::new(Arc::new(authority.bundle().clone())),
            updates: watch::Sender::default(),
            authority: Mutex::new(authority),
            clock: source_clock,
            behavior: watch::Sender::new(Behavior::Issue),
            requests: Mutex::default(),
            removed: Mutex::default(),
            concurrency: Mutex::default(),
        });
        let config = CertificatesConfig {
            clock: clock.clone(),
            ..config
        };
        let (certificates, task) = Certificates::new(source.clone(), config);
        let stop = CancellationToken::new();
        let task = tokio::spawn(task.run(stop.clone()));
        Self {
            source,
            certificates,
            stop,
            task,
            clock,
            skew,
        }
    }

    fn set_identities(&self, names: &[&str]) {
        self.certificates
            .set_identities(names.iter().map(|name| id(name)).collect());
    }

    fn current(&self, name: &str) -> Option<Arc<Certificate>> {
        self.certificates.current(&id(name))
    }

    fn status(&self) -> IdentityStatus {
        self.certificates.state().identities[0].clone()
    }

    fn state(&self) -> IdentityState {
        self.status().state
    }

    fn last_error(&self) -> &'static str {
        self.status().last_error.unwrap().code
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("sa{i:04}")).collect()
}

fn strs(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

fn id(name: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
        .parse()
        .unwrap()
}

/// Advances virtual time, which the runtime does while all tasks wait.
async fn advance(time: Duration) {
    sleep(time).await;
}

/// Longer than the publish interval.
const MOMENT: Duration = Duration::from_millis(15);

#[tokio::test(start_paused = true)]
async fn a_new_identity_is_issued_at_once_and_subscribers_are_notified() {
    let fixture = Fixture::new();
    let mut version = fixture.certificates.subscribe();
    fixture.set_identities(&["web"]);
    while fixture.current("web").is_none() {
        version.changed().await.unwrap();
    }
    assert_eq!(fixture.state(), IdentityState::Available);
    assert!(fixture.current("db").is_none());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_at_about_half_of_its_lifetime() {
    let fixture = Fixture::new();
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    let first = fixture.current("web").unwrap().serial.clone();
    advance(HOUR * 24 * 44 / 100).await;
    assert_eq!(fixture.current("web").unwrap().serial, first);
    advance(HOUR * 24 * 12 / 100).await;
    assert_ne!(fixture.current("web").unwrap().serial, first);
    advance(HOUR * 24 * 365).await;
    let requests = fixture.source.request_count();
    assert!(
        (640..=830).contains(&requests),
        "about two per day: {requests}"
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn renewals_of_identities_issued_together_are_spread() {
    let fixture = Fixture::new();
    let names = names(50);
    fixture.set_identities(&strs(&names));
    advance(HOUR * 24 * 56 / 100).await;
    let issued = fixture.source.requests.lock().unwrap()[50..].to_vec();
    assert_eq!(issued.len(), 50);
    let (first, last) = (issued[0].1, issued[49].1);
    assert!(
        last.duration_since(first).unwrap() > HOUR,
        "over more than an hour"
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_certificate_stays_until_its_expiry_while_renewals_fail() {
    let fixture = Fixture::new();
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    fixture.source.set_behavior(Behavior::Fail);
    advance(HOUR * 23).await;
    assert!(fixture.current("web").is_some());
    assert_eq!(fixture.last_error(), "test_failure");
    let mut version = fixture.certificates.subscribe();
    advance(HOUR + MOMENT).await;
    assert!(
        fixture.current("web").is_none(),
        "not used after its expiry"
    );
    assert!(version.has_changed().unwrap());
    version.mark_unchanged();
    assert!(matches!(fixture.state(), IdentityState::Expired { .. }));
    fixture.source.set_behavior(Behavior::Issue);
    advance(Duration::from_secs(200)).await;
    assert!(
        fixture.current("web").is_some(),
        "issued again without a trigger"
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn failed_requests_are_repeated_at_growing_intervals() {
    let fixture = Fixture::new();
    fixture.source.set_behavior(Behavior::Fail);
    fixture.set_identities(&["web"]);
    advance(HOUR).await;
    let times: Vec<SystemTime> = fixture
        .source
        .requests
        .lock()
        .unwrap()
        .iter()
        .map(|(_, time)| *time)
        .collect();
    let gaps: Vec<f64> = times
        .windows(2)
        .map(|w| w[1].duration_since(w[0]).unwrap().as_secs_f64())
        .collect();
    assert!(
        (0.7..1.4).contains(&gaps[0]) && (1.5..2.6).contains(&gaps[1]),
        "{gaps:?}"
    );
    assert!(gaps.iter().all(|gap| *gap < 181.0), "{gaps:?}");
    assert!((25..50).contains(&times.len()), "{}", times.len());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn requests_that_hang_time_out_and_do_not_block_others() {
    let fixture = Fixture::new();
    fixture.source.set_behavior(Behavior::Slow(HOUR));
    let names = names(20);
    fixture.set_identities(&strs(&names));
    advance(Duration::from_secs(11)).await;
    assert_eq!(fixture.last_error(), "issue_timeout");
    fixture.source.set_behavior(Behavior::Issue);
    advance(Duration::from_secs(60)).await;
    assert!(names.iter().all(|name| fixture.current(name).is_some()));
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn at_most_eight_requests_are_in_flight() {
    let fixture = Fixture::new();
    fixture
        .source
        .set_behavior(Behavior::Slow(Duration::from_secs(1)));
    let names = names(40);
    fixture.set_identities(&strs(&names));
    advance(Duration::from_secs(6)).await;
    assert_eq!(fixture.source.concurrency.lock().unwrap().max, 8);
    assert!(
        names.iter().all(|name| fixture.current(name).is_some()),
        "five batches of one second"
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn invalid_responses_are_rejected_with_a_reason_and_the_old_certificate_stays() {
    for (how, code) in [
        (InvalidResponse::Malformed, "issued_garbage"),
        (InvalidResponse::AnotherIdentity, "wrong_identity"),
        (InvalidResponse::AnotherKey, "key_mismatch"),
        (InvalidResponse::AnotherRoot, "chain_untrusted"),
        (InvalidResponse::Expired, "issued_expired"),
        (InvalidResponse::Future, "issued_in_future"),
        (InvalidResponse::LongChain, "chain_too_long"),
    ] {
        let fixture = Fixture::new();
        fixture.set_identities(&["web"]);
        advance(MOMENT).await;
        let previous = fixture.current("web").unwrap();
        fixture.source.set_behavior(Behavior::Invalid(how));
        advance(HOUR * 14).await;
        assert_eq!(fixture.last_error(), code);
        assert!(
            Arc::ptr_eq(&fixture.current("web").unwrap(), &previous),
            "{code}"
        );
        let counters = fixture.certificates.state().counters.clone();
        assert!(
            counters.failures[code] > 10 && counters.failures.len() == 1,
            "{counters:?}"
        );
        advance(HOUR * 11).await;
        assert!(fixture.current("web").is_none() && fixture.current("other").is_none());
        assert!(matches!(fixture.state(), IdentityState::Expired { .. }));
        fixture.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_key_of_a_removed_identity_is_dropped() {
    let fixture = Fixture::new();
    fixture.set_identities(&["web", "db"]);
    advance(MOMENT).await;
    let weak = Arc::downgrade(&fixture.current("web").unwrap());
    fixture.set_identities(&["db"]);
    advance(MOMENT).await;
    assert!(fixture.current("web").is_none() && fixture.current("db").is_some());
    advance(MOMENT).await;
    assert!(weak.upgrade().is_none(), "no reference is left");
    assert_eq!(*fixture.source.removed.lock().unwrap(), [id("web")]);
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_identity_removed_while_a_request_is_in_flight_stays_removed() {
    let fixture = Fixture::new();
    fixture
        .source
        .set_behavior(Behavior::Slow(Duration::from_secs(1)));
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    fixture.set_identities(&[]);
    advance(Duration::from_secs(5)).await;
    assert!(fixture.current("web").is_none());
    assert!(fixture.certificates.state().identities.is_empty());
    assert_eq!(
        fixture.source.concurrency.lock().unwrap().current,
        0,
        "the request was aborted"
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn validity_is_checked_against_the_configured_clock() {
    let fixture = Fixture::new();
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    let certificate = fixture.current("web").unwrap();
    let remaining = certificate
        .not_after
        .duration_since((fixture.clock)())
        .unwrap();
    assert!(remaining > HOUR * 23 && remaining <= HOUR * 24);
    fixture.stop().await;
}
