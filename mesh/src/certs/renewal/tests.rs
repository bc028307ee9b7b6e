//! A year of renewals in virtual time.

use std::sync::Mutex;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::*;
use crate::certs::{IdentityState, Issuing, LocalCa};

const HOUR: Duration = Duration::from_secs(3600);

/// Issues from a real authority at virtual time; fails or hangs on demand.
struct Source {
    ca: LocalCa,
    clock: Clock,
    mood: Mutex<Mood>,
    issued: Mutex<Vec<(SpiffeId, SystemTime)>>,
    busy: Mutex<(usize, usize)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Willing,
    Slow(Duration),
    Failing,
    Lying,
}

impl CertificateSource for Source {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> Issuing<'a> {
        Box::pin(async move {
            self.count(1);
            let mood = *self.mood.lock().unwrap();
            if let Mood::Slow(delay) = mood {
                sleep(delay).await;
            }
            self.count(-1);
            self.issued
                .lock()
                .unwrap()
                .push((identity.clone(), (self.clock)()));
            match mood {
                Mood::Failing => Err(IssueError {
                    identity: identity.clone(),
                    code: "no_mood",
                    message: "not today".to_owned(),
                }),
                Mood::Lying => self.ca.issue_at(&id("liar"), ttl, (self.clock)()),
                _ => self.ca.issue_at(identity, ttl, (self.clock)()),
            }
        })
    }
}

impl Source {
    fn count(&self, by: isize) {
        let mut busy = self.busy.lock().unwrap();
        busy.0 = busy.0.checked_add_signed(by).unwrap();
        busy.1 = busy.1.max(busy.0);
    }

    fn is(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn attempts(&self) -> usize {
        self.issued.lock().unwrap().len()
    }
}

struct Bench {
    source: Arc<Source>,
    certificates: Certificates,
    stop: CancellationToken,
    task: JoinHandle<()>,
    clock: Clock,
    _dir: tempfile::TempDir,
}

impl Bench {
    #[expect(
        clippy::disallowed_methods,
        reason = "the test owns and joins the task"
    )]
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (start, base) = (Instant::now(), SystemTime::now());
        let clock: Clock = Arc::new(move || base + start.elapsed());
        let source = Arc::new(Source {
            ca: LocalCa::create(dir.path()).unwrap(),
            clock: clock.clone(),
            mood: Mutex::new(Mood::Willing),
            issued: Mutex::default(),
            busy: Mutex::default(),
        });
        let config = CertificatesConfig {
            clock: clock.clone(),
            ..CertificatesConfig::default()
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
            _dir: dir,
        }
    }

    fn want(&self, names: &[&str]) {
        self.certificates
            .wanted(names.iter().map(|name| id(name)).collect());
    }

    fn current(&self, name: &str) -> Option<Arc<Certificate>> {
        self.certificates.current(&id(name))
    }

    fn state(&self) -> IdentityState {
        self.certificates.status()[0].state
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
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

const MOMENT: Duration = Duration::from_millis(5);

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
    let names: Vec<String> = (0..50).map(|i| format!("sa{i}")).collect();
    bench.want(&names.iter().map(String::as_str).collect::<Vec<_>>());
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
    assert_eq!(
        bench.certificates.status()[0].error.as_ref().unwrap().code,
        "no_mood"
    );
    let mut version = bench.certificates.subscribe();
    pass(HOUR + MOMENT).await;
    assert!(bench.current("web").is_none(), "never after its end");
    assert!(version.has_changed().unwrap());
    version.mark_unchanged();
    assert_eq!(bench.state(), IdentityState::Unavailable);
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
    let names: Vec<String> = (0..20).map(|i| format!("sa{i:02}")).collect();
    bench.want(&names.iter().map(String::as_str).collect::<Vec<_>>());
    pass(Duration::from_secs(11)).await;
    let status = bench.certificates.status();
    assert_eq!(status[0].error.as_ref().unwrap().code, "issue_timeout");
    bench.source.is(Mood::Willing);
    pass(Duration::from_secs(60)).await;
    assert!(names.iter().all(|name| bench.current(name).is_some()));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn no_more_than_eight_are_issued_at_a_time() {
    let bench = Bench::new();
    bench.source.is(Mood::Slow(Duration::from_secs(1)));
    let names: Vec<String> = (0..40).map(|i| format!("sa{i}")).collect();
    bench.want(&names.iter().map(String::as_str).collect::<Vec<_>>());
    pass(Duration::from_secs(6)).await;
    assert_eq!(bench.source.busy.lock().unwrap().1, 8);
    assert!(
        names.iter().all(|name| bench.current(name).is_some()),
        "five rounds of a second"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_source_that_answers_for_another_identity_is_not_believed() {
    let bench = Bench::new();
    bench.source.is(Mood::Lying);
    bench.want(&["web"]);
    pass(MOMENT).await;
    assert!(bench.current("web").is_none() && bench.current("liar").is_none());
    assert_eq!(
        bench.certificates.status()[0].error.as_ref().unwrap().code,
        "wrong_identity"
    );
    bench.end().await;
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
    assert!(bench.certificates.status().is_empty());
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
