//! Who may talk to whom: what an application sees of a policy, before and while it is connected.

use std::time::Instant;

use super::*;

/// A denial of what is open has to happen within this.
const SECOND: Duration = Duration::from_secs(1);

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

fn denials(world: &World, policy: &str) -> f64 {
    let label = format!("policy=\"{policy}\"");
    world.count("ambit_policy_denials_total", &[&label])
}

fn flagged(world: &World, reporter: &str) -> f64 {
    let labels = [
        &*format!("reporter=\"{reporter}\""),
        "response_flags=\"DENY\"",
    ];
    world.count("istio_tcp_connections_failed_total", &labels)
}

/// A connection from `a` through the mesh to a port of `b`, used once each way.
async fn open(world: &World, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let to = listener.local_addr().unwrap().to_string();
    let (mut client, mut server) = connected(world, &to, listener).await;
    exchange(&mut client, &mut server).await;
    (client, server)
}

#[tokio::test]
async fn a_policy_denies_what_it_says_under_its_name_and_allows_the_rest() {
    let world = World::new(Options::default()).await;
    let (allowed, denied) = (
        world.listen("b", "10.77.0.2:8080"),
        world.listen("b", "10.77.0.2:8081"),
    );
    world.policies(DENY_8081);
    let _open = open(&world, &allowed).await;
    refused(&world, "a", "10.77.0.2:8081").await;
    refused(&world, "c", "10.77.0.2:8081").await;
    world
        .until("both sides say that it was denied", |world| {
            denials(world, "AuthorizationPolicy shop/deny-8081") == 2.0
                && flagged(world, "destination") == 2.0
                && flagged(world, "source") == 1.0
        })
        .await;
    let failures = |labels: &[&str]| world.count("ambit_connection_failures_total", labels);
    assert_eq!(failures(&["inbound", "policy_denied"]), 2.0);
    assert_eq!(failures(&["outbound", "connect_rejected"]), 1.0);
    let reached = tokio::time::timeout(Duration::from_millis(50), denied.accept()).await;
    assert!(reached.is_err(), "the application was reached");
    world.end().await;
}

#[tokio::test]
async fn a_denied_connect_is_answered_401_and_its_tunnel_goes_on() {
    let world = World::new(Options::default()).await;
    let (allowed, _denied) = (
        world.listen("b", "10.77.0.2:8080"),
        world.listen("b", "10.77.0.2:8081"),
    );
    world.policies(DENY_8081);
    let member = "spiffe://cluster.local/ns/shop/sa/a";
    let asking = async {
        let answer = world.ask(member, "10.77.0.2:8081").await;
        assert_eq!(answer.err(), Some(Reason::ConnectRejected(401)));
        assert!(world.ask(member, "10.77.0.2:8080").await.is_ok());
    };
    LocalSet::new().run_until(asking).await;
    let _asked = within(allowed.accept()).await.unwrap();
    let (mut client, mut server) = open(&world, &allowed).await;
    for _ in 0..3 {
        refused(&world, "a", "10.77.0.2:8081").await;
        exchange(&mut client, &mut server).await;
    }
    let _another = open(&world, &allowed).await;
    world.end().await;
}

#[tokio::test]
async fn a_deny_ends_what_is_open_within_a_second_and_leaves_its_neighbours_alone() {
    let world = World::new(Options::default()).await;
    let (allowed, denied) = (
        world.listen("b", "10.77.0.2:8080"),
        world.listen("b", "10.77.0.2:8081"),
    );
    let mut neighbours = Vec::new();
    let mut ended = Vec::new();
    for _ in 0..4 {
        neighbours.push(open(&world, &allowed).await);
        ended.push(open(&world, &denied).await);
    }
    let start = Instant::now();
    world.policies(DENY_8081);
    for (client, server) in &mut ended {
        reset(client).await;
        reset(server).await;
    }
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    for (client, server) in &mut neighbours {
        exchange(client, server).await;
    }
    world
        .until("each is told with its policy", |world| {
            denials(world, "AuthorizationPolicy shop/deny-8081") == 4.0
                && flagged(world, "destination") == 4.0
        })
        .await;
    // The tunnel that lost half its streams takes new ones.
    let _another = open(&world, &allowed).await;
    world.policies("");
    let _again = open(&world, &denied).await;
    world.end().await;
}

#[tokio::test]
async fn a_deny_that_comes_while_the_application_is_dialled_ends_the_dial() {
    let world = World::new(Options::default()).await;
    let _application = world.listen_and_ignore("b", "10.77.0.2:8081");
    // The first waits in the application's backlog, which has no room for the second.
    let mut first = world.connect("a", "10.77.0.2:8081").await.unwrap();
    let one_is_open = |world: &World| {
        let open = world.data_plane.connections(&uid("b"));
        open.len() == 1 && open[0].actual_destination.is_some()
    };
    world.until("one is in the backlog", one_is_open).await;
    let mut second = world.connect("a", "10.77.0.2:8081").await.unwrap();
    let one_is_dialled = |world: &World| {
        let open = world.data_plane.connections(&uid("b"));
        let dialled = open.iter().filter(|one| one.actual_destination.is_none());
        open.len() == 2 && dialled.count() == 1
    };
    world.until("another is dialled", one_is_dialled).await;
    let start = Instant::now();
    world.policies(DENY_8081);
    reset(&mut second).await;
    reset(&mut first).await;
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    world
        .until("both are denied by the policy", |world| {
            denials(world, "AuthorizationPolicy shop/deny-8081") == 2.0
                && world.data_plane.connections(&uid("b")).is_empty()
        })
        .await;
    world.end().await;
}

#[tokio::test]
async fn strict_ends_what_is_in_clear_and_keeps_what_is_proven() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let mut proven = open(&world, &listener).await;
    let mut plain = world.connect("c", "10.77.0.2:8080").await.unwrap();
    let (mut server, _) = within(listener.accept()).await.unwrap();
    exchange(&mut plain, &mut server).await;
    let start = Instant::now();
    world.policies(STRICT);
    reset(&mut plain).await;
    reset(&mut server).await;
    assert!(start.elapsed() < SECOND, "{:?}", start.elapsed());
    exchange(&mut proven.0, &mut proven.1).await;
    refused(&world, "c", "10.77.0.2:8080").await;
    let _another = open(&world, &listener).await;
    assert_eq!(
        denials(&world, "PeerAuthentication istio-system/default"),
        2.0
    );
    world.end().await;
}

#[tokio::test]
async fn a_pod_that_is_relabelled_is_subject_to_other_policies_at_once() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let of_secret = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {selector: {matchLabels: {app: secret}}}
";
    world.policies(of_secret);
    let (mut client, mut server) = open(&world, &listener).await;
    world.publish(&manifests().replace("app: b}", "app: secret}"), of_secret);
    reset(&mut client).await;
    reset(&mut server).await;
    assert_eq!(
        denials(&world, "AuthorizationPolicy: no ALLOW matched"),
        1.0
    );

    let from_a = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-a, namespace: shop}
spec: {podSelector: {matchLabels: {app: b}}, ingress: [{from: [{podSelector: {matchLabels: {app: a}}}]}]}
";
    world.policies(from_a);
    let (mut client, mut server) = open(&world, &listener).await;
    world.publish(&manifests().replace("app: a}", "app: z}"), from_a);
    reset(&mut client).await;
    reset(&mut server).await;
    world.end().await;
}

#[tokio::test]
async fn a_policy_on_trial_is_counted_and_ends_nothing() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8081");
    let (mut client, mut server) = open(&world, &listener).await;
    world.policies(&DENY_8081.replace(
        "namespace: shop}",
        "namespace: shop, annotations: {istio.io/dry-run: 'true'}}",
    ));
    let trials = |world: &World, count: f64| {
        let policy = "policy=\"AuthorizationPolicy shop/deny-8081\"";
        world.count("ambit_policy_dry_run_denials_total", &[policy]) == count
    };
    world
        .until("what is open is counted", |world| trials(world, 1.0))
        .await;
    exchange(&mut client, &mut server).await;
    let _another = open(&world, &listener).await;
    world
        .until("what is new is counted", |world| trials(world, 2.0))
        .await;
    assert_eq!(world.count("ambit_policy_denials_total", &[]), 0.0);
    world.end().await;
}

#[tokio::test]
async fn a_pod_that_is_no_longer_known_takes_nothing_new_and_is_left_to_enrolment() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8081");
    let (mut client, mut server) = open(&world, &listener).await;
    let manifests = manifests();
    let documents = manifests.split("---\n");
    let without_b: Vec<_> = documents.filter(|one| !one.contains("uid-b")).collect();
    world.publish(&without_b.join("---\n"), DENY_8081);
    let member = "spiffe://cluster.local/ns/shop/sa/a";
    let answer = LocalSet::new()
        .run_until(world.ask(member, "10.77.0.2:8081"))
        .await;
    assert!(answer.is_err());
    exchange(&mut client, &mut server).await;
    world.end().await;
}

#[tokio::test]
async fn an_alias_of_the_trust_domain_is_of_this_mesh_and_another_trust_domain_is_not() {
    let world = World::new(Options {
        trust_domain_aliases: vec!["old.example".parse().unwrap()],
        ..Options::default()
    })
    .await;
    let _listener = world.listen("b", "10.77.0.2:8080");
    let asking = async {
        let old = "spiffe://old.example/ns/shop/sa/a";
        assert!(world.ask(old, "10.77.0.2:8080").await.is_ok());
        let foreign = "spiffe://elsewhere.example/ns/shop/sa/a";
        let answer = world.ask(foreign, "10.77.0.2:8080").await;
        assert_eq!(answer.err(), Some(Reason::ConnectRejected(401)));
    };
    LocalSet::new().run_until(asking).await;
    world.end().await;
}

#[tokio::test]
async fn policies_that_change_all_the_time_never_let_a_denied_connection_through() {
    let world = World::new(Options::default()).await;
    let (allowed, denied) = (
        world.listen("b", "10.77.0.2:8080"),
        world.listen("b", "10.77.0.2:8081"),
    );
    let (mut client, mut server) = open(&world, &allowed).await;
    for round in 0..100 {
        // Under one name or the other, 8081 is denied by every version.
        let other = DENY_8081.replace("deny-8081", "also-deny-8081");
        world.policies(if round % 2 == 0 { DENY_8081 } else { &other });
        refused(&world, "a", "10.77.0.2:8081").await;
        exchange(&mut client, &mut server).await;
    }
    let reached = tokio::time::timeout(Duration::from_millis(50), denied.accept()).await;
    assert!(reached.is_err(), "the application was reached");
    world.end().await;
}
