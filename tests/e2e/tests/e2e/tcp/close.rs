//! FIN, half-close, protocols in which the server sends first, and a closed port.

use std::net::SocketAddr;

use ambit_e2e::tcp::{Path, Scenario, Transcript, as_strs, peer_command, shared_lab};
use ambit_e2e::{access_log, metrics};

#[test]
fn fin_arrives_after_the_last_byte() {
    Scenario {
        client: &["send 100k", "shut", "drain"],
        client_events: &["sent 102400", "shut", "received 51200 intact", "fin"],
        server: &["drain", "send 50k", "close"],
        server_events: &["received 102400 intact", "fin", "sent 51200", "closed"],
    }
    .assert_on_every_path();
}

#[test]
fn server_fin_arrives_while_the_client_can_still_send() {
    Scenario {
        client: &["send 10", "drain", "send 20", "close"],
        client_events: &[
            "sent 10",
            "received 102400 intact",
            "fin",
            "sent 20",
            "closed",
        ],
        server: &["recv 10", "send 100k", "shut", "drain"],
        server_events: &[
            "received 10 intact",
            "sent 102400",
            "shut",
            "received 20 intact",
            "fin",
        ],
    }
    .assert_on_every_path();
}

#[test]
fn both_ends_close_at_the_same_time() {
    Scenario {
        client: &["send 30k", "shut", "drain"],
        client_events: &["sent 30720", "shut", "received 20480 intact", "fin"],
        server: &["send 20k", "shut", "drain"],
        server_events: &["sent 20480", "shut", "received 30720 intact", "fin"],
    }
    .assert_on_every_path();
}

#[test]
fn connection_without_data_closes_with_fin() {
    Scenario {
        client: &["shut", "drain"],
        client_events: &["shut", "fin"],
        server: &["drain", "close"],
        server_events: &["fin", "closed"],
    }
    .assert_on_every_path();
}

#[test]
fn server_that_sends_first_is_not_delayed() {
    let runs = Scenario {
        client: &["recv 1000", "send 10", "recv 1000", "shut", "drain"],
        client_events: &[
            "received 1000 intact",
            "sent 10",
            "received 1000 intact",
            "shut",
            "fin",
        ],
        server: &["send 1000", "recv 10", "send 1000", "drain", "close"],
        server_events: &[
            "sent 1000",
            "received 10 intact",
            "sent 1000",
            "fin",
            "closed",
        ],
    }
    .assert_on_every_path();
    for (path, transcripts) in runs {
        let seconds = transcripts.client.number("first byte after").unwrap();
        // Protocol detection, which waits for the client's first bytes, would take 5 s or more.
        assert!(seconds < 5.0, "{path:?}: the first byte took {seconds} s");
    }
}

#[test]
fn client_sends_after_the_servers_fin() {
    Scenario {
        client: &["drain", "send 20M", "close"],
        client_events: &["received 1000 intact", "fin", "sent 20971520", "closed"],
        server: &["send 1000", "shut", "drain"],
        server_events: &["sent 1000", "shut", "received 20971520 intact", "fin"],
    }
    .assert_on_every_path();
}

/// The one difference to plain TCP: the daemon accepts the connection before it knows that the port is closed, so the
/// client sees a reset instead of a refusal, as with Istio. The daemon that finds the port closed logs and counts it.
#[test]
fn connection_to_a_closed_port_is_accepted_and_reset() {
    const CLOSED_PORT: u16 = 4;
    let lab = shared_lab();
    let connect = |path: Path| {
        let (address, port) = (
            path.address(lab).unwrap().to_string(),
            CLOSED_PORT.to_string(),
        );
        let words = peer_command(&["-", "connect-port", &address, &port, "drain"]);
        let output = lab
            .exec(path.client(), &as_strs(&words))
            .unwrap()
            .ok()
            .unwrap();
        Transcript::parse(&output).events
    };
    assert_eq!(connect(Path::Direct), ["refused"]);
    for (path, node) in [
        (Path::Meshed, "b"),
        (Path::MeshedV6, "b"),
        (Path::MeshToPlain, "a"),
        (Path::PlainToMesh, "b"),
    ] {
        assert_eq!(connect(path), ["connected", "rst"], "{path:?}");
        let target = SocketAddr::new(path.address(lab).unwrap(), CLOSED_PORT).to_string();
        let lines = access_log::lines(lab, node).unwrap();
        let hbone = matches!(path, Path::Meshed | Path::MeshedV6);
        let field = if hbone { "dst.hbone_addr" } else { "dst.addr" };
        access_log::wait(
            lab,
            node,
            &[(field, &target), ("reason", "connect_refused")],
        )
        .unwrap_or_else(|error| panic!("{path:?}: {error:#}; {} lines", lines.len()));
    }
    let failed = [("response_flags", "CONNECT"), ("reporter", "destination")];
    metrics::wait(lab, "b", "istio_tcp_connections_failed_total", &failed, 3.0).unwrap();
}
