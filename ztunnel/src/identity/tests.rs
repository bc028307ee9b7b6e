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
    let running = identities.clone();
    tasks.spawn(async move {
        let telemetry = Telemetry::new(None).unwrap();
        running.run(&telemetry, CancellationToken::new()).await;
    });
    (identities, tasks)
}

#[tokio::test]
async fn waiting_call_returns_when_the_certificate_is_issued() {
    let (identities, _tasks) = identities();
    assert_eq!(
        identities.current(&id("web")).err(),
        Some(IdentityError::Pending)
    );
    let (web, wanted) = (id("web"), BTreeSet::from([id("web")]));
    let (ready, ()) = tokio::join!(identities.ready(&web), async {
        identities.set_identities(wanted);
    });
    let ready = ready.unwrap();
    assert_eq!(*ready.client.identity(), id("web"));
    // TLS is built once per certificate: the next call returns the same value.
    assert!(Arc::ptr_eq(
        &ready,
        &identities.current(&id("web")).unwrap()
    ));
}

#[tokio::test(start_paused = true)]
async fn wait_for_a_certificate_times_out() {
    let (identities, _tasks) = identities();
    let start = tokio::time::Instant::now();
    assert_eq!(
        identities.ready(&id("web")).await.err(),
        Some(IdentityError::Pending)
    );
    assert_eq!(start.elapsed(), CERTIFICATE_TIMEOUT);
}

#[tokio::test]
async fn removed_identity_is_dropped() {
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

/// A certificate source that can be down and can change its trust bundle.
struct TestSource {
    authority: std::sync::Mutex<Arc<Authority>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    clock: Clock,
    down: AtomicBool,
    attempts: AtomicUsize,
}

impl CertificateSource for TestSource {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            self.attempts.fetch_add(1, SeqCst);
            if self.down.load(SeqCst) {
                return Err(IssueError::new(identity, IssueError::UNREACHABLE, "down"));
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

struct Fixture {
    source: Arc<TestSource>,
    identities: Identities,
    telemetry: Arc<Telemetry>,
    _tasks: JoinSet<()>,
}

fn authority() -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(Authority::create(folder.path()).unwrap())
}

impl Fixture {
    fn new(ttl: Duration) -> Self {
        let start = tokio::time::Instant::now();
        let base = SystemTime::now();
        let clock: Clock = Arc::new(move || base + start.elapsed());
        let authority = authority();
        let source = Arc::new(TestSource {
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
        let (running, metrics) = (identities.clone(), telemetry.clone());
        tasks.spawn(async move { running.run(&metrics, CancellationToken::new()).await });
        Self {
            source,
            identities,
            telemetry,
            _tasks: tasks,
        }
    }

    /// Value of the metric line that starts with `line`.
    fn metric(&self, line: &str) -> Option<f64> {
        let text = self.telemetry.scrape().unwrap();
        let value = text.lines().find_map(|found| found.strip_prefix(line))?;
        Some(value.trim().parse().unwrap())
    }
}

/// The fixture's time in seconds since the epoch, as in metrics.
fn unix_seconds(fixture: &Fixture) -> f64 {
    let now = (fixture.source.clock)();
    now.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_secs_f64()
}

const SECOND: Duration = Duration::from_secs(1);
const EXPIRY: &str = "ambit_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/shop/sa/web\"}";

#[tokio::test(start_paused = true)]
async fn expired_identity_is_reported_and_renewed_for_waiting_calls() {
    let fixture = Fixture::new(60 * SECOND);
    fixture
        .identities
        .set_identities(BTreeSet::from([id("web")]));
    fixture.identities.ready(&id("web")).await.unwrap();
    assert!(fixture.metric(EXPIRY).is_some());
    fixture.source.down.store(true, SeqCst);
    tokio::time::sleep(59 * SECOND).await;
    assert!(
        fixture.identities.current(&id("web")).is_ok(),
        "valid until it expires"
    );
    tokio::time::sleep(2 * SECOND).await;
    let start = tokio::time::Instant::now();
    let error = fixture.identities.ready(&id("web")).await.err();
    assert_eq!(error, Some(IdentityError::Expired));
    assert_eq!(error.unwrap().code(), "certificate_expired");
    assert_eq!(start.elapsed(), CERTIFICATE_TIMEOUT);
    let expiry = fixture.metric(EXPIRY).unwrap();
    assert!(expiry <= unix_seconds(&fixture), "{expiry}");
    let unreachable = "ambit_certificate_failures_total{reason=\"ca_unreachable\"}";
    assert!(fixture.metric(unreachable).unwrap() > 5.0);
    fixture.source.down.store(false, SeqCst);
    let start = tokio::time::Instant::now();
    fixture.identities.ready(&id("web")).await.unwrap();
    assert!(start.elapsed() < 2 * SECOND, "{:?}", start.elapsed());
    assert!(fixture.metric(EXPIRY).unwrap() > unix_seconds(&fixture));
    assert_eq!(
        fixture.metric("ambit_certificate_renewals_total"),
        Some(1.0)
    );
    assert_eq!(
        fixture.metric("ambit_certificate_first_issues_total"),
        Some(1.0)
    );
}

#[tokio::test(start_paused = true)]
async fn waiting_connection_requests_a_certificate_every_second() {
    let fixture = Fixture::new(60 * SECOND);
    fixture.source.down.store(true, SeqCst);
    fixture
        .identities
        .set_identities(BTreeSet::from([id("web")]));
    // Long enough to reach the longest backoff.
    tokio::time::sleep(300 * SECOND).await;
    let before = fixture.source.attempts.load(SeqCst);
    assert!(fixture.identities.ready(&id("web")).await.is_err());
    let attempts = fixture.source.attempts.load(SeqCst) - before;
    assert!((4..=7).contains(&attempts), "{attempts} in five seconds");
}

#[tokio::test(start_paused = true)]
async fn new_certificate_or_bundle_rebuilds_tls() {
    let fixture = Fixture::new(60 * SECOND);
    fixture
        .identities
        .set_identities(BTreeSet::from([id("web")]));
    let first = fixture.identities.ready(&id("web")).await.unwrap();
    tokio::time::sleep(40 * SECOND).await;
    let renewed = fixture.identities.current(&id("web")).unwrap();
    assert_ne!(first.certificate.serial, renewed.certificate.serial);
    let authorities = [
        authority(),
        fixture.source.authority.lock().unwrap().clone(),
    ];
    let roots = authorities
        .iter()
        .flat_map(|one| one.bundle().roots().to_vec());
    let bundle = Arc::new(TrustBundle::new(roots).unwrap());
    fixture.source.bundle.send_replace(bundle);
    tokio::time::sleep(SECOND / 10).await;
    let rebuilt = fixture.identities.current(&id("web")).unwrap();
    assert!(!Arc::ptr_eq(&rebuilt, &renewed));
    assert_eq!(rebuilt.certificate.serial, renewed.certificate.serial);
    assert_eq!(rebuilt.bundle.roots().len(), 2);
    let expiry = fixture.metric("ambit_trust_bundle_expiry_timestamp_seconds");
    assert!(expiry.unwrap() > 1e9);
}

#[tokio::test(start_paused = true)]
async fn expiry_metric_of_an_expired_certificate_remains_until_its_identity_is_removed() {
    let fixture = Fixture::new(60 * SECOND);
    fixture
        .identities
        .set_identities(BTreeSet::from([id("web")]));
    fixture.identities.ready(&id("web")).await.unwrap();
    fixture.source.down.store(true, SeqCst);
    for _ in 0..3 {
        tokio::time::sleep(100 * SECOND).await;
        assert!(fixture.metric(EXPIRY).unwrap() < unix_seconds(&fixture));
    }
    fixture.identities.set_identities(BTreeSet::new());
    tokio::time::sleep(SECOND).await;
    assert_eq!(fixture.metric(EXPIRY), None);
}
