//! Policies, observed from the applications: before a connection and while it is open.

use std::time::Instant;

use super::*;

/// How soon a new policy must end the connections that it denies.
const MAX_DENIAL_DELAY: Duration = Duration::from_secs(1);

const DENY_8081: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-8081, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {ports: ['8081']}}]}]}
";

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
";

fn denials(mesh: &TestMesh, policy: &str) -> f64 {
    let label = format!("policy=\"{policy}\"");
    mesh.metric_sum("ambit_policy_denials_total", &[&label])
}

fn deny_flags(mesh: &TestMesh, reporter: &str) -> f64 {
    let labels = [
        &*format!("reporter=\"{reporter}\""),
        "response_flags=\"DENY\"",
    ];
    mesh.metric_sum("istio_tcp_connections_failed_total", &labels)
}

/// Opens a connection from `a` through the mesh to a port of `b`, and sends a message each way.
async fn open_connection(mesh: &TestMesh, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let to = listener.local_addr().unwrap().to_string();
    let (mut client, mut server) = connect_and_accept(mesh, &to, listener).await;
    exchange(&mut client, &mut server).await;
    (client, server)
}

#[tokio::test]
async fn deny_policy_refuses_matching_connections_only_and_is_named() {
    let mesh = TestMesh::new(Options::default()).await;
    let (allowed, denied) = (
        mesh.listen("b", "10.77.0.2:8080"),
        mesh.listen("b", "10.77.0.2:8081"),
    );
    mesh.apply_policies(DENY_8081);
    let _open = open_connection(&mesh, &allowed).await;
    expect_refused(&mesh, "a", "10.77.0.2:8081").await;
    expect_refused(&mesh, "c", "10.77.0.2:8081").await;
    mesh.wait_until("both sides to count the denial", |mesh| {
        denials(mesh, "AuthorizationPolicy shop/deny-8081") == 2.0
            && deny_flags(mesh, "destination") == 2.0
            && deny_flags(mesh, "source") == 1.0
    })
    .await;
    let failures = |labels: &[&str]| mesh.metric_sum("ambit_connection_failures_total", labels);
    assert_eq!(failures(&["inbound", "policy_denied"]), 2.0);
    assert_eq!(failures(&["outbound", "connect_rejected"]), 1.0);
    let reached = tokio::time::timeout(Duration::from_millis(50), denied.accept()).await;
    assert!(reached.is_err(), "the application was reached");
    mesh.shut_down().await;
}

#[tokio::test]
async fn denied_connect_gets_401_and_its_tunnel_stays_open() {
    let mesh = TestMesh::new(Options::default()).await;
    let (allowed, _denied) = (
        mesh.listen("b", "10.77.0.2:8080"),
        mesh.listen("b", "10.77.0.2:8081"),
    );
    mesh.apply_policies(DENY_8081);
    let member = "spiffe://cluster.local/ns/shop/sa/a";
    let requests = async {
        let response = mesh.send_connect(member, "10.77.0.2:8081").await;
        assert_eq!(response.err(), Some(Reason::ConnectRejected(401)));
        assert!(mesh.send_connect(member, "10.77.0.2:8080").await.is_ok());
    };
    LocalSet::new().run_until(requests).await;
    let _accepted = within_timeout(allowed.accept()).await.unwrap();
    let (mut client, mut server) = open_connection(&mesh, &allowed).await;
    for _ in 0..3 {
        expect_refused(&mesh, "a", "10.77.0.2:8081").await;
        exchange(&mut client, &mut server).await;
    }
    let _another = open_connection(&mesh, &allowed).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn new_deny_policy_ends_matching_open_connections_within_a_second() {
    let mesh = TestMesh::new(Options::default()).await;
    let (allowed, denied) = (
        mesh.listen("b", "10.77.0.2:8080"),
        mesh.listen("b", "10.77.0.2:8081"),
    );
    let mut unaffected = Vec::new();
    let mut ended = Vec::new();
    for _ in 0..4 {
        unaffected.push(open_connection(&mesh, &allowed).await);
        ended.push(open_connection(&mesh, &denied).await);
    }
    let start = Instant::now();
    mesh.apply_policies(DENY_8081);
    for (client, server) in &mut ended {
        expect_reset(client).await;
        expect_reset(server).await;
    }
    assert!(start.elapsed() < MAX_DENIAL_DELAY, "{:?}", start.elapsed());
    for (client, server) in &mut unaffected {
        exchange(client, server).await;
    }
    mesh.wait_until("each denial to be counted under its policy", |mesh| {
        denials(mesh, "AuthorizationPolicy shop/deny-8081") == 4.0
            && deny_flags(mesh, "destination") == 4.0
    })
    .await;
    // The tunnel that carried the ended streams takes new ones.
    let _another = open_connection(&mesh, &allowed).await;
    mesh.apply_policies("");
    let _again = open_connection(&mesh, &denied).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn deny_policy_during_the_dial_ends_the_dial() {
    let mesh = TestMesh::new(Options::default()).await;
    let _application = mesh.listen_without_accepting("b", "10.77.0.2:8081");
    // The first connection fills the application's backlog.
    let mut first = mesh.connect("a", "10.77.0.2:8081").await.unwrap();
    let one_is_open = |mesh: &TestMesh| {
        let open = mesh.data_plane.connections(&uid("b"));
        open.len() == 1 && open[0].actual_destination.is_some()
    };
    mesh.wait_until("one connection in the backlog", one_is_open)
        .await;
    let mut second = mesh.connect("a", "10.77.0.2:8081").await.unwrap();
    let one_is_dialled = |mesh: &TestMesh| {
        let open = mesh.data_plane.connections(&uid("b"));
        let dialled = open.iter().filter(|one| one.actual_destination.is_none());
        open.len() == 2 && dialled.count() == 1
    };
    mesh.wait_until("another connection to be dialled", one_is_dialled)
        .await;
    let start = Instant::now();
    mesh.apply_policies(DENY_8081);
    expect_reset(&mut second).await;
    expect_reset(&mut first).await;
    assert!(start.elapsed() < MAX_DENIAL_DELAY, "{:?}", start.elapsed());
    mesh.wait_until("both to be denied by the policy", |mesh| {
        denials(mesh, "AuthorizationPolicy shop/deny-8081") == 2.0
            && mesh.data_plane.connections(&uid("b")).is_empty()
    })
    .await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn strict_mtls_ends_plain_connections_and_keeps_mutual_tls() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let mut mutual_tls = open_connection(&mesh, &listener).await;
    let mut plain = mesh.connect("c", "10.77.0.2:8080").await.unwrap();
    let (mut server, _) = within_timeout(listener.accept()).await.unwrap();
    exchange(&mut plain, &mut server).await;
    let start = Instant::now();
    mesh.apply_policies(STRICT);
    expect_reset(&mut plain).await;
    expect_reset(&mut server).await;
    assert!(start.elapsed() < MAX_DENIAL_DELAY, "{:?}", start.elapsed());
    exchange(&mut mutual_tls.0, &mut mutual_tls.1).await;
    expect_refused(&mesh, "c", "10.77.0.2:8080").await;
    let _another = open_connection(&mesh, &listener).await;
    assert_eq!(
        denials(&mesh, "PeerAuthentication istio-system/default"),
        2.0
    );
    mesh.shut_down().await;
}

#[tokio::test]
async fn changed_label_applies_other_policies_to_open_connections() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let deny_secret = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow-nothing, namespace: shop}
spec: {selector: {matchLabels: {app: secret}}}
";
    mesh.apply_policies(deny_secret);
    let (mut client, mut server) = open_connection(&mesh, &listener).await;
    mesh.publish(&manifests().replace("app: b}", "app: secret}"), deny_secret);
    expect_reset(&mut client).await;
    expect_reset(&mut server).await;
    assert_eq!(denials(&mesh, "AuthorizationPolicy: no ALLOW matched"), 1.0);

    let from_a = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-a, namespace: shop}
spec: {podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}
";
    mesh.apply_policies(from_a);
    let (mut client, mut server) = open_connection(&mesh, &listener).await;
    mesh.publish(&manifests().replace("app: a}", "app: z}"), from_a);
    expect_reset(&mut client).await;
    expect_reset(&mut server).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn dry_run_policy_is_counted_and_ends_nothing() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8081");
    let (mut client, mut server) = open_connection(&mesh, &listener).await;
    mesh.apply_policies(&DENY_8081.replace(
        "namespace: shop}",
        "namespace: shop, annotations: {istio.io/dry-run: 'true'}}",
    ));
    let has_dry_run_denials = |mesh: &TestMesh, count: f64| {
        let policy = "policy=\"AuthorizationPolicy shop/deny-8081\"";
        mesh.metric_sum("ambit_policy_dry_run_denials_total", &[policy]) == count
    };
    mesh.wait_until("the open connection to be counted", |mesh| {
        has_dry_run_denials(mesh, 1.0)
    })
    .await;
    exchange(&mut client, &mut server).await;
    let _another = open_connection(&mesh, &listener).await;
    mesh.wait_until("the new connection to be counted", |mesh| {
        has_dry_run_denials(mesh, 2.0)
    })
    .await;
    assert_eq!(mesh.metric_sum("ambit_policy_denials_total", &[]), 0.0);
    mesh.shut_down().await;
}

#[tokio::test]
async fn pod_removed_from_the_model_refuses_new_connections_and_keeps_open_ones() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8081");
    let (mut client, mut server) = open_connection(&mesh, &listener).await;
    let manifests = manifests();
    let documents = manifests.split("---\n");
    let without_b: Vec<_> = documents.filter(|one| !one.contains("uid-b")).collect();
    mesh.publish(&without_b.join("---\n"), DENY_8081);
    let member = "spiffe://cluster.local/ns/shop/sa/a";
    let response = LocalSet::new()
        .run_until(mesh.send_connect(member, "10.77.0.2:8081"))
        .await;
    assert!(response.is_err());
    exchange(&mut client, &mut server).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn trust_domain_alias_is_admitted_and_another_trust_domain_refused() {
    let mesh = TestMesh::new(Options {
        trust_domain_aliases: vec!["old.example".parse().unwrap()],
        ..Options::default()
    })
    .await;
    let _listener = mesh.listen("b", "10.77.0.2:8080");
    let requests = async {
        let old = "spiffe://old.example/ns/shop/sa/a";
        assert!(mesh.send_connect(old, "10.77.0.2:8080").await.is_ok());
        let foreign = "spiffe://elsewhere.example/ns/shop/sa/a";
        let response = mesh.send_connect(foreign, "10.77.0.2:8080").await;
        assert_eq!(response.err(), Some(Reason::ConnectRejected(401)));
    };
    LocalSet::new().run_until(requests).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn denied_connections_never_pass_during_rapid_policy_changes() {
    let mesh = TestMesh::new(Options::default()).await;
    let (allowed, denied) = (
        mesh.listen("b", "10.77.0.2:8080"),
        mesh.listen("b", "10.77.0.2:8081"),
    );
    let (mut client, mut server) = open_connection(&mesh, &allowed).await;
    for round in 0..100 {
        // Every version denies 8081, under one name or the other.
        let other = DENY_8081.replace("deny-8081", "also-deny-8081");
        mesh.apply_policies(if round % 2 == 0 { DENY_8081 } else { &other });
        expect_refused(&mesh, "a", "10.77.0.2:8081").await;
        exchange(&mut client, &mut server).await;
    }
    let reached = tokio::time::timeout(Duration::from_millis(50), denied.accept()).await;
    assert!(reached.is_err(), "the application was reached");
    mesh.shut_down().await;
}
