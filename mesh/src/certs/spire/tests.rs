//! The source against a test agent.

mod fake_agent;

use std::collections::BTreeSet;
use std::time::SystemTime;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tonic::Code;

use super::*;
use crate::certs::{Certificates, CertificatesConfig, IdentityState, IssuedCertificate};
use fake_agent::{FakeAgent, Reply};

const HOUR: Duration = Duration::from_secs(3600);
/// Longer than any timeout of the source.
const LONG: Duration = Duration::from_secs(60);

fn id(name: &str) -> SpiffeId {
    SpiffeId::new(format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap()
}

/// An agent, and the source that is connected to it.
struct Fixture {
    agent: FakeAgent,
    spire: Arc<Spire>,
    running: JoinSet<()>,
}

impl Fixture {
    fn new() -> Self {
        let agent = FakeAgent::start();
        let spire = Arc::new(Spire::new(SpireConfig {
            socket: agent.socket.clone(),
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
        }));
        let mut running = JoinSet::new();
        let source = spire.clone();
        running.spawn(async move { source.run().await });
        Self {
            agent,
            spire,
            running,
        }
    }

    async fn issue(&self, name: &str) -> Result<IssuedCertificate, IssueError> {
        let identity = id(name);
        let issuing = self.spire.issue(&identity, HOUR);
        timeout(LONG, issuing)
            .await
            .expect("an outcome before the timeout")
    }

    /// The error of an identity that is not issued.
    async fn issue_error(&self, name: &str) -> IssueError {
        self.issue(name).await.expect_err("an error")
    }

    /// Waits until the source has counted this many updates of an identity.
    async fn wait_for_updates(&self, name: &str, count: u64) {
        let mut updates = self.spire.updates().unwrap();
        let reached = updates.wait_for(|counts| counts.get(&id(name)).is_some_and(|n| *n >= count));
        timeout(LONG, reached)
            .await
            .expect("an update before the timeout")
            .unwrap();
    }

    async fn roots(&self) -> usize {
        let mut bundle = self.spire.bundle();
        let known = bundle.wait_for(|bundle| !bundle.is_empty());
        timeout(LONG, known).await.unwrap().unwrap().roots().len()
    }
}

#[tokio::test]
async fn an_identity_is_requested_by_namespace_and_service_account() {
    let fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.agent.set_svid("shop/cart", &id("cart"), HOUR);
    let issued = fixture.issue("web").await.unwrap();
    assert!(!issued.key.is_empty());
    assert_eq!(issued.chain.len(), 1);
    // Only this identity is requested.
    assert_eq!(fixture.agent.subscribed(), ["k8s:ns:shop k8s:sa:web"]);
    assert_eq!(fixture.roots().await, 1);
}

#[tokio::test]
async fn of_several_svids_the_requested_one_is_used() {
    let fixture = Fixture::new();
    let svids = ["db", "web", "cart"].map(|name| fixture.agent.svid(&id(name), HOUR));
    let web = svids[1].x509_svid_key.clone();
    fixture
        .agent
        .set_reply("shop/web", Reply::Svids(svids.into()));
    let issued = fixture.issue("web").await.unwrap();
    assert_eq!(issued.key.as_slice(), web.as_ref());
}

#[tokio::test]
async fn an_svid_of_another_identity_is_rejected() {
    let fixture = Fixture::new();
    let admin = fixture.agent.svid(&id("admin"), HOUR);
    fixture
        .agent
        .set_reply("shop/web", Reply::Svids(vec![admin]));
    let error = fixture.issue_error("web").await;
    assert_eq!(error.code, "wrong_identity");
    assert!(error.message.contains("/ns/shop/sa/admin"), "{error}");
}

#[tokio::test]
async fn the_id_field_of_a_response_is_not_trusted() {
    let fixture = Fixture::new();
    let mut svid = fixture.agent.svid(&id("admin"), HOUR);
    let document = svid.x509_svid.as_mut().unwrap();
    document.id = Some(spire_api::pb::spire::api::types::Spiffeid {
        trust_domain: "cluster.local".to_owned(),
        path: "/ns/shop/sa/web".to_owned(),
    });
    fixture
        .agent
        .set_reply("shop/web", Reply::Svids(vec![svid]));
    assert_eq!(fixture.issue_error("web").await.code, "wrong_identity");
}

#[tokio::test]
async fn malformed_svids_are_rejected() {
    let fixture = Fixture::new();
    let mut malformed = fixture.agent.svid(&id("web"), HOUR);
    malformed.x509_svid.as_mut().unwrap().cert_chain[0] = b"not a certificate".to_vec().into();
    fixture
        .agent
        .set_reply("shop/web", Reply::Svids(vec![malformed]));
    assert_eq!(fixture.issue_error("web").await.code, "issued_garbage");

    let mut keyless = fixture.agent.svid(&id("cart"), HOUR);
    keyless.x509_svid_key = Default::default();
    fixture
        .agent
        .set_reply("shop/cart", Reply::Svids(vec![keyless]));
    assert_eq!(fixture.issue_error("cart").await.code, "issued_garbage");

    let empty = Default::default();
    fixture
        .agent
        .set_reply("shop/db", Reply::Svids(vec![empty]));
    assert_eq!(fixture.issue_error("db").await.code, "issued_garbage");
}

#[tokio::test]
async fn an_identity_without_an_entry_is_issued_after_an_entry_is_created() {
    let fixture = Fixture::new();
    assert_eq!(fixture.issue_error("web").await.code, "spire_no_entry");
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.wait_for_updates("web", 1).await;
    fixture.issue("web").await.unwrap();
}

#[tokio::test]
async fn a_removed_entry_counts_as_an_update() {
    let fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.issue("web").await.unwrap();
    fixture.agent.remove_entry("shop/web");
    fixture.wait_for_updates("web", 1).await;
    assert_eq!(fixture.issue_error("web").await.code, "spire_no_entry");
}

#[tokio::test]
async fn a_daemon_that_is_not_a_delegate_is_denied() {
    let fixture = Fixture::new();
    let denied = Reply::Error(Code::PermissionDenied, "caller not configured");
    fixture.agent.set_reply("shop/web", denied);
    let error = fixture.issue_error("web").await;
    assert_eq!(error.code, "spire_denied");
    assert!(error.message.contains("authorized_delegates"), "{error}");
}

#[tokio::test]
async fn an_error_of_the_agent_is_reported_with_its_message() {
    let fixture = Fixture::new();
    let failure = Reply::Error(Code::Internal, "workload attestation failed");
    fixture.agent.set_reply("shop/web", failure);
    let error = fixture.issue_error("web").await;
    assert_eq!(error.code, "spire_failed");
    assert!(
        error.message.contains("workload attestation failed"),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_hangs_fails_requests_after_the_timeout() {
    let fixture = Fixture::new();
    fixture.agent.set_reply("shop/web", Reply::Hang);
    let start = Instant::now();
    assert_eq!(fixture.issue_error("web").await.code, "spire_silent");
    assert!(start.elapsed() < Duration::from_secs(6));
    // It responds again.
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.wait_for_updates("web", 1).await;
    fixture.issue("web").await.unwrap();
}

#[tokio::test]
async fn a_pushed_svid_counts_once_and_is_returned_without_a_request() {
    let fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    let first = fixture.issue("web").await.unwrap();
    assert!(fixture.spire.updates().unwrap().borrow().is_empty());
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.wait_for_updates("web", 1).await;
    let second = fixture.issue("web").await.unwrap();
    assert_ne!(first.chain, second.chain);
    assert_eq!(fixture.agent.subscribed().len(), 1, "one subscription");
    // Agents repeat an SVID when something else has changed.
    fixture.agent.set_svid("shop/cart", &id("cart"), HOUR);
    fixture.issue("cart").await.unwrap();
    fixture.issue("web").await.unwrap();
    let updates = fixture.spire.updates().unwrap().borrow().clone();
    assert_eq!(updates.get(&id("web")), Some(&1));
}

#[tokio::test]
async fn a_restarted_agent_is_reconnected() {
    let mut fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.issue("web").await.unwrap();
    fixture.agent.stop().await;
    fixture.wait_for_updates("web", 1).await;
    let error = fixture.issue_error("web").await;
    assert_eq!(error.code, "spire_unreachable");
    assert!(error.message.contains("admin.sock"), "{error}");
    assert!(error.message.contains("No such file"), "{error}");
    fixture.agent.restart();
    // Without a request: the subscription is reopened, which counts as an update.
    fixture.wait_for_updates("web", 2).await;
    fixture.issue("web").await.unwrap();
}

#[tokio::test]
async fn an_ended_stream_is_reopened() {
    let fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.issue("web").await.unwrap();
    fixture.agent.set_reply("shop/web", Reply::End);
    fixture.wait_for_updates("web", 1).await;
    assert_eq!(fixture.issue_error("web").await.code, "spire_unreachable");
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.wait_for_updates("web", 2).await;
    fixture.issue("web").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_unavailable_agent_is_retried_with_backoff() {
    let mut fixture = Fixture::new();
    fixture.agent.set_reply("shop/web", Reply::End);
    fixture.issue_error("web").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let count = fixture.agent.subscribed().len();
    // 0.1 s doubled up to 5 s: about 16 times per minute.
    assert!((10..25).contains(&count), "{count} times");
    fixture.agent.stop().await;
}

#[tokio::test]
async fn a_removed_identity_ends_its_subscription_and_wipes_its_svid() {
    let fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.agent.set_svid("shop/cart", &id("cart"), HOUR);
    fixture.issue("web").await.unwrap();
    fixture.issue("cart").await.unwrap();
    fixture.agent.subscriptions(2).await;
    fixture.spire.remove_identity(&id("web"));
    timeout(LONG, fixture.agent.subscriptions(1)).await.unwrap();
    let handle = fixture.spire.subscription(&id("cart")).unwrap();
    // A pushed SVID that was not taken is wiped.
    fixture.agent.set_svid("shop/cart", &id("cart"), HOUR);
    fixture.wait_for_updates("cart", 1).await;
    fixture.spire.remove_identity(&id("cart"));
    timeout(LONG, fixture.agent.subscriptions(0)).await.unwrap();
    let error = timeout(LONG, handle.svid()).await.unwrap();
    assert_eq!(error.err().unwrap().code, "spire_not_asked");
}

#[tokio::test]
async fn dropping_the_run_future_ends_all_subscriptions() {
    let mut fixture = Fixture::new();
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    fixture.issue("web").await.unwrap();
    fixture.agent.subscriptions(1).await;
    fixture.running.shutdown().await;
    timeout(LONG, fixture.agent.subscriptions(0)).await.unwrap();
}

#[tokio::test]
async fn only_service_accounts_of_the_own_trust_domain_are_requested() {
    let fixture = Fixture::new();
    let foreign = [
        "spiffe://other.example/ns/shop/sa/web",
        "spiffe://cluster.local/shop/web",
        "spiffe://cluster.local/ns/shop/sa/web/more",
    ];
    for identity in foreign {
        let identity = SpiffeId::new(identity).unwrap();
        let error = fixture.spire.issue(&identity, HOUR).await.unwrap_err();
        assert_eq!(error.code, "spire_not_asked");
    }
    assert!(fixture.agent.subscribed().is_empty());
}

#[tokio::test]
async fn federated_bundles_are_not_trusted() {
    let fixture = Fixture::new();
    let federated = FakeAgent::start();
    fixture.agent.bundles.send_modify(|bundles| {
        let root = federated.authority.bundle().roots()[0].to_vec();
        bundles.insert("spiffe://other.example".to_owned(), root);
    });
    assert_eq!(fixture.roots().await, 1);
    let bundle = fixture.spire.bundle().borrow().clone();
    assert_eq!(bundle.roots(), fixture.agent.authority.bundle().roots());
}

#[tokio::test]
async fn a_new_root_is_added_and_an_invalid_bundle_is_ignored() {
    let fixture = Fixture::new();
    assert_eq!(fixture.roots().await, 1);
    let next = FakeAgent::start();
    let (own, mut bundle) = ("spiffe://cluster.local", fixture.spire.bundle());
    bundle.mark_unchanged();
    for bad in [Vec::new(), b"not certificates".to_vec()] {
        fixture.agent.bundles.send_modify(|bundles| {
            bundles.insert(own.to_owned(), bad);
        });
    }
    fixture.agent.bundles.send_modify(|bundles| {
        bundles.remove(own);
    });
    fixture.agent.bundles.send_modify(|bundles| {
        let roots = [&fixture.agent.authority, &next.authority];
        let roots = roots.map(|ca| ca.bundle().roots()[0].to_vec());
        bundles.insert("cluster.local".to_owned(), roots.concat());
    });
    timeout(LONG, bundle.changed()).await.unwrap().unwrap();
    assert_eq!(
        bundle.borrow().roots().len(),
        2,
        "only the valid bundle is a change"
    );
}

#[tokio::test]
async fn pushed_svids_renew_certificates() {
    let mut fixture = Fixture::new();
    fixture.running.shutdown().await;
    fixture.spire = Arc::new(Spire::new(SpireConfig {
        socket: fixture.agent.socket.clone(),
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
    }));
    let config = CertificatesConfig::default();
    let (certificates, renewal) = Certificates::new(fixture.spire.clone(), config);
    let stop = tokio_util::sync::CancellationToken::new();
    fixture.running.spawn(renewal.run(stop.clone()));
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
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
    fixture.agent.set_svid("shop/web", &id("web"), HOUR);
    let second = serial(&first).await;
    // An expired one is rejected, and the previous one stays.
    let expired = fixture
        .agent
        .svid_until(&id("web"), SystemTime::now() - HOUR);
    fixture
        .agent
        .set_reply("shop/web", Reply::Svids(vec![expired]));
    let rejected = async {
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
    let code = timeout(LONG, rejected).await.unwrap();
    assert_eq!(code, "issued_expired");
    assert_eq!(certificates.current(&id("web")).unwrap().serial, second);
    stop.cancel();
    while fixture.running.join_next().await.is_some() {}
    timeout(LONG, fixture.agent.subscriptions(0)).await.unwrap();
}
