//! The source against an agent that answers what each test wants.

mod fake;

use std::collections::BTreeSet;
use std::time::SystemTime;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::Code;

use super::*;
use crate::certs::{Certificates, CertificatesConfig, IdentityState};
use fake::{FakeAgent, Reply};

const HOUR: Duration = Duration::from_secs(3600);
/// Longer than any wait within the source.
const LONG: Duration = Duration::from_secs(60);

fn id(name: &str) -> SpiffeId {
    SpiffeId::new(format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap()
}

/// The source, driven by a task of the set.
struct Bench {
    agent: FakeAgent,
    spire: Arc<Spire>,
    running: JoinSet<()>,
}

impl Bench {
    fn new() -> Self {
        let agent = FakeAgent::start();
        let spire = Arc::new(Spire::new(SpireConfig {
            socket: agent.socket.clone(),
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
        }));
        let mut running = JoinSet::new();
        let driven = spire.clone();
        running.spawn(async move { driven.run().await });
        Self {
            agent,
            spire,
            running,
        }
    }

    async fn issue(&self, name: &str) -> Result<IssuedCertificate, IssueError> {
        let identity = id(name);
        let issuing = self.spire.issue(&identity, HOUR);
        timeout(LONG, issuing).await.expect("an answer in time")
    }

    /// Why an identity is not issued.
    async fn refused(&self, name: &str) -> IssueError {
        self.issue(name).await.expect_err("a refusal")
    }

    /// Waits until the source says that there is news of an identity.
    async fn rotated(&self, name: &str, count: u64) {
        let mut rotated = self.spire.updates().unwrap();
        let news = rotated.wait_for(|turns| turns.get(&id(name)).is_some_and(|n| *n >= count));
        timeout(LONG, news).await.expect("news in time").unwrap();
    }

    async fn roots(&self) -> usize {
        let mut bundle = self.spire.bundle();
        let known = bundle.wait_for(|bundle| !bundle.is_empty());
        timeout(LONG, known).await.unwrap().unwrap().roots().len()
    }
}

#[tokio::test]
async fn an_identity_is_asked_for_by_its_namespace_and_service_account() {
    let bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.agent.issues("shop/cart", &id("cart"), HOUR);
    let issued = bench.issue("web").await.unwrap();
    assert!(!issued.key.is_empty());
    assert_eq!(issued.chain.len(), 1);
    // Only what was wanted is asked for.
    assert_eq!(bench.agent.asked(), ["k8s:ns:shop k8s:sa:web"]);
    assert_eq!(bench.roots().await, 1);
}

#[tokio::test]
async fn of_several_svids_only_the_one_that_is_wanted_is_taken() {
    let bench = Bench::new();
    let svids = ["db", "web", "cart"].map(|name| bench.agent.svid(&id(name), HOUR));
    let web = svids[1].x509_svid_key.clone();
    bench.agent.says("shop/web", Reply::Svids(svids.into()));
    let issued = bench.issue("web").await.unwrap();
    assert_eq!(issued.key.as_slice(), web.as_ref());
}

#[tokio::test]
async fn another_identity_is_refused_although_spire_offers_it() {
    let bench = Bench::new();
    let admin = bench.agent.svid(&id("admin"), HOUR);
    bench.agent.says("shop/web", Reply::Svids(vec![admin]));
    let error = bench.refused("web").await;
    assert_eq!(error.code, "wrong_identity");
    assert!(error.message.contains("/ns/shop/sa/admin"), "{error}");
}

#[tokio::test]
async fn what_the_agent_writes_beside_a_certificate_proves_nothing() {
    let bench = Bench::new();
    let mut svid = bench.agent.svid(&id("admin"), HOUR);
    let document = svid.x509_svid.as_mut().unwrap();
    document.id = Some(spire_api::pb::spire::api::types::Spiffeid {
        trust_domain: "cluster.local".to_owned(),
        path: "/ns/shop/sa/web".to_owned(),
    });
    bench.agent.says("shop/web", Reply::Svids(vec![svid]));
    assert_eq!(bench.refused("web").await.code, "wrong_identity");
}

#[tokio::test]
async fn garbage_is_refused() {
    let bench = Bench::new();
    let mut garbage = bench.agent.svid(&id("web"), HOUR);
    garbage.x509_svid.as_mut().unwrap().cert_chain[0] = b"no certificate".to_vec().into();
    bench.agent.says("shop/web", Reply::Svids(vec![garbage]));
    assert_eq!(bench.refused("web").await.code, "issued_garbage");

    let mut keyless = bench.agent.svid(&id("cart"), HOUR);
    keyless.x509_svid_key = Default::default();
    bench.agent.says("shop/cart", Reply::Svids(vec![keyless]));
    assert_eq!(bench.refused("cart").await.code, "issued_garbage");

    let empty = Default::default();
    bench.agent.says("shop/db", Reply::Svids(vec![empty]));
    assert_eq!(bench.refused("db").await.code, "issued_garbage");
}

#[tokio::test]
async fn an_identity_without_entry_has_that_reason_until_it_has_one() {
    let bench = Bench::new();
    assert_eq!(bench.refused("web").await.code, "spire_no_entry");
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.rotated("web", 1).await;
    bench.issue("web").await.unwrap();
}

#[tokio::test]
async fn an_entry_that_is_withdrawn_is_told_of() {
    let bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.issue("web").await.unwrap();
    bench.agent.forgets("shop/web");
    bench.rotated("web", 1).await;
    assert_eq!(bench.refused("web").await.code, "spire_no_entry");
}

#[tokio::test]
async fn a_daemon_that_is_no_delegate_is_told_so() {
    let bench = Bench::new();
    let denial = Reply::Refusal(Code::PermissionDenied, "caller not configured");
    bench.agent.says("shop/web", denial);
    let error = bench.refused("web").await;
    assert_eq!(error.code, "spire_denied");
    assert!(error.message.contains("authorized_delegates"), "{error}");
}

#[tokio::test]
async fn an_agent_that_fails_is_told_with_what_it_said() {
    let bench = Bench::new();
    let failure = Reply::Refusal(Code::Internal, "workload attestation failed");
    bench.agent.says("shop/web", failure);
    let error = bench.refused("web").await;
    assert_eq!(error.code, "spire_failed");
    assert!(
        error.message.contains("workload attestation failed"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_silent_is_not_waited_for_longer_than_it_may_take() {
    let bench = Bench::new();
    bench.agent.says("shop/web", Reply::Silence);
    let start = Instant::now();
    assert_eq!(bench.refused("web").await.code, "spire_silent");
    assert!(start.elapsed() < Duration::from_secs(6));
    // It finds its voice again.
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.rotated("web", 1).await;
    bench.issue("web").await.unwrap();
}

#[tokio::test]
async fn a_rotation_is_told_of_once_and_handed_out_without_asking_again() {
    let bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    let first = bench.issue("web").await.unwrap();
    assert!(bench.spire.updates().unwrap().borrow().is_empty());
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.rotated("web", 1).await;
    let second = bench.issue("web").await.unwrap();
    assert_ne!(first.chain, second.chain);
    assert_eq!(bench.agent.asked().len(), 1, "one subscription");
    // Agents repeat what they said when something else has changed.
    bench.agent.issues("shop/cart", &id("cart"), HOUR);
    bench.issue("cart").await.unwrap();
    bench.issue("web").await.unwrap();
    let rotated = bench.spire.updates().unwrap().borrow().clone();
    assert_eq!(rotated.get(&id("web")), Some(&1));
}

#[tokio::test]
async fn an_agent_that_comes_back_is_found_again() {
    let mut bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.issue("web").await.unwrap();
    bench.agent.kill().await;
    bench.rotated("web", 1).await;
    let error = bench.refused("web").await;
    assert_eq!(error.code, "spire_unreachable");
    assert!(error.message.contains("admin.sock"), "{error}");
    assert!(error.message.contains("No such file"), "{error}");
    bench.agent.restart();
    // Nobody asks: the subscription is renewed by itself, and says so.
    bench.rotated("web", 2).await;
    bench.issue("web").await.unwrap();
}

#[tokio::test]
async fn a_stream_that_ends_is_begun_again() {
    let bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.issue("web").await.unwrap();
    bench.agent.says("shop/web", Reply::End);
    bench.rotated("web", 1).await;
    assert_eq!(bench.refused("web").await.code, "spire_unreachable");
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.rotated("web", 2).await;
    bench.issue("web").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_away_is_tried_less_and_less_often() {
    let mut bench = Bench::new();
    bench.agent.says("shop/web", Reply::End);
    bench.refused("web").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let asked = bench.agent.asked().len();
    // 0.1 s doubled up to 5 s: some 16 times in a minute.
    assert!((10..25).contains(&asked), "{asked} times");
    bench.agent.kill().await;
}

#[tokio::test]
async fn whoever_is_forgotten_is_not_subscribed_for_any_longer() {
    let bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.agent.issues("shop/cart", &id("cart"), HOUR);
    bench.issue("web").await.unwrap();
    bench.issue("cart").await.unwrap();
    bench.agent.subscriptions(2).await;
    bench.spire.forget(&id("web"));
    timeout(LONG, bench.agent.subscriptions(1)).await.unwrap();
    let handle = bench.spire.subscription(&id("cart")).unwrap();
    // What was pushed and not yet fetched is wiped too.
    bench.agent.issues("shop/cart", &id("cart"), HOUR);
    bench.rotated("cart", 1).await;
    bench.spire.forget(&id("cart"));
    timeout(LONG, bench.agent.subscriptions(0)).await.unwrap();
    let error = timeout(LONG, handle.svid()).await.unwrap();
    assert_eq!(error.err().unwrap().code, "spire_not_asked");
}

#[tokio::test]
async fn nothing_is_left_when_it_runs_no_longer() {
    let mut bench = Bench::new();
    bench.agent.issues("shop/web", &id("web"), HOUR);
    bench.issue("web").await.unwrap();
    bench.agent.subscriptions(1).await;
    bench.running.shutdown().await;
    timeout(LONG, bench.agent.subscriptions(0)).await.unwrap();
}

#[tokio::test]
async fn what_is_no_service_account_of_the_own_trust_domain_is_never_asked_for() {
    let bench = Bench::new();
    let foreign = [
        "spiffe://other.example/ns/shop/sa/web",
        "spiffe://cluster.local/shop/web",
        "spiffe://cluster.local/ns/shop/sa/web/more",
    ];
    for identity in foreign {
        let identity = SpiffeId::new(identity).unwrap();
        let error = bench.spire.issue(&identity, HOUR).await.unwrap_err();
        assert_eq!(error.code, "spire_not_asked");
    }
    assert!(bench.agent.asked().is_empty());
}

#[tokio::test]
async fn federated_bundles_are_not_trusted() {
    let bench = Bench::new();
    let stranger = FakeAgent::start();
    bench.agent.bundles.send_modify(|bundles| {
        let theirs = stranger.authority.bundle().roots()[0].to_vec();
        bundles.insert("spiffe://other.example".to_owned(), theirs);
    });
    assert_eq!(bench.roots().await, 1);
    let bundle = bench.spire.bundle().borrow().clone();
    assert_eq!(bundle.roots(), bench.agent.authority.bundle().roots());
}

#[tokio::test]
async fn a_bundle_grows_with_a_new_root_and_is_never_replaced_by_a_bad_one() {
    let bench = Bench::new();
    assert_eq!(bench.roots().await, 1);
    let next = FakeAgent::start();
    let (own, mut bundle) = ("spiffe://cluster.local", bench.spire.bundle());
    bundle.mark_unchanged();
    for bad in [Vec::new(), b"no certificates".to_vec()] {
        bench.agent.bundles.send_modify(|bundles| {
            bundles.insert(own.to_owned(), bad);
        });
    }
    bench.agent.bundles.send_modify(|bundles| {
        bundles.remove(own);
    });
    bench.agent.bundles.send_modify(|bundles| {
        let roots = [&bench.agent.authority, &next.authority];
        let roots = roots.map(|ca| ca.bundle().roots()[0].to_vec());
        bundles.insert("cluster.local".to_owned(), roots.concat());
    });
    timeout(LONG, bundle.changed()).await.unwrap().unwrap();
    assert_eq!(
        bundle.borrow().roots().len(),
        2,
        "the first change is the good one"
    );
}

#[tokio::test]
async fn certificates_are_renewed_by_what_spire_pushes() {
    let mut bench = Bench::new();
    bench.running.shutdown().await;
    bench.spire = Arc::new(Spire::new(SpireConfig {
        socket: bench.agent.socket.clone(),
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
    }));
    let config = CertificatesConfig::default();
    let (certificates, renewal) = Certificates::new(bench.spire.clone(), config);
    let stop = tokio_util::sync::CancellationToken::new();
    bench.running.spawn(renewal.run(stop.clone()));
    bench.agent.issues("shop/web", &id("web"), HOUR);
    certificates.set_identities(BTreeSet::from([id("web")]));
    let mut changed = certificates.subscribe();
    let mut serial = async |not: &str| {
        loop {
            let current = certificates.current(&id("web"));
            match current.map(|c| c.serial.clone()).filter(|s| s != not) {
                Some(serial) => return serial,
                None => timeout(LONG, changed.changed()).await.unwrap().unwrap(),
            }
        }
    };
    let first = serial("").await;
    bench.agent.issues("shop/web", &id("web"), HOUR);
    let second = serial(&first).await;
    // One that has expired is refused, and what is good stays.
    let expired = bench.agent.svid_until(&id("web"), SystemTime::now() - HOUR);
    bench.agent.says("shop/web", Reply::Svids(vec![expired]));
    let refused = async {
        let mut changed = certificates.subscribe();
        loop {
            let status = certificates.state().identities[0].clone();
            if let Some(error) = &status.last_error {
                assert_eq!(status.state, IdentityState::Available);
                return error.code;
            }
            changed.changed().await.unwrap();
        }
    };
    let code = timeout(LONG, refused).await.unwrap();
    assert_eq!(code, "issued_expired");
    assert_eq!(certificates.current(&id("web")).unwrap().serial, second);
    stop.cancel();
    while bench.running.join_next().await.is_some() {}
    timeout(LONG, bench.agent.subscriptions(0)).await.unwrap();
}
