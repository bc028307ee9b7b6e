use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::SystemTime;

use mesh::certs::{
    Authority, CertificateSource, CertificatesConfig, Clock, IssueError, IssueFuture, LocalCa,
    Validity,
};
use tokio::task::JoinSet;

use super::*;

fn id(name: &str) -> SpiffeId {
    SpiffeId::new(format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap()
}

/// Identities whose certificates are issued by tasks of the returned set.
fn identities() -> (Identities, JoinSet<()>) {
    let folder = tempfile::tempdir().unwrap();
    let ca = Arc::new(LocalCa::create(folder.path()).unwrap());
    let (certificates, renewal) = Certificates::new(ca, CertificatesConfig::default());
    let identities = Identities::new(certificates, Revocations::none());
    let mut tasks = JoinSet::new();
    tasks.spawn(renewal.run(CancellationToken::new()));
    let following = identities.clone();
    tasks.spawn(async move {
        let telemetry = Telemetry::new(None).unwrap();
        following.run(&telemetry, CancellationToken::new()).await;
    });
    (identities, tasks)
}

#[tokio::test]
async fn whoever_waits_for_an_identity_gets_it_as_soon_as_it_is_issued() {
    let (identities, _tasks) = identities();
    assert_eq!(
        identities.current(&id("web")).err(),
        Some(IdentityError::Pending)
    );
    let (web, wanted) = (id("web"), BTreeSet::from([id("web")]));
    let (ready, ()) = tokio::join!(identities.ready(&web), async {
        identities.set_identities(wanted)
    });
    let ready = ready.unwrap();
    assert_eq!(*ready.client.identity(), id("web"));
    // The next to ask gets the same configuration: it is built once for a certificate.
    assert!(Arc::ptr_eq(
        &ready,
        &identities.current(&id("web")).unwrap()
    ));
}

#[tokio::test(start_paused = true)]
async fn the_wait_for_a_certificate_that_never_comes_has_an_end() {
    let (identities, _tasks) = identities();
    let start = tokio::time::Instant::now();
    assert_eq!(
        identities.ready(&id("web")).await.err(),
        Some(IdentityError::Pending)
    );
    assert_eq!(start.elapsed(), FIRST_CERTIFICATE);
}

#[tokio::test]
async fn an_identity_that_is_no_longer_wanted_is_forgotten() {
    let (identities, _tasks) = identities();
    let mut changed = identities.0.changed.subscribe();
    identities.set_identities(BTreeSet::from([id("web"), id("cart")]));
    identities.ready(&id("web")).await.unwrap();
    identities.ready(&id("cart")).await.unwrap();
    identities.set_identities(BTreeSet::from([id("cart")]));
    while identities.current(&id("web")).is_ok() {
        changed.changed().await.unwrap();
    }
    assert!(identities.current(&id("cart")).is_ok());
}

/// An authority that is there or not, and what the identities of one test are made from.
struct Source {
    authority: std::sync::Mutex<Arc<Authority>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    clock: Clock,
    down: AtomicBool,
    attempts: AtomicUsize,
}

impl CertificateSource for Source {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            self.attempts.fetch_add(1, SeqCst);
            if self.down.load(SeqCst) {
                return Err(IssueError::new(identity, IssueError::UNREACHABLE, "gone"));
            }
            let authority = self.authority.lock().unwrap().clone();
            let validity = Validity::new((self.clock)(), ttl);
            Ok(authority.issue(identity, validity).unwrap())
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }
}

struct Bench {
    source: Arc<Source>,
    identities: Identities,
    telemetry: Arc<Telemetry>,
    _tasks: JoinSet<()>,
}

fn authority() -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(Authority::create(folder.path()).unwrap())
}

impl Bench {
    fn new(ttl: Duration) -> Self {
        let start = tokio::time::Instant::now();
        let base = SystemTime::now();
        let clock: Clock = Arc::new(move || base + start.elapsed());
        let authority = authority();
        let source = Arc::new(Source {
            bundle: watch::Sender::new(Arc::new(authority.bundle().clone())),
            authority: std::sync::Mutex::new(authority),
            clock: clock.clone(),
            down: AtomicBool::new(false),
            attempts: AtomicUsize::new(0),
        });
        let config = CertificatesConfig {
            ttl,
            clock,
            ..CertificatesConfig::default()
        };
        let (certificates, renewal) = Certificates::new(source.clone(), config);
        let identities = Identities::new(certificates, Revocations::none());
        let telemetry = Arc::new(Telemetry::new(None).unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(renewal.run(CancellationToken::new()));
        let (following, told) = (identities.clone(), telemetry.clone());
        tasks.spawn(async move { following.run(&told, CancellationToken::new()).await });
        Self {
            source,
            identities,
            telemetry,
            _tasks: tasks,
        }
    }

    fn scraped(&self, line: &str) -> Option<f64> {
        let text = self.telemetry.scrape().unwrap();
        let value = text.lines().find_map(|found| found.strip_prefix(line))?;
        Some(value.trim().parse().unwrap())
    }
}

/// The time of day, as metrics have it.
fn seconds(bench: &Bench) -> f64 {
    let now = (bench.source.clock)();
    now.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

const SECOND: Duration = Duration::from_secs(1);
const EXPIRY: &str = "ambit_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/web\"}";

#[tokio::test(start_paused = true)]
async fn an_identity_expires_says_so_and_comes_back_for_those_that_wait() {
    let bench = Bench::new(60 * SECOND);
    bench.identities.set_identities(BTreeSet::from([id("web")]));
    bench.identities.ready(&id("web")).await.unwrap();
    assert!(bench.scraped(EXPIRY).is_some());
    bench.source.down.store(true, SeqCst);
    tokio::time::sleep(59 * SECOND).await;
    assert!(bench.identities.current(&id("web")).is_ok(), "to the end");
    tokio::time::sleep(2 * SECOND).await;
    let start = tokio::time::Instant::now();
    let error = bench.identities.ready(&id("web")).await.err();
    assert_eq!(error, Some(IdentityError::Expired));
    assert_eq!(error.unwrap().code(), "certificate_expired");
    assert_eq!(start.elapsed(), FIRST_CERTIFICATE);
    let ended = bench.scraped(EXPIRY).unwrap();
    assert!(ended <= seconds(&bench), "{ended}");
    let unreachable = "ambit_certificate_failures_total{reason=\"ca_unreachable\"}";
    assert!(bench.scraped(unreachable).unwrap() > 5.0);
    bench.source.down.store(false, SeqCst);
    let start = tokio::time::Instant::now();
    bench.identities.ready(&id("web")).await.unwrap();
    assert!(start.elapsed() < 2 * SECOND, "{:?}", start.elapsed());
    assert!(bench.scraped(EXPIRY).unwrap() > seconds(&bench));
    assert_eq!(bench.scraped("ambit_certificate_renewals_total"), Some(1.0));
    assert_eq!(
        bench.scraped("ambit_certificate_first_issues_total"),
        Some(1.0)
    );
}

#[tokio::test(start_paused = true)]
async fn while_a_connection_waits_the_authority_is_asked_about_every_second() {
    let bench = Bench::new(60 * SECOND);
    bench.source.down.store(true, SeqCst);
    bench.identities.set_identities(BTreeSet::from([id("web")]));
    // Backed off by now.
    tokio::time::sleep(300 * SECOND).await;
    let before = bench.source.attempts.load(SeqCst);
    assert!(bench.identities.ready(&id("web")).await.is_err());
    let attempts = bench.source.attempts.load(SeqCst) - before;
    assert!((4..=7).contains(&attempts), "{attempts} in five seconds");
}

#[tokio::test(start_paused = true)]
async fn tls_is_built_again_when_the_certificate_or_the_bundle_is_another() {
    let bench = Bench::new(60 * SECOND);
    bench.identities.set_identities(BTreeSet::from([id("web")]));
    let first = bench.identities.ready(&id("web")).await.unwrap();
    tokio::time::sleep(40 * SECOND).await;
    let renewed = bench.identities.current(&id("web")).unwrap();
    assert_ne!(first.certificate.serial, renewed.certificate.serial);
    let both = [authority(), bench.source.authority.lock().unwrap().clone()];
    let roots = both.iter().flat_map(|one| one.bundle().roots().to_vec());
    let both = Arc::new(TrustBundle::new(roots).unwrap());
    bench.source.bundle.send_replace(both.clone());
    tokio::time::sleep(SECOND / 10).await;
    let trusting = bench.identities.current(&id("web")).unwrap();
    assert!(!Arc::ptr_eq(&trusting, &renewed));
    assert_eq!(trusting.certificate.serial, renewed.certificate.serial);
    assert_eq!(trusting.bundle.roots().len(), 2);
    let expiry = bench.scraped("ambit_trust_bundle_expiry_timestamp_seconds");
    assert!(expiry.unwrap() > 1e9);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_an_expired_certificate_is_shown_until_its_identity_leaves() {
    let bench = Bench::new(60 * SECOND);
    bench.identities.set_identities(BTreeSet::from([id("web")]));
    bench.identities.ready(&id("web")).await.unwrap();
    bench.source.down.store(true, SeqCst);
    for _ in 0..3 {
        tokio::time::sleep(100 * SECOND).await;
        assert!(bench.scraped(EXPIRY).unwrap() < seconds(&bench));
    }
    bench.identities.set_identities(BTreeSet::new());
    tokio::time::sleep(SECOND).await;
    assert_eq!(bench.scraped(EXPIRY), None);
}
