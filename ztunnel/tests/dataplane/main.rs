//! The data plane between real network namespaces with the real redirect rules: what an application
//! sees.
// A step that fails ends the test with what it expected.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod policy;
mod world;

use std::io::ErrorKind;
use std::time::Duration;

use hbone::Reason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use world::{Options, World, address, manifests, uid, within};
use ztunnel::dataplane::{Direction, Removal};

/// Connects, lets the server greet first, and sends one message each way.
async fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    let mut heard = [0; 5];
    server.write_all(b"hello").await.unwrap();
    within(client.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"hello");
    client.write_all(b"world").await.unwrap();
    within(server.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"world");
}

async fn connected(world: &World, to: &str, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let client = world.connect("a", to).await.unwrap();
    let (server, _) = within(listener.accept()).await.unwrap();
    (client, server)
}

async fn reset(stream: &mut TcpStream) {
    let mut byte = [0; 1];
    let error = within(stream.read(&mut byte))
        .await
        .expect_err("a reset, not an end of stream");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Connects from a pod to what will be refused. The reset can be there before the connect is looked
/// at, or come a little later.
async fn refused(world: &World, pod: &str, to: &str) {
    match world.connect(pod, to).await {
        Ok(mut client) => reset(&mut client).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

#[tokio::test]
async fn pods_talk_through_the_mesh_and_the_server_sees_the_clients_address() {
    let world = World::new(Options::default()).await;
    for (listen, to, from) in [
        ("10.77.0.2:8080", "10.77.0.2:8080", "10.77.0.1"),
        ("[fd77::2]:8080", "[fd77::2]:8080", "fd77::1"),
    ] {
        let listener = world.listen("b", listen);
        let mut client = world.connect("a", to).await.unwrap();
        let (mut server, peer) = within(listener.accept()).await.unwrap();
        assert_eq!(peer.ip().to_string(), from);
        exchange(&mut client, &mut server).await;
        let open = world.data_plane.connections(&uid("a"));
        assert_eq!(open.len(), 1);
        assert!(
            open[0].hbone && open[0].direction == Direction::Outbound,
            "{open:?}"
        );
        assert_eq!(open[0].original_destination.to_string(), to);
        let open = world.data_plane.connections(&uid("b"));
        assert!(
            open.len() == 1 && open[0].hbone && open[0].direction == Direction::Inbound,
            "{open:?}"
        );
        drop((client, server));
        world
            .until("the connections end", |world| {
                world.data_plane.connections(&uid("a")).is_empty()
                    && world.data_plane.connections(&uid("b")).is_empty()
            })
            .await;
    }
    for (reporter, direction) in [("source", "outbound"), ("destination", "inbound")] {
        let labels = [
            &*format!("reporter=\"{reporter}\""),
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/a\"",
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/b\"",
            "connection_security_policy=\"mutual_tls\"",
            "response_flags=\"-\"",
        ];
        assert_eq!(
            world.count("istio_tcp_connections_opened_total", &labels),
            2.0,
            "{direction}"
        );
        assert_eq!(
            world.count("istio_tcp_connections_closed_total", &labels),
            2.0,
            "{direction}"
        );
        assert_eq!(
            world.count("istio_tcp_received_bytes_total", &labels),
            10.0,
            "{direction}"
        );
        assert_eq!(
            world.count("istio_tcp_sent_bytes_total", &labels),
            10.0,
            "{direction}"
        );
        assert_eq!(
            world.count("istio_tcp_connections_failed_total", &[]),
            0.0,
            "{direction}"
        );
    }
    world.end().await;
}

#[tokio::test]
async fn a_pod_outside_the_mesh_is_reached_and_reaches_in_clear() {
    let world = World::new(Options::default()).await;
    let outside = world.listen("c", "10.77.0.3:8080");
    let (mut client, mut server) = connected(&world, "10.77.0.3:8080", &outside).await;
    assert_eq!(server.peer_addr().unwrap().ip(), address("a"));
    exchange(&mut client, &mut server).await;

    let inside = world.listen("b", "10.77.0.2:8080");
    let mut client = world.connect("c", "10.77.0.2:8080").await.unwrap();
    let (mut server, peer) = within(inside.accept()).await.unwrap();
    assert_eq!(peer.ip(), address("c"));
    exchange(&mut client, &mut server).await;
    assert_eq!(
        world.count(
            "istio_tcp_connections_opened_total",
            &[
                "reporter=\"destination\"",
                "source_principal=\"unknown\"",
                "connection_security_policy=\"unknown\""
            ]
        ),
        1.0
    );
    world.end().await;
}

#[tokio::test]
async fn an_application_that_is_down_is_a_reset_with_its_reason_on_both_sides() {
    let world = World::new(Options::default()).await;
    refused(&world, "a", "10.77.0.2:8080").await;
    world
        .until("both sides say why", |world| {
            world.count(
                "ambit_connection_failures_total",
                &["inbound", "connect_refused"],
            ) == 1.0
                && world.count(
                    "ambit_connection_failures_total",
                    &["outbound", "connect_rejected"],
                ) == 1.0
        })
        .await;
    world.end().await;
}

#[tokio::test]
async fn a_service_goes_on_with_the_endpoint_that_answers() {
    let world = World::new(Options::default()).await;
    // Of the endpoints a, b and c only b listens; c refuses in clear, a refuses through the mesh.
    let listener = world.listen("b", "10.77.0.2:8080");
    for _ in 0..8 {
        let (mut client, mut server) = connected(&world, "10.96.0.1:80", &listener).await;
        exchange(&mut client, &mut server).await;
    }
    world.end().await;
}

#[tokio::test]
async fn a_meshed_pod_whose_tunnel_port_is_closed_is_never_reached_in_clear() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let _ = world
        .data_plane
        .remove(&uid("b"), Removal::OptOut)
        .await
        .unwrap();
    // A child that another test forked a moment ago has the listener until it becomes its program:
    // the port is closed only then, and until then the handshake fails.
    within(async {
        while world.count(
            "ambit_connection_failures_total",
            &["outbound", "hbone_port_unreachable"],
        ) == 0.0
        {
            refused(&world, "a", "10.77.0.2:8080").await;
        }
    })
    .await;
    assert!(
        tokio::time::timeout(Duration::from_millis(50), listener.accept())
            .await
            .is_err()
    );
    world.end().await;
}

#[tokio::test]
async fn the_data_planes_own_ports_cannot_be_reached_through_it() {
    let world = World::new(Options::default()).await;
    for port in [15001, 15006] {
        refused(&world, "a", &format!("10.77.0.2:{port}")).await;
        refused(&world, "c", &format!("10.77.0.2:{port}")).await;
    }
    world
        .until("each is refused as a call to the mesh itself", |world| {
            world.count("ambit_connection_failures_total", &["inbound", "self_call"]) == 4.0
        })
        .await;
    world.end().await;
}

#[tokio::test]
async fn a_call_to_the_data_plane_itself_by_an_address_that_nobody_knows_ends_at_once() {
    let world = World::new(Options::default()).await;
    world.add_address("a", "10.77.9.9").await;
    world.add_address("a", "fd77:9::9").await;
    for port in [15001, 15006] {
        refused(&world, "a", &format!("10.77.9.9:{port}")).await;
        refused(&world, "a", &format!("[fd77:9::9]:{port}")).await;
    }
    world
        .until("each is refused once", |world| {
            let refused = |direction| {
                world.count("ambit_connection_failures_total", &[direction, "self_call"])
            };
            refused("outbound") == 2.0 && refused("inbound") == 2.0
        })
        .await;
    let all = world.count("istio_tcp_connections_opened_total", &[]);
    assert_eq!(all, 4.0, "it has called itself");
    world.end().await;
}

#[tokio::test]
async fn handshakes_that_nobody_finishes_take_the_place_of_no_peer() {
    const FLOOD: usize = 60;
    let world = World::new(Options {
        connections_per_pod: 10,
        unproven_per_pod: 8,
        ..Options::default()
    })
    .await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let mut half_open = Vec::new();
    for _ in 0..FLOOD {
        half_open.push(world.connect("c", "10.77.0.2:15008").await.unwrap());
    }
    let reason = ["inbound", "pod_handshake_limit"];
    world
        .until("all but the youngest are pushed out", |world| {
            let pushed_out = world.count("ambit_connection_failures_total", &reason);
            pushed_out >= (FLOOD - 8) as f64
        })
        .await;
    let (mut client, mut server) = connected(&world, "10.77.0.2:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    for _ in 0..FLOOD {
        half_open.push(world.connect("c", "10.77.0.2:15008").await.unwrap());
    }
    world
        .until("the next are pushed out too", |world| {
            let pushed_out = world.count("ambit_connection_failures_total", &reason);
            pushed_out >= (2 * FLOOD - 9) as f64
        })
        .await;
    exchange(&mut client, &mut server).await;
    let limit = ["inbound", "pod_connection_limit"];
    assert_eq!(world.count("ambit_connection_failures_total", &limit), 0.0);
    world.end().await;
}

#[tokio::test]
async fn a_peer_reaches_this_pod_and_nothing_else_through_its_tunnel() {
    let world = World::new(Options::default()).await;
    let _listener = world.listen("b", "10.77.0.2:8080");
    let member = "spiffe://cluster.local/ns/shop/sa/a";
    let asking = async {
        for authority in ["10.77.0.2:8080", "both.shop.svc.cluster.local:80"] {
            let answer = world.ask(member, authority).await.unwrap();
            let baggage = answer.baggage.unwrap();
            assert_eq!(baggage.namespace.as_deref(), Some("shop"), "{authority}");
            assert_eq!(baggage.workload_name.as_deref(), Some("b"), "{authority}");
        }
        for authority in [
            "10.77.0.1:8080",
            "10.77.0.3:8080",
            "127.0.0.1:8080",
            "[::1]:8080",
            "[fd77::2]:8080",
            "169.254.169.254:80",
            "10.77.0.2:15001",
            "10.77.0.2:15006",
            "10.77.0.2:15008",
            "both.shop.svc.cluster.local:81",
            "other.shop.svc.cluster.local:80",
            "localhost:8080",
        ] {
            let answer = world.ask(member, authority).await;
            assert_eq!(
                answer.err(),
                Some(Reason::ConnectRejected(400)),
                "{authority}"
            );
        }
        let answer = world.ask(member, "10.77.0.2:8081").await;
        assert_eq!(answer.err(), Some(Reason::ConnectRejected(503)));
    };
    LocalSet::new().run_until(asking).await;
    world.end().await;
}

#[tokio::test]
async fn an_identity_of_another_trust_domain_is_refused_though_its_root_is_trusted() {
    let world = World::new(Options::default()).await;
    let _listener = world.listen("b", "10.77.0.2:8080");
    let foreign = "spiffe://elsewhere.example/ns/shop/sa/a";
    let answer = LocalSet::new()
        .run_until(world.ask(foreign, "10.77.0.2:8080"))
        .await;
    assert_eq!(answer.err(), Some(Reason::ConnectRejected(401)));
    let labels = ["inbound", "peer_trust_domain"];
    assert_eq!(world.count("ambit_connection_failures_total", &labels), 1.0);
    assert_eq!(
        world.count(
            "istio_tcp_connections_failed_total",
            &["response_flags=\"DENY\""]
        ),
        1.0
    );
    world.end().await;
}

#[tokio::test]
async fn a_pod_that_opts_out_keeps_its_connections_and_one_that_is_gone_does_not() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let (mut client, mut server) = connected(&world, "10.77.0.2:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    let leaving = world
        .data_plane
        .remove(&uid("a"), Removal::OptOut)
        .await
        .unwrap();
    exchange(&mut client, &mut server).await;
    let mut ended = std::pin::pin!(leaving.ended());
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut ended)
            .await
            .is_err(),
        "one connection is open"
    );
    let gone = world
        .data_plane
        .remove(&uid("a"), Removal::Gone)
        .await
        .unwrap();
    reset(&mut client).await;
    within(ended).await;
    within(gone.ended()).await;
    reset(&mut server).await;
    assert!(world.data_plane.connections(&uid("a")).is_empty());
    world.end().await;
}

#[tokio::test]
async fn the_wait_for_a_leaving_pod_ends_with_its_last_connection() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let (mut client, mut server) = connected(&world, "10.77.0.2:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    let client_side = world
        .data_plane
        .remove(&uid("a"), Removal::OptOut)
        .await
        .unwrap();
    let server_side = world
        .data_plane
        .remove(&uid("b"), Removal::OptOut)
        .await
        .unwrap();
    exchange(&mut client, &mut server).await;
    drop((client, server));
    within(client_side.ended()).await;
    within(server_side.ended()).await;
    world.end().await;
}

#[tokio::test]
async fn a_pod_that_has_as_many_connections_as_it_may_is_told_so() {
    let world = World::new(Options {
        connections_per_pod: 2,
        ..Options::default()
    })
    .await;
    let listener = world.listen("c", "10.77.0.3:8080");
    let first = connected(&world, "10.77.0.3:8080", &listener).await;
    let second = connected(&world, "10.77.0.3:8080", &listener).await;
    refused(&world, "a", "10.77.0.3:8080").await;
    assert_eq!(
        world.count(
            "ambit_connection_failures_total",
            &["outbound", "pod_connection_limit"]
        ),
        1.0
    );
    drop(first);
    world
        .until("there is room again", |world| {
            world.data_plane.connections(&uid("a")).len() == 1
        })
        .await;
    let (mut client, mut server) = connected(&world, "10.77.0.3:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    drop(second);
    world.end().await;
}

#[tokio::test]
async fn without_a_certificate_nothing_leaves_and_the_reason_is_cert_pending() {
    let world = World::new(Options {
        certificates: false,
        ..Options::default()
    })
    .await;
    let listener = world.listen("b", "10.77.0.2:8080");
    let mut client = world.connect("a", "10.77.0.2:8080").await.unwrap();
    client.write_all(b"secret").await.unwrap();
    reset(&mut client).await;
    assert_eq!(
        world.count(
            "ambit_connection_failures_total",
            &["outbound", "cert_pending"]
        ),
        1.0
    );
    assert_eq!(
        world.count(
            "istio_tcp_connections_failed_total",
            &["response_flags=\"IDENTITY_ERROR\""]
        ),
        1.0
    );
    assert!(
        tokio::time::timeout(Duration::from_millis(50), listener.accept())
            .await
            .is_err()
    );
    world.end().await;
}

#[tokio::test]
async fn draining_waits_for_what_is_open_and_resets_what_outlasts_the_deadline() {
    let world = World::new(Options::default()).await;
    let listener = world.listen("c", "10.77.0.3:8080");
    let (mut client, mut server) = connected(&world, "10.77.0.3:8080", &listener).await;
    let patient = connected(&world, "10.77.0.3:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    let start = std::time::Instant::now();
    let draining = world.data_plane.drain(Duration::from_millis(400));
    let using = async {
        exchange(&mut client, &mut server).await;
        drop(patient);
    };
    within(async { tokio::join!(draining, using) }).await;
    assert!(start.elapsed() >= Duration::from_millis(400));
    reset(&mut client).await;
    assert!(world.data_plane.ping().await.is_err());
    world.end().await;
}

#[tokio::test]
async fn readiness_is_answered_by_the_data_plane_and_ends_with_it() {
    use ztunnel::admin::readiness::Readiness;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let readiness = Readiness::new();
    let pending = readiness.pending("source folder");
    let world = World::new(Options {
        readiness: Some((listener, readiness)),
        ..Options::default()
    })
    .await;
    let ask = || async move {
        let mut stream = TcpStream::connect(to).await?;
        stream
            .write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        within(stream.read_to_string(&mut text)).await?;
        std::io::Result::Ok(text)
    };
    let text = ask().await.unwrap();
    assert!(
        text.starts_with("HTTP/1.1 500") && text.contains("pending: source folder"),
        "{text}"
    );
    drop(pending);
    assert!(ask().await.unwrap().starts_with("HTTP/1.1 200"));
    world.end().await;
    assert!(ask().await.is_err());
}
