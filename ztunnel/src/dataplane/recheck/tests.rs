//! What a change does to open connections, and what it leaves alone.

use std::net::SocketAddr;

use mesh::objects::{Objects, parse};
use mesh::{Denial, Params, WorkloadUid, compile};
use spiffe::SpiffeId;
use tokio::task::LocalSet;

use super::super::pods::Served;
use super::super::registry::{Direction, Registered, Request};
use super::*;

/// Two pods, `web` at 10.0.0.1 and `cart` at 10.0.0.2, which are labelled by their names.
const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u-web, labels: {app: web}}
spec: {serviceAccountName: web, containers: [{name: app, image: app}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u-cart, labels: {app: cart}}
spec: {serviceAccountName: cart, containers: [{name: app, image: app}]}
status: {phase: Running, podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}]}
";

/// Denies everybody port 9090 of every pod of the namespace.
pub(crate) const DENY_9090: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-9090, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {ports: ['9090']}}]}]}
";

/// The two pods, and what else is given, replace what the store held.
pub(crate) fn publish(store: &Store, more: &[&str]) {
    publish_with(store, PODS, more);
}

fn publish_with(store: &Store, pods: &str, more: &[&str]) {
    let yaml = [&[pods], more].concat().join("---\n");
    let mut objects = Objects::default();
    let parsed = parse(&"world.yaml".into(), yaml.as_bytes());
    assert!(parsed.broken.is_empty(), "{:?}", parsed.broken);
    for (object, origin) in parsed.objects {
        objects.insert(object, origin);
    }
    let params = Params::new("cluster.local".parse().unwrap());
    let (model, problems) = compile(&objects, &params);
    store.apply(model, problems);
}

/// A store with the two pods, and `cart` as a pod of this node.
pub(crate) fn cart() -> (Store, Rc<PodContext>) {
    let store = Store::new();
    publish(&store, &[]);
    let uid = WorkloadUid::of_pod("Kubernetes", "shop", "cart", "u-cart");
    let pod = Rc::new(PodContext::of(uid, store.clone()));
    (store, pod)
}

fn web() -> Option<Arc<SpiffeId>> {
    let id = SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").unwrap();
    Some(Arc::new(id))
}

/// An open connection from `web` to a port of `cart`.
fn open(pod: &Rc<PodContext>, identity: Option<Arc<SpiffeId>>, port: u16) -> Registered {
    let (source, destination) = (
        SocketAddr::from(([10, 0, 0, 1], 40_000)),
        SocketAddr::from(([10, 0, 0, 2], port)),
    );
    let connection = Connection::new(Direction::Inbound, source, destination);
    let open = pod.register(pod.admit().unwrap(), connection);
    open.asks(Request {
        identity,
        destination,
    });
    open
}

fn denied_by(connection: &Connection) -> Option<&str> {
    connection.denial().map(|denial| &*denial.policy)
}

fn trials(pod: &PodContext) -> usize {
    let text = pod.telemetry.scrape();
    let of = |line: &&str| line.starts_with("ambit_policy_dry_run_denials_total");
    text.lines().filter(of).map(count).sum()
}

fn count(line: &str) -> usize {
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn what_a_new_policy_denies_ends_and_its_neighbours_do_not() {
    let (store, pod) = cart();
    let (denied, neighbour) = (open(&pod, web(), 9090), open(&pod, web(), 8080));
    now(&pod);
    assert_eq!(denied.stop.reason(), None);
    publish(&store, &[DENY_9090]);
    now(&pod);
    assert_eq!(denied.stop.reason(), Some(Denial::CODE));
    assert_eq!(
        denied_by(&denied),
        Some("AuthorizationPolicy shop/deny-9090")
    );
    assert_eq!(neighbour.stop.reason(), None);
}

#[tokio::test]
async fn strict_ends_what_is_in_clear_and_nothing_else() {
    let (store, pod) = cart();
    let (plain, proven) = (open(&pod, None, 8080), open(&pod, web(), 8080));
    let strict = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
";
    publish(&store, &[strict]);
    now(&pod);
    assert_eq!(
        denied_by(&plain),
        Some("PeerAuthentication istio-system/default")
    );
    assert_eq!(proven.stop.reason(), None);
}

#[tokio::test]
async fn a_label_decides_as_it_is_today_on_either_side() {
    let (store, pod) = cart();
    let of_others = DENY_9090.replace("spec: {", "spec: {selector: {matchLabels: {app: other}}, ");
    let from_web = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-web, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]}
";
    let connection = open(&pod, web(), 9090);
    publish(&store, &[&of_others, from_web]);
    now(&pod);
    assert_eq!(connection.stop.reason(), None);

    let relabelled = PODS.replace("{app: cart}", "{app: other}");
    publish_with(&store, &relabelled, &[&of_others]);
    now(&pod);
    assert_eq!(
        denied_by(&connection),
        Some("AuthorizationPolicy shop/deny-9090")
    );

    let connection = open(&pod, web(), 9090);
    let relabelled = PODS.replace("{app: web}", "{app: other}");
    publish_with(&store, &relabelled, &[from_web]);
    now(&pod);
    let policy = denied_by(&connection).unwrap_or_default();
    assert!(policy.starts_with("NetworkPolicy"), "{policy}");
}

#[tokio::test]
async fn a_pod_that_is_not_known_is_left_to_whoever_removes_it() {
    let (store, pod) = cart();
    let connection = open(&pod, web(), 9090);
    let (web_alone, _) = PODS.rsplit_once("---").unwrap();
    publish_with(&store, web_alone, &[DENY_9090]);
    now(&pod);
    assert_eq!(connection.stop.reason(), None);
}

#[tokio::test]
async fn a_policy_on_trial_ends_nothing_and_is_counted_once_for_each_connection() {
    let (store, pod) = cart();
    let trial = DENY_9090.replace(
        "namespace: shop",
        "namespace: shop, annotations: {istio.io/dry-run: 'true'}",
    );
    let connections = [open(&pod, web(), 9090), open(&pod, web(), 9090)];
    publish(&store, &[&trial]);
    for _ in 0..3 {
        now(&pod);
    }
    for connection in &connections {
        assert_eq!(connection.stop.reason(), None);
    }
    assert_eq!(trials(&pod), 2);
}

/// Follows the store for one pod in a `LocalSet` while `test` runs.
async fn following(store: &Store, pod: &Rc<PodContext>, test: impl Future<Output = ()>) {
    let (pods, stop) = (Pods::default(), CancellationToken::new());
    let served = Served {
        context: pod.clone(),
        ended: CancellationToken::new(),
    };
    pods.add(pod.uid.clone(), Rc::new(served));
    let local = LocalSet::new();
    let follower = local.spawn_local(follow(store.clone(), pods, stop.clone()));
    local.run_until(test).await;
    stop.cancel();
    local.run_until(follower).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn every_version_is_followed_within_a_second_however_fast_they_come() {
    let (store, pod) = cart();
    let flood = async {
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
    following(&store, &pod, flood).await;
}

#[tokio::test]
async fn ten_thousand_connections_are_re_checked_in_turns_that_leave_room_for_traffic() {
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
        let done = pass.turn(&store, start + TURN);
        let turn = start.elapsed();
        (busy, longest, turns) = (busy + turn, longest.max(turn), turns + 1);
        if done {
            break;
        }
    }
    println!("{CONNECTIONS} connections: {busy:?} in {turns} turns, the longest {longest:?}");
    let denied = open.iter().filter(|one| one.denial().is_some()).count();
    assert_eq!(denied, usize::from(CONNECTIONS) / 100);
    // Generous, because the machine that runs tests is busy with others; a pass takes milliseconds.
    assert!(busy < Duration::from_millis(500), "{busy:?}");
}
