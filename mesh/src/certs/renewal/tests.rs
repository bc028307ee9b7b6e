//! A year of renewals in virtual time.

mod trouble;

use std::sync::atomic::{AtomicI64, Ordering::SeqCst};

use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::certs::{
    Authority, IdentityState, IssueError, IssueFuture, IssuedCertificate, UpdateCounts, Validity,
};

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

/// Issues from a real authority at virtual time; fails or hangs on demand.
struct Source {
    authority: Mutex<Arc<Authority>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    rotations: watch::Sender<UpdateCounts>,
    clock: Clock,
    mood: watch::Sender<Mood>,
    issued: Mutex<Vec<(SpiffeId, SystemTime)>>,
    forgotten: Mutex<Vec<SpiffeId>>,
    busy: Mutex<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Willing,
    Slow(Duration),
    Failing,
    /// Nobody is there.
    Down,
    /// Somebody is there, who says nothing.
    Hanging,
    Panicking,
    Hostile(Hostile),
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Hostile {
    Garbage,
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
            // An attempt that is dropped while it waits is no longer one.
            let _counted = Counted(self);
            let mood = *self.mood.borrow();
            match mood {
                Mood::Slow(delay) => sleep(delay).await,
                Mood::Hanging => std::future::pending().await,
                _ => {}
            }
            let attempt = (identity.clone(), (self.clock)());
            self.issued.lock().unwrap().push(attempt);
            match mood {
                Mood::Failing => Err(IssueError::new(identity, "no_mood", "not today")),
                Mood::Down => Err(IssueError::new(
                    identity,
                    "ca_unreachable",
                    "nobody is there",
                )),
                Mood::Panicking => panic!("a source with a fault"),
                Mood::Hostile(how) => Ok(self.hostile(how, identity, ttl)),
                _ => Ok(self.good(identity, ttl)),
            }
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    fn updates(&self) -> Option<watch::Receiver<UpdateCounts>> {
        Some(self.rotations.subscribe())
    }

    fn forget(&self, identity: &SpiffeId) {
        self.forgotten.lock().unwrap().push(identity.clone());
    }
}

struct Counted<'a>(&'a Source);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.count(-1);
    }
}

impl Source {
    fn count(&self, by: isize) {
        let mut busy = self.busy.lock().unwrap();
        busy.0 = busy.0.checked_add_signed(by).unwrap();
        busy.1 = busy.1.max(busy.0);
    }

    fn good(&self, identity: &SpiffeId, ttl: Duration) -> IssuedCertificate {
        let validity = Validity::new((self.clock)(), ttl);
        self.authority().issue(identity, validity).unwrap()
    }

    fn hostile(&self, how: Hostile, identity: &SpiffeId, ttl: Duration) -> IssuedCertificate {
        let now = (self.clock)();
        let mut good = self.good(identity, ttl);
        let valid = |not_before, not_after| {
            let validity = Validity {
                not_before,
                not_after,
            };
            self.authority().issue(identity, validity).unwrap()
        };
        match how {
            Hostile::Garbage => good.chain[0] = b"garbage".to_vec().into(),
            Hostile::AnotherIdentity => return self.good(&id("liar"), ttl),
            Hostile::AnotherKey => good.key = self.good(identity, ttl).key,
            Hostile::AnotherRoot => {
                return authority()
                    .issue(identity, Validity::new(now, ttl))
                    .unwrap();
            }
            Hostile::Expired => return valid(now - HOUR, now - SECOND),
            Hostile::Future => return valid(now + HOUR, now + 2 * HOUR),
            Hostile::LongChain => good.chain = vec![good.chain[0].clone(); 50],
        }
        good
    }

    fn authority(&self) -> Arc<Authority> {
        self.authority.lock().unwrap().clone()
    }

    fn is(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    fn signs_with(&self, authority: &Arc<Authority>) {
        *self.authority.lock().unwrap() = authority.clone();
    }

    fn publishes(&self, authorities: &[&Arc<Authority>]) {
        let roots = authorities
            .iter()
            .flat_map(|one| one.bundle().roots().to_vec());
        self.bundle
            .send_replace(Arc::new(TrustBundle::new(roots).unwrap()));
    }

    fn attempts(&self) -> usize {
        self.issued.lock().unwrap().len()
    }
}

fn authority() -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(Authority::create(folder.path()).unwrap())
}

struct Bench {
    source: Arc<Source>,
    certificates: Certificates,
    stop: CancellationToken,
    task: JoinHandle<()>,
    clock: Clock,
    /// By how many seconds the time of day is wrong on this node.
    skew: Arc<AtomicI64>,
}

impl Bench {
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
        let theirs: Clock = Arc::new(move || base + start.elapsed());
        let skew = Arc::new(AtomicI64::new(0));
        let (right, wrong) = (theirs.clone(), skew.clone());
        let clock: Clock = Arc::new(move || {
            let by = wrong.load(SeqCst);
            match Duration::from_secs(by.unsigned_abs()) {
                ahead if by > 0 => right() + ahead,
                behind => right() - behind,
            }
        });
        let authority = authority();
        let source = Arc::new(Source {
            bundle: watch::Sender::new(Arc::new(authority.bundle().clone())),
            rotations: watch::Sender::default(),
            authority: Mutex::new(authority),
            clock: theirs,
            mood: watch::Sender::new(Mood::Willing),
            issued: Mutex::default(),
            forgotten: Mutex::default(),
            busy: Mutex::default(),
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

    fn want(&self, names: &[&str]) {
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

    async fn end(self) {
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

/// Lets virtual time pass; the runtime moves it only while all tasks wait.
async fn pass(time: Duration) {
    sleep(time).await;
}

const MOMENT: Duration = Duration::from_millis(15);

#[tokio::test(start_paused = true)]
async fn what_is_wanted_is_issued_at_once_and_told() {
    let bench = Bench::new();
    let mut version = bench.certificates.subscribe();
    bench.want(&["web"]);
    while bench.current("web").is_none() {
        version.changed().await.unwrap();
    }
    assert_eq!(bench.state(), IdentityState::Available);
    assert!(bench.current("db").is_none());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_certificate_is_renewed_around_its_half_life_and_not_before() {
    let bench = Bench::new();
    bench.want(&["web"]);
    pass(MOMENT).await;
    let first = bench.current("web").unwrap().serial.clone();
    pass(HOUR * 24 * 44 / 100).await;
    assert_eq!(bench.current("web").unwrap().serial, first);
    pass(HOUR * 24 * 12 / 100).await;
    assert_ne!(bench.current("web").unwrap().serial, first);
    pass(HOUR * 24 * 365).await;
    let attempts = bench.source.attempts();
    assert!(
        (640..=830).contains(&attempts),
        "about two a day: {attempts}"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn renewals_of_identities_that_were_issued_together_are_spread() {
    let bench = Bench::new();
    let names = names(50);
    bench.want(&strs(&names));
    pass(HOUR * 24 * 56 / 100).await;
    let issued = bench.source.issued.lock().unwrap()[50..].to_vec();
    assert_eq!(issued.len(), 50);
    let (first, last) = (issued[0].1, issued[49].1);
    assert!(
        last.duration_since(first).unwrap() > HOUR,
        "over more than an hour"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_good_certificate_stays_while_renewal_fails_and_until_it_expires() {
    let bench = Bench::new();
    bench.want(&["web"]);
    pass(MOMENT).await;
    bench.source.is(Mood::Failing);
    pass(HOUR * 23).await;
    assert!(bench.current("web").is_some());
    assert_eq!(bench.last_error(), "no_mood");
    let mut version = bench.certificates.subscribe();
    pass(HOUR + MOMENT).await;
    assert!(bench.current("web").is_none(), "never after its end");
    assert!(version.has_changed().unwrap());
    version.mark_unchanged();
    assert!(matches!(bench.state(), IdentityState::Expired { .. }));
    bench.source.is(Mood::Willing);
    pass(Duration::from_secs(200)).await;
    assert!(
        bench.current("web").is_some(),
        "and it comes back by itself"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn failures_are_repeated_at_growing_intervals() {
    let bench = Bench::new();
    bench.source.is(Mood::Failing);
    bench.want(&["web"]);
    pass(HOUR).await;
    let times: Vec<SystemTime> = bench
        .source
        .issued
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
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_source_that_hangs_counts_as_failed_and_holds_up_nobody() {
    let bench = Bench::new();
    bench.source.is(Mood::Slow(HOUR));
    let names = names(20);
    bench.want(&strs(&names));
    pass(Duration::from_secs(11)).await;
    assert_eq!(bench.last_error(), "issue_timeout");
    bench.source.is(Mood::Willing);
    pass(Duration::from_secs(60)).await;
    assert!(names.iter().all(|name| bench.current(name).is_some()));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn no_more_than_eight_are_issued_at_a_time() {
    let bench = Bench::new();
    bench.source.is(Mood::Slow(Duration::from_secs(1)));
    let names = names(40);
    bench.want(&strs(&names));
    pass(Duration::from_secs(6)).await;
    assert_eq!(bench.source.busy.lock().unwrap().1, 8);
    assert!(
        names.iter().all(|name| bench.current(name).is_some()),
        "five rounds of a second"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn every_hostile_answer_is_refused_by_its_reason_and_the_old_certificate_stays() {
    for (how, code) in [
        (Hostile::Garbage, "issued_garbage"),
        (Hostile::AnotherIdentity, "wrong_identity"),
        (Hostile::AnotherKey, "key_mismatch"),
        (Hostile::AnotherRoot, "chain_untrusted"),
        (Hostile::Expired, "issued_expired"),
        (Hostile::Future, "issued_in_future"),
        (Hostile::LongChain, "chain_too_long"),
    ] {
        let bench = Bench::new();
        bench.want(&["web"]);
        pass(MOMENT).await;
        let good = bench.current("web").unwrap();
        bench.source.is(Mood::Hostile(how));
        pass(HOUR * 14).await;
        assert_eq!(bench.last_error(), code);
        assert!(Arc::ptr_eq(&bench.current("web").unwrap(), &good), "{code}");
        let counters = bench.certificates.state().counters.clone();
        assert!(
            counters.failures[code] > 10 && counters.failures.len() == 1,
            "{counters:?}"
        );
        pass(HOUR * 11).await;
        assert!(bench.current("web").is_none() && bench.current("liar").is_none());
        assert!(matches!(bench.state(), IdentityState::Expired { .. }));
        bench.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_no_longer_wanted_is_gone() {
    let bench = Bench::new();
    bench.want(&["web", "db"]);
    pass(MOMENT).await;
    let weak = Arc::downgrade(&bench.current("web").unwrap());
    bench.want(&["db"]);
    pass(MOMENT).await;
    assert!(bench.current("web").is_none() && bench.current("db").is_some());
    pass(MOMENT).await;
    assert!(weak.upgrade().is_none(), "nothing in here holds it");
    assert_eq!(*bench.source.forgotten.lock().unwrap(), [id("web")]);
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_identity_forgotten_while_it_is_issued_stays_forgotten() {
    let bench = Bench::new();
    bench.source.is(Mood::Slow(Duration::from_secs(1)));
    bench.want(&["web"]);
    pass(MOMENT).await;
    bench.want(&[]);
    pass(Duration::from_secs(5)).await;
    assert!(bench.current("web").is_none());
    assert!(bench.certificates.state().identities.is_empty());
    assert_eq!(
        bench.source.busy.lock().unwrap().0,
        0,
        "the attempt was given up"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn the_clock_is_the_one_that_was_given() {
    let bench = Bench::new();
    bench.want(&["web"]);
    pass(MOMENT).await;
    let certificate = bench.current("web").unwrap();
    let left = certificate
        .not_after
        .duration_since((bench.clock)())
        .unwrap();
    assert!(left > HOUR * 23 && left <= HOUR * 24);
    bench.end().await;
}
