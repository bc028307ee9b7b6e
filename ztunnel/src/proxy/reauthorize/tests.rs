use std::net::SocketAddr;

use mesh::Denial;
use spiffe::SpiffeId;
use tokio::task::LocalSet;

use super::super::connections::{AuthzRequest, Direction, Registration};
use super::super::fixture::{DENY_9090, PODS, cart, publish, publish_with};
use super::*;

fn web() -> Option<Arc<SpiffeId>> {
    let id = SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").unwrap();
    Some(Arc::new(id))
}

/// An open connection from `web` to a port of `cart`.
fn open(pod: &Rc<PodContext>, identity: Option<Arc<SpiffeId>>, port: u16) -> Registration {
    let (source, destination) = (
        SocketAddr::from(([10, 0, 0, 1], 40_000)),
        SocketAddr::from(([10, 0, 0, 2], port)),
    );
    let connection = Connection::new(Direction::Inbound, source, destination);
    let open = pod.register(pod.try_admit().unwrap(), connection);
    open.set_request(AuthzRequest {
        identity,
        destination,
    });
    open
}

fn denied_by(connection: &Connection) -> Option<&str> {
    connection.denial().map(|denial| &*denial.policy)
}

fn dry_run_denials(pod: &PodContext) -> usize {
    let text = pod.telemetry().scrape();
    let is_series = |line: &&str| line.starts_with("ambit_policy_dry_run_denials_total");
    text.lines().filter(is_series).map(value).sum()
}

fn value(line: &str) -> usize {
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn new_deny_policy_stops_matching_connections_only() {
    let (store, pod) = cart();
    let (denied, allowed) = (open(&pod, web(), 9090), open(&pod, web(), 8080));
    check_now(&pod);
    assert_eq!(denied.stop.reason(), None);
    publish(&store, &[DENY_9090]);
    check_now(&pod);
    assert_eq!(denied.stop.reason(), Some(Denial::CODE));
    assert_eq!(
        denied_by(&denied),
        Some("AuthorizationPolicy shop/deny-9090")
    );
    assert_eq!(allowed.stop.reason(), None);
}

#[tokio::test]
async fn strict_mtls_stops_plain_connections_only() {
    let (store, pod) = cart();
    let (plain, mutual_tls) = (open(&pod, None, 8080), open(&pod, web(), 8080));
    let strict = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
";
    publish(&store, &[strict]);
    check_now(&pod);
    assert_eq!(
        denied_by(&plain),
        Some("PeerAuthentication istio-system/default")
    );
    assert_eq!(mutual_tls.stop.reason(), None);
}

#[tokio::test]
async fn changed_label_of_either_side_changes_the_decision() {
    let (store, pod) = cart();
    let deny_other = DENY_9090.replace("spec: {", "spec: {selector: {matchLabels: {app: other}}, ");
    let from_web = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-web, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}
";
    let connection = open(&pod, web(), 9090);
    publish(&store, &[&deny_other, from_web]);
    check_now(&pod);
    assert_eq!(connection.stop.reason(), None);

    let relabelled = PODS.replace("{app: cart}", "{app: other}");
    publish_with(&store, &relabelled, &[&deny_other]);
    check_now(&pod);
    assert_eq!(
        denied_by(&connection),
        Some("AuthorizationPolicy shop/deny-9090")
    );

    let connection = open(&pod, web(), 9090);
    let relabelled = PODS.replace("{app: web}", "{app: other}");
    publish_with(&store, &relabelled, &[from_web]);
    check_now(&pod);
    let policy = denied_by(&connection).unwrap_or_default();
    assert!(policy.starts_with("NetworkPolicy"), "{policy}");
}

#[tokio::test]
async fn connections_of_an_unknown_pod_are_not_stopped() {
    let (store, pod) = cart();
    let connection = open(&pod, web(), 9090);
    let (web_alone, _) = PODS.rsplit_once("---").unwrap();
    publish_with(&store, web_alone, &[DENY_9090]);
    check_now(&pod);
    assert_eq!(connection.stop.reason(), None);
}

#[tokio::test]
async fn dry_run_policy_stops_nothing_and_counts_once_per_connection() {
    let (store, pod) = cart();
    let dry_run = DENY_9090.replace(
        "namespace: shop",
        "namespace: shop, annotations: {istio.io/dry-run: 'true'}",
    );
    let connections = [open(&pod, web(), 9090), open(&pod, web(), 9090)];
    publish(&store, &[&dry_run]);
    for _ in 0..3 {
        check_now(&pod);
    }
    for connection in &connections {
        assert_eq!(connection.stop.reason(), None);
    }
    assert_eq!(dry_run_denials(&pod), 2);
}

/// Watches the store for one pod in a `LocalSet` while `test` runs.
async fn watching(store: &Store, pod: &Rc<PodContext>, test: impl Future<Output = ()>) {
    let stop = CancellationToken::new();
    let watched = pod.clone();
    let pods = move || vec![watched.clone()];
    let local = LocalSet::new();
    let watcher = local.spawn_local(watch(store.clone(), pods, stop.clone()));
    local.run_until(test).await;
    stop.cancel();
    local.run_until(watcher).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn every_version_takes_effect_within_a_second_under_rapid_changes() {
    let (store, pod) = cart();
    let changes = async {
        for number in 0..100 {
            let allowed = open(&pod, web(), 8080);
            let denied = open(&pod, web(), 9090);
            publish(&store, &[DENY_9090]);
            let start = Instant::now();
            assert_eq!(denied.stop.stopped().await, Denial::CODE, "{number}");
            assert!(start.elapsed() < Duration::from_secs(1), "{number}");
            assert_eq!(allowed.stop.reason(), None, "{number}");
            publish(&store, &[]);
        }
    };
    watching(&store, &pod, changes).await;
}

#[tokio::test]
async fn ten_thousand_connections_are_checked_in_short_turns() {
    const CONNECTIONS: u16 = 10_000;
    let (store, pod) = cart();
    let open: Vec<_> = (0..CONNECTIONS)
        .map(|number| open(&pod, web(), 9000 + number % 100))
        .collect();
    publish(&store, &[DENY_9090]);
    let mut pass = Pass::new(vec![pod]);
    let (mut busy, mut longest, mut turns) = (Duration::ZERO, Duration::ZERO, 0_u32);
    loop {
        let start = Instant::now();
        let is_done = pass.run_turn(&store, start + TURN_BUDGET);
        let turn = start.elapsed();
        (busy, longest, turns) = (busy + turn, longest.max(turn), turns + 1);
        if is_done {
            break;
        }
    }
    println!("{CONNECTIONS} connections: {busy:?} in {turns} turns, the longest {longest:?}");
    let denied = open.iter().filter(|one| one.denial().is_some()).count();
    assert_eq!(denied, usize::from(CONNECTIONS) / 100);
    // A pass takes milliseconds; the bound allows for a loaded test machine.
    assert!(busy < Duration::from_millis(500), "{busy:?}");
}
