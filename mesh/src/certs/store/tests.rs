mod properties;

use std::sync::Arc;
use std::time::SystemTime;

use zeroize::Zeroizing;

use super::*;
use crate::certs::clock::MAX_CLOCK_SKEW;
use crate::certs::renewal_time::MIN_RETRY_DELAY;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
/// The mean delay.
const NO_JITTER: fn() -> f64 = || 0.5;

fn id(name: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
        .parse()
        .unwrap()
}

fn ids(names: &[&str]) -> BTreeSet<SpiffeId> {
    names.iter().map(|name| id(name)).collect()
}

fn start() -> Now {
    Now {
        wall: SystemTime::UNIX_EPOCH + 500 * 24 * HOUR,
        monotonic: Instant::now(),
    }
}

impl Now {
    fn after(self, time: Duration) -> Self {
        Self {
            wall: self.wall + time,
            monotonic: self.monotonic + time,
        }
    }
}

/// A certificate without a chain: these tests verify none.
fn certificate(identity: &SpiffeId, now: Now, lifetime: Duration) -> Certificate {
    Certificate {
        identity: identity.clone(),
        chain: vec![],
        not_before: now.wall,
        not_after: now.wall + lifetime,
        serial: "01".to_owned(),
        expires_at: now.monotonic + lifetime,
        key: Zeroizing::default(),
    }
}

fn unreachable(identity: &SpiffeId) -> IssueError {
    IssueError::new(identity, IssueError::UNREACHABLE, "connection refused")
}

fn denied(identity: &SpiffeId) -> IssueError {
    IssueError::new(identity, IssueError::DENIED, "not authorized")
}

/// A store and its current time.
struct Fixture {
    store: CertStore,
    now: Now,
}

impl Fixture {
    fn new(names: &[&str]) -> Self {
        let (mut store, now) = (CertStore::new(24 * HOUR), start());
        store.set_identities(&ids(names), now);
        Self { store, now }
    }

    fn advance(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    fn start(&mut self, free: usize) -> Vec<IssueRequest> {
        self.store.start_due(self.now, free)
    }

    fn start_names(&mut self, free: usize) -> Vec<String> {
        let name = |request: &IssueRequest| {
            request
                .identity
                .path()
                .rsplit('/')
                .next()
                .unwrap()
                .to_owned()
        };
        self.start(free).iter().map(name).collect()
    }

    fn fail(&mut self, request: &IssueRequest, with: fn(&SpiffeId) -> IssueError) -> Completion {
        let error = Err(with(&request.identity));
        self.store
            .complete(request, error, self.now, NO_JITTER)
            .unwrap()
    }

    fn succeed(&mut self, request: &IssueRequest, lifetime: Duration) -> Completion {
        let issued = certificate(&request.identity, self.now, lifetime);
        self.store
            .complete(request, Ok(issued), self.now, NO_JITTER)
            .unwrap()
    }

    /// Issues certificates for all identities that are due.
    fn issue_all(&mut self, lifetime: Duration) {
        for request in self.start(100) {
            self.succeed(&request, lifetime);
        }
    }

    fn until_due(&self) -> Duration {
        let next = self.store.next_deadline(self.now, true).unwrap();
        next.saturating_duration_since(self.now.monotonic)
    }
}

#[test]
fn waiting_connections_come_first_then_missing_certificates_then_earliest_expiry() {
    let mut fixture = Fixture::new(&["late", "soon"]);
    let requests = fixture.start(2);
    fixture.succeed(&requests[0], 10 * HOUR);
    fixture.succeed(&requests[1], 8 * HOUR);
    fixture.advance(6 * HOUR);
    let all = ids(&["late", "new", "soon", "waiting", "zero"]);
    fixture.store.set_identities(&all, fixture.now);
    fixture
        .store
        .prioritize(&id("new"), Priority::Pod, fixture.now);
    fixture
        .store
        .prioritize(&id("waiting"), Priority::Connection, fixture.now);
    fixture
        .store
        .prioritize(&id("waiting"), Priority::Pod, fixture.now);
    assert_eq!(fixture.start_names(1), ["waiting"]);
    // The fourth request goes to the identity that has been due for longest.
    assert_eq!(fixture.start_names(1), ["soon"]);
    assert_eq!(fixture.start_names(9), ["new", "zero", "late"]);
    assert_eq!(fixture.start_names(9), [""; 0], "all are in flight");
}

#[test]
fn one_in_four_requests_goes_to_an_identity_that_is_not_urgent() {
    let urgent: Vec<String> = (0..12).map(|i| format!("urgent{i:02}")).collect();
    let mut names: Vec<&str> = urgent.iter().map(String::as_str).collect();
    names.push("regular");
    let mut fixture = Fixture::new(&["regular"]);
    fixture.advance(SECOND);
    fixture.store.set_identities(&ids(&names), fixture.now);
    for name in &urgent {
        fixture
            .store
            .prioritize(&id(name), Priority::Connection, fixture.now);
    }
    assert_eq!(fixture.start_names(4)[3], "regular");
}

#[test]
fn retry_delay_doubles_up_to_its_limit() {
    let mut fixture = Fixture::new(&["web"]);
    let mut waits = vec![];
    for _ in 0..10 {
        let request = fixture.start(1).remove(0);
        fixture.fail(&request, denied);
        waits.push(fixture.until_due().as_secs());
        fixture.advance(fixture.until_due());
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
}

#[test]
fn a_waiting_connection_causes_one_request_per_second() {
    let mut fixture = Fixture::new(&["web"]);
    for _ in 0..8 {
        let request = fixture.start(1).remove(0);
        fixture.fail(&request, denied);
        fixture.advance(fixture.until_due());
    }
    let request = fixture.start(1).remove(0);
    fixture.fail(&request, denied);
    assert_eq!(fixture.until_due(), 150 * SECOND);
    fixture
        .store
        .prioritize(&id("web"), Priority::Connection, fixture.now);
    assert_eq!(fixture.until_due(), SECOND);
    fixture.advance(SECOND);
    let request = fixture.start(1).remove(0);
    fixture
        .store
        .prioritize(&id("web"), Priority::Connection, fixture.now);
    fixture.fail(&request, denied);
    assert_eq!(fixture.until_due(), SECOND);
    // The priority has expired: back to the long delays.
    fixture.advance(3 * SECOND);
    let request = fixture.start(1).remove(0);
    fixture.fail(&request, denied);
    assert_eq!(fixture.until_due(), 150 * SECOND);
}

#[test]
fn failed_renewals_keep_the_certificate_and_are_repeated_faster_towards_its_expiry() {
    let mut fixture = Fixture::new(&["web"]);
    fixture.issue_all(HOUR);
    let current = fixture.store.status()[0].certificate.clone().unwrap();
    let mut requests = 0;
    while fixture.now.monotonic < current.expires_at - SECOND {
        fixture.advance(fixture.until_due());
        assert!(fixture.store.remove_expired(fixture.now).is_empty());
        if let Some(request) = fixture.start(1).first() {
            fixture.fail(request, denied);
            requests += 1;
            let remaining = current
                .expires_at
                .saturating_duration_since(fixture.now.monotonic);
            assert!(
                fixture.until_due() <= (remaining / 4).max(SECOND),
                "{remaining:?} remaining"
            );
        }
        let status = &fixture.store.status()[0];
        assert_eq!(status.state, IdentityState::Available);
        assert!(Arc::ptr_eq(status.certificate.as_ref().unwrap(), &current));
    }
    assert!((20..60).contains(&requests), "{requests}");
    fixture.advance(SECOND);
    assert_eq!(fixture.store.remove_expired(fixture.now), [id("web")]);
    let status = &fixture.store.status()[0];
    let at = current.not_after;
    assert_eq!(status.state, IdentityState::Expired { at });
    assert_eq!(status.last_error.as_ref().unwrap().code, "ca_denied");
}

#[test]
fn renewal_time_is_half_of_the_remaining_lifetime() {
    let mut fixture = Fixture::new(&["web"]);
    let request = fixture.start(1).remove(0);
    let mut issued = certificate(&request.identity, fixture.now, HOUR);
    issued.not_before = fixture.now.wall - HOUR;
    fixture
        .store
        .complete(&request, Ok(issued), fixture.now, NO_JITTER);
    assert_eq!(fixture.until_due(), HOUR / 2);
}

#[test]
fn a_clock_that_is_behind_does_not_delay_renewal() {
    let (mut store, now) = (CertStore::new(20 * SECOND), start());
    store.set_identities(&ids(&["web"]), now);
    let request = store.start_due(now, 1).remove(0);
    // Issued for 20 seconds by a CA whose clock is five minutes ahead.
    let issued = certificate(&request.identity, now, 320 * SECOND);
    store.complete(&request, Ok(issued), now, NO_JITTER);
    assert_eq!(
        store.next_deadline(now, true),
        Some(now.monotonic + 10 * SECOND)
    );
}

#[test]
fn setting_the_clock_by_five_minutes_expires_no_certificate_and_moves_no_renewal() {
    for forward in [true, false] {
        let mut fixture = Fixture::new(&["web"]);
        fixture.issue_all(4 * 60 * SECOND);
        fixture.advance(60 * SECOND);
        let skew = MAX_CLOCK_SKEW - SECOND;
        fixture.now.wall = match forward {
            true => fixture.now.wall + skew,
            false => fixture.now.wall - skew,
        };
        assert!(
            fixture.store.remove_expired(fixture.now).is_empty(),
            "forward: {forward}"
        );
        assert_eq!(fixture.until_due(), 60 * SECOND, "forward: {forward}");
    }
}

#[test]
fn after_a_long_suspend_the_certificate_is_expired_and_requested_at_once() {
    let mut fixture = Fixture::new(&["web"]);
    fixture.issue_all(HOUR);
    fixture.now.wall += 5 * HOUR;
    assert_eq!(fixture.store.remove_expired(fixture.now), [id("web")]);
    assert_eq!(fixture.start_names(1), ["web"]);
}

#[test]
fn an_outage_limits_requests_to_probes_and_its_end_resumes_all_identities() {
    let names: Vec<String> = (0..100).map(|i| format!("sa{i:03}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut fixture = Fixture::new(&names);
    for request in fixture.start(8) {
        fixture.fail(&request, unreachable);
    }
    let mut requests = 0;
    for _ in 0..400 {
        fixture.advance(SECOND / 10);
        for name in &names {
            fixture
                .store
                .prioritize(&id(name), Priority::Connection, fixture.now);
        }
        for request in fixture.start(8) {
            requests += 1;
            fixture.fail(&request, unreachable);
        }
    }
    assert!(
        (70..=81).contains(&requests),
        "expected two per second: {requests}"
    );
    // The source responds again. The next probe ends the outage.
    let recovery = fixture.now;
    let mut recovered = false;
    while fixture
        .store
        .status()
        .iter()
        .any(|one| one.certificate.is_none())
    {
        fixture.advance(SECOND / 100);
        let requests = fixture.start(8);
        assert!(requests.len() <= if recovered { 8 } else { 1 });
        for request in requests {
            recovered |= fixture.succeed(&request, HOUR).is_recovery;
        }
    }
    let took = fixture.now.monotonic - recovery.monotonic;
    assert!(took <= 2 * SECOND, "{took:?}");
}

#[test]
fn a_refusal_ends_an_outage() {
    let names: Vec<String> = (0..9).map(|i| format!("sa{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut fixture = Fixture::new(&names);
    for request in fixture.start(8) {
        fixture.fail(&request, unreachable);
    }
    fixture.advance(SECOND);
    let request = fixture.start(8).remove(0);
    assert!(fixture.fail(&request, denied).is_recovery);
}

#[test]
fn after_an_outage_renewals_are_spread() {
    let names: Vec<String> = (0..50).map(|i| format!("sa{i:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut fixture = Fixture::new(&names);
    fixture.issue_all(HOUR);
    fixture.advance(HOUR / 2);
    while fixture
        .store
        .status()
        .iter()
        .any(|one| one.last_error.is_none())
    {
        for request in fixture.start(8) {
            fixture.fail(&request, unreachable);
        }
        fixture.advance(SECOND / 2);
    }
    let mut random = fastrand::Rng::with_seed(7);
    fixture.advance(10 * SECOND);
    let probe = fixture.start(1).remove(0);
    let issued = certificate(&probe.identity, fixture.now, HOUR);
    fixture
        .store
        .complete(&probe, Ok(issued), fixture.now, || random.f64());
    let mut max_started = 0;
    for _ in 0..300 {
        fixture.advance(SECOND / 10);
        let started = fixture.start(50);
        max_started = max_started.max(started.len());
        for request in started {
            fixture.succeed(&request, HOUR);
        }
    }
    assert!(
        fixture
            .store
            .status()
            .iter()
            .all(|one| one.last_error.is_none())
    );
    assert!(max_started < 25, "{max_started} at once");
}

#[test]
fn an_update_is_requested_at_once_even_with_a_request_in_flight() {
    let mut fixture = Fixture::new(&["web"]);
    fixture.issue_all(HOUR);
    fixture.store.request_update(&id("web"), fixture.now);
    let request = fixture.start(1).remove(0);
    fixture.store.request_update(&id("web"), fixture.now);
    fixture.succeed(&request, HOUR);
    assert_eq!(
        fixture.start_names(1),
        ["web"],
        "the response in flight may hold the previous certificate"
    );
}

#[test]
fn an_untrusted_certificate_is_replaced_within_a_second() {
    let mut fixture = Fixture::new(&["web"]);
    fixture.issue_all(HOUR);
    fixture
        .store
        .set_bundle(&TrustBundle::default(), fixture.now, || 1.0);
    assert_eq!(fixture.until_due(), SECOND);
    let status = &fixture.store.status()[0];
    assert_eq!(
        status.state,
        IdentityState::Available,
        "it stays in use until then"
    );
}

#[test]
fn a_cancelled_request_has_no_outcome() {
    let mut fixture = Fixture::new(&["web"]);
    let first = fixture.start(1).remove(0);
    fixture.store.set_identities(&ids(&[]), fixture.now);
    fixture.store.set_identities(&ids(&["web"]), fixture.now);
    assert!(!fixture.store.is_in_flight(&first));
    let second = fixture.start(1).remove(0);
    let issued = certificate(&first.identity, fixture.now, HOUR);
    assert_eq!(
        fixture
            .store
            .complete(&first, Ok(issued), fixture.now, NO_JITTER),
        None
    );
    assert!(fixture.store.status()[0].certificate.is_none());
    fixture.store.cancel(&second, fixture.now);
    assert_eq!(fixture.start_names(1), ["web"]);
}

#[test]
fn an_unchanged_certificate_is_not_a_renewal_and_delays_the_next_request() {
    let mut fixture = Fixture::new(&["web"]);
    let start = fixture.now;
    let issued = || Certificate {
        chain: vec![vec![0x30, 0x00].into()],
        ..certificate(&id("web"), start, HOUR)
    };
    let complete = |fixture: &mut Fixture| {
        let request = fixture.start(1).remove(0);
        let completion = fixture
            .store
            .complete(&request, Ok(issued()), fixture.now, NO_JITTER);
        completion.unwrap().outcome
    };
    assert_eq!(complete(&mut fixture), Some(IssueOutcome::First));
    let current = fixture.store.status()[0].certificate.clone().unwrap();
    let mut count = 0;
    while fixture.now.monotonic < start.monotonic + HOUR - Duration::from_secs(60) {
        fixture.advance(fixture.until_due());
        assert_eq!(complete(&mut fixture), Some(IssueOutcome::Unchanged));
        count += 1;
    }
    assert!(count < 10, "{count} requests in the hour");
    let kept = fixture.store.status()[0].certificate.clone().unwrap();
    assert!(
        Arc::ptr_eq(&current, &kept),
        "the certificate object is kept"
    );
    // At max_started one request per second towards the expiry.
    fixture.advance(fixture.until_due());
    assert_eq!(complete(&mut fixture), Some(IssueOutcome::Unchanged));
    assert!(fixture.until_due() >= MIN_RETRY_DELAY);
}
