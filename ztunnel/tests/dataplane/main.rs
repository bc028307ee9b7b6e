//! The data plane in real network namespaces with the real redirect rules, observed from the
//! applications.
// A failed step ends the test with the message of its `expect`.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod policy;
mod test_mesh;

use std::io::ErrorKind;
use std::time::Duration;

use hbone::Reason;
use test_mesh::{Options, TestMesh, address, manifests, uid, within_timeout};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use ztunnel::dataplane::{Direction, Removal};

/// Sends one message each way on an open connection; the server sends first.
async fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    let mut received = [0; 5];
    server.write_all(b"hello").await.unwrap();
    within_timeout(client.read_exact(&mut received))
        .await
        .unwrap();
    assert_eq!(&received, b"hello");
    client.write_all(b"world").await.unwrap();
    within_timeout(server.read_exact(&mut received))
        .await
        .unwrap();
    assert_eq!(&received, b"world");
}

/// Connects from pod `a` and accepts the connection.
async fn connect_and_accept(
    mesh: &TestMesh,
    to: &str,
    listener: &TcpListener,
) -> (TcpStream, TcpStream) {
    let client = mesh.connect("a", to).await.unwrap();
    let (server, _) = within_timeout(listener.accept()).await.unwrap();
    (client, server)
}

/// Reads until the connection is reset; fails on an end of stream.
async fn expect_reset(stream: &mut TcpStream) {
    let mut byte = [0; 1];
    let error = within_timeout(stream.read(&mut byte))
        .await
        .expect_err("a reset, not an end of stream");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Connects from a pod to a destination that refuses. The reset can arrive during the connect or
/// after it.
async fn expect_refused(mesh: &TestMesh, pod: &str, to: &str) {
    match mesh.connect(pod, to).await {
        Ok(mut client) => expect_reset(&mut client).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

#[tokio::test]
async fn connections_between_meshed_pods_keep_the_client_address() {
    let mesh = TestMesh::new(Options::default()).await;
    for (listen, to, from) in [
        ("10.77.0.2:8080", "10.77.0.2:8080", "10.77.0.1"),
        ("[fd77::2]:8080", "[fd77::2]:8080", "fd77::1"),
    ] {
        let listener = mesh.listen("b", listen);
        let mut client = mesh.connect("a", to).await.unwrap();
        let (mut server, peer) = within_timeout(listener.accept()).await.unwrap();
        assert_eq!(peer.ip().to_string(), from);
        exchange(&mut client, &mut server).await;
        let open = mesh.data_plane.connections(&uid("a"));
        assert_eq!(open.len(), 1);
        assert!(
            open[0].hbone && open[0].direction == Direction::Outbound,
            "{open:?}"
        );
        assert_eq!(open[0].original_destination.to_string(), to);
        let open = mesh.data_plane.connections(&uid("b"));
        assert!(
            open.len() == 1 && open[0].hbone && open[0].direction == Direction::Inbound,
            "{open:?}"
        );
        drop((client, server));
        mesh.wait_until("both connections to be closed", |mesh| {
            mesh.data_plane.connections(&uid("a")).is_empty()
                && mesh.data_plane.connections(&uid("b")).is_empty()
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
            mesh.metric_sum("istio_tcp_connections_opened_total", &labels),
            2.0,
            "{direction}"
        );
        assert_eq!(
            mesh.metric_sum("istio_tcp_connections_closed_total", &labels),
            2.0,
            "{direction}"
        );
        assert_eq!(
            mesh.metric_sum("istio_tcp_received_bytes_total", &labels),
            10.0,
            "{direction}"
        );
        assert_eq!(
            mesh.metric_sum("istio_tcp_sent_bytes_total", &labels),
            10.0,
            "{direction}"
        );
        assert_eq!(
            mesh.metric_sum("istio_tcp_connections_failed_total", &[]),
            0.0,
            "{direction}"
        );
    }
    mesh.shut_down().await;
}

#[tokio::test]
async fn unmeshed_pod_connects_and_is_reached_in_clear() {
    let mesh = TestMesh::new(Options::default()).await;
    let outside = mesh.listen("c", "10.77.0.3:8080");
    let (mut client, mut server) = connect_and_accept(&mesh, "10.77.0.3:8080", &outside).await;
    assert_eq!(server.peer_addr().unwrap().ip(), address("a"));
    exchange(&mut client, &mut server).await;

    let inside = mesh.listen("b", "10.77.0.2:8080");
    let mut client = mesh.connect("c", "10.77.0.2:8080").await.unwrap();
    let (mut server, peer) = within_timeout(inside.accept()).await.unwrap();
    assert_eq!(peer.ip(), address("c"));
    exchange(&mut client, &mut server).await;
    assert_eq!(
        mesh.metric_sum(
            "istio_tcp_connections_opened_total",
            &[
                "reporter=\"destination\"",
                "source_principal=\"unknown\"",
                "connection_security_policy=\"unknown\""
            ]
        ),
        1.0
    );
    mesh.shut_down().await;
}

#[tokio::test]
async fn closed_application_port_resets_with_a_reason_on_both_sides() {
    let mesh = TestMesh::new(Options::default()).await;
    expect_refused(&mesh, "a", "10.77.0.2:8080").await;
    mesh.wait_until("both sides to count the failure", |mesh| {
        mesh.metric_sum(
            "ambit_connection_failures_total",
            &["inbound", "connect_refused"],
        ) == 1.0
            && mesh.metric_sum(
                "ambit_connection_failures_total",
                &["outbound", "connect_rejected"],
            ) == 1.0
    })
    .await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn service_connection_is_retried_on_another_endpoint() {
    let mesh = TestMesh::new(Options::default()).await;
    // Of the endpoints a, b and c only b listens. c refuses in clear, a refuses through the mesh.
    let listener = mesh.listen("b", "10.77.0.2:8080");
    for _ in 0..8 {
        let (mut client, mut server) = connect_and_accept(&mesh, "10.96.0.1:80", &listener).await;
        exchange(&mut client, &mut server).await;
    }
    mesh.shut_down().await;
}

#[tokio::test]
async fn meshed_pod_with_a_closed_tunnel_port_is_never_reached_in_clear() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let _ = mesh
        .data_plane
        .remove(&uid("b"), Removal::OptOut)
        .await
        .unwrap();
    // A child process forked by another test holds the listener until it calls exec. Until then the
    // port is open and the handshake fails.
    within_timeout(async {
        while mesh.metric_sum(
            "ambit_connection_failures_total",
            &["outbound", "hbone_port_unreachable"],
        ) == 0.0
        {
            expect_refused(&mesh, "a", "10.77.0.2:8080").await;
        }
    })
    .await;
    assert!(
        tokio::time::timeout(Duration::from_millis(50), listener.accept())
            .await
            .is_err()
    );
    mesh.shut_down().await;
}

#[tokio::test]
async fn data_plane_ports_are_not_reachable_through_the_mesh() {
    let mesh = TestMesh::new(Options::default()).await;
    for port in [15001, 15006] {
        expect_refused(&mesh, "a", &format!("10.77.0.2:{port}")).await;
        expect_refused(&mesh, "c", &format!("10.77.0.2:{port}")).await;
    }
    mesh.wait_until("each connection to be refused as a self call", |mesh| {
        mesh.metric_sum("ambit_connection_failures_total", &["inbound", "self_call"]) == 4.0
    })
    .await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn connection_to_a_data_plane_port_by_an_unlisted_address_does_not_loop() {
    let mesh = TestMesh::new(Options::default()).await;
    mesh.add_address("a", "10.77.9.9").await;
    mesh.add_address("a", "fd77:9::9").await;
    for port in [15001, 15006] {
        expect_refused(&mesh, "a", &format!("10.77.9.9:{port}")).await;
        expect_refused(&mesh, "a", &format!("[fd77:9::9]:{port}")).await;
    }
    mesh.wait_until("each connection to be refused once", |mesh| {
        let refused = |direction| {
            mesh.metric_sum("ambit_connection_failures_total", &[direction, "self_call"])
        };
        refused("outbound") == 2.0 && refused("inbound") == 2.0
    })
    .await;
    let all = mesh.metric_sum("istio_tcp_connections_opened_total", &[]);
    assert_eq!(all, 4.0, "the data plane connected to itself");
    mesh.shut_down().await;
}

#[tokio::test]
async fn unfinished_handshakes_do_not_use_up_the_connection_limit() {
    const FLOOD: usize = 60;
    let mesh = TestMesh::new(Options {
        max_connections_per_pod: 10,
        max_handshakes_per_pod: 8,
        ..Options::default()
    })
    .await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let mut half_open = Vec::new();
    for _ in 0..FLOOD {
        half_open.push(mesh.connect("c", "10.77.0.2:15008").await.unwrap());
    }
    let reason = ["inbound", "pod_handshake_limit"];
    mesh.wait_until("all but the newest handshakes to be evicted", |mesh| {
        let evicted = mesh.metric_sum("ambit_connection_failures_total", &reason);
        evicted >= (FLOOD - 8) as f64
    })
    .await;
    let (mut client, mut server) = connect_and_accept(&mesh, "10.77.0.2:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    for _ in 0..FLOOD {
        half_open.push(mesh.connect("c", "10.77.0.2:15008").await.unwrap());
    }
    mesh.wait_until("the next handshakes to be evicted too", |mesh| {
        let evicted = mesh.metric_sum("ambit_connection_failures_total", &reason);
        evicted >= (2 * FLOOD - 9) as f64
    })
    .await;
    exchange(&mut client, &mut server).await;
    let limit = ["inbound", "pod_connection_limit"];
    assert_eq!(
        mesh.metric_sum("ambit_connection_failures_total", &limit),
        0.0
    );
    mesh.shut_down().await;
}

#[tokio::test]
async fn tunnel_reaches_only_the_pod_that_it_was_opened_to() {
    let mesh = TestMesh::new(Options::default()).await;
    let _listener = mesh.listen("b", "10.77.0.2:8080");
    let member = "spiffe://cluster.local/ns/shop/sa/a";
    let requests = async {
        for authority in ["10.77.0.2:8080", "both.shop.svc.cluster.local:80"] {
            let response = mesh.send_connect(member, authority).await.unwrap();
            let baggage = response.baggage.unwrap();
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
            let response = mesh.send_connect(member, authority).await;
            assert_eq!(
                response.err(),
                Some(Reason::ConnectRejected(400)),
                "{authority}"
            );
        }
        let response = mesh.send_connect(member, "10.77.0.2:8081").await;
        assert_eq!(response.err(), Some(Reason::ConnectRejected(503)));
    };
    LocalSet::new().run_until(requests).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn identity_of_another_trust_domain_is_refused_under_a_trusted_root() {
    let mesh = TestMesh::new(Options::default()).await;
    let _listener = mesh.listen("b", "10.77.0.2:8080");
    let foreign = "spiffe://elsewhere.example/ns/shop/sa/a";
    let response = LocalSet::new()
        .run_until(mesh.send_connect(foreign, "10.77.0.2:8080"))
        .await;
    assert_eq!(response.err(), Some(Reason::ConnectRejected(401)));
    let labels = ["inbound", "peer_trust_domain"];
    assert_eq!(
        mesh.metric_sum("ambit_connection_failures_total", &labels),
        1.0
    );
    assert_eq!(
        mesh.metric_sum(
            "istio_tcp_connections_failed_total",
            &["response_flags=\"DENY\""]
        ),
        1.0
    );
    mesh.shut_down().await;
}

#[tokio::test]
async fn established_connections_survive_opt_out_and_end_with_the_pod() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let (mut client, mut server) = connect_and_accept(&mesh, "10.77.0.2:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    let draining = mesh
        .data_plane
        .remove(&uid("a"), Removal::OptOut)
        .await
        .unwrap();
    exchange(&mut client, &mut server).await;
    let mut ended = std::pin::pin!(draining.finished());
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut ended)
            .await
            .is_err(),
        "a connection is still open"
    );
    let deleted = mesh
        .data_plane
        .remove(&uid("a"), Removal::Gone)
        .await
        .unwrap();
    expect_reset(&mut client).await;
    within_timeout(ended).await;
    within_timeout(deleted.finished()).await;
    expect_reset(&mut server).await;
    assert!(mesh.data_plane.connections(&uid("a")).is_empty());
    mesh.shut_down().await;
}

#[tokio::test]
async fn drain_of_a_pod_finishes_with_its_last_connection() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let (mut client, mut server) = connect_and_accept(&mesh, "10.77.0.2:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    let client_side = mesh
        .data_plane
        .remove(&uid("a"), Removal::OptOut)
        .await
        .unwrap();
    let server_side = mesh
        .data_plane
        .remove(&uid("b"), Removal::OptOut)
        .await
        .unwrap();
    exchange(&mut client, &mut server).await;
    drop((client, server));
    within_timeout(client_side.finished()).await;
    within_timeout(server_side.finished()).await;
    mesh.shut_down().await;
}

#[tokio::test]
async fn connection_limit_of_a_pod_refuses_with_its_reason() {
    let mesh = TestMesh::new(Options {
        max_connections_per_pod: 2,
        ..Options::default()
    })
    .await;
    let listener = mesh.listen("c", "10.77.0.3:8080");
    let first = connect_and_accept(&mesh, "10.77.0.3:8080", &listener).await;
    let second = connect_and_accept(&mesh, "10.77.0.3:8080", &listener).await;
    expect_refused(&mesh, "a", "10.77.0.3:8080").await;
    assert_eq!(
        mesh.metric_sum(
            "ambit_connection_failures_total",
            &["outbound", "pod_connection_limit"]
        ),
        1.0
    );
    drop(first);
    mesh.wait_until("one connection to be closed", |mesh| {
        mesh.data_plane.connections(&uid("a")).len() == 1
    })
    .await;
    let (mut client, mut server) = connect_and_accept(&mesh, "10.77.0.3:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    drop(second);
    mesh.shut_down().await;
}

#[tokio::test]
async fn without_a_certificate_nothing_is_sent_and_the_reason_is_cert_pending() {
    let mesh = TestMesh::new(Options {
        certificates: false,
        ..Options::default()
    })
    .await;
    let listener = mesh.listen("b", "10.77.0.2:8080");
    let mut client = mesh.connect("a", "10.77.0.2:8080").await.unwrap();
    client.write_all(b"secret").await.unwrap();
    expect_reset(&mut client).await;
    assert_eq!(
        mesh.metric_sum(
            "ambit_connection_failures_total",
            &["outbound", "cert_pending"]
        ),
        1.0
    );
    assert_eq!(
        mesh.metric_sum(
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
    mesh.shut_down().await;
}

#[tokio::test]
async fn drain_waits_for_open_connections_and_resets_them_at_the_deadline() {
    let mesh = TestMesh::new(Options::default()).await;
    let listener = mesh.listen("c", "10.77.0.3:8080");
    let (mut client, mut server) = connect_and_accept(&mesh, "10.77.0.3:8080", &listener).await;
    let closed_in_time = connect_and_accept(&mesh, "10.77.0.3:8080", &listener).await;
    exchange(&mut client, &mut server).await;
    let start = std::time::Instant::now();
    let draining = mesh.data_plane.drain(Duration::from_millis(400));
    let using = async {
        exchange(&mut client, &mut server).await;
        drop(closed_in_time);
    };
    within_timeout(async { tokio::join!(draining, using) }).await;
    assert!(start.elapsed() >= Duration::from_millis(400));
    expect_reset(&mut client).await;
    assert!(mesh.data_plane.ping().await.is_err());
    mesh.shut_down().await;
}

#[tokio::test]
async fn readiness_port_is_served_by_the_data_plane_until_it_ends() {
    use ztunnel::readiness::Readiness;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let readiness = Readiness::new();
    let pending = readiness.register_task("source folder");
    let mesh = TestMesh::new(Options {
        readiness: Some((listener, readiness)),
        ..Options::default()
    })
    .await;
    let request = || async move {
        let mut stream = TcpStream::connect(to).await?;
        stream
            .write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        within_timeout(stream.read_to_string(&mut text)).await?;
        std::io::Result::Ok(text)
    };
    let text = request().await.unwrap();
    assert!(
        text.starts_with("HTTP/1.1 500") && text.contains("pending: source folder"),
        "{text}"
    );
    drop(pending);
    assert!(request().await.unwrap().starts_with("HTTP/1.1 200"));
    mesh.shut_down().await;
    assert!(request().await.is_err());
}
