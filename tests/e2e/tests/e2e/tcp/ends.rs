//! FIN, half-close, who speaks first, and a port where nobody listens.

use std::net::SocketAddr;

use ambit_e2e::tcp::{Connection, Path, Transcript, lab, peer, refs};
use ambit_e2e::{access_log, metrics};

#[test]
fn a_fin_follows_the_last_byte() {
    Connection {
        client: &["send 100k", "shut", "drain"],
        client_sees: &["sent 102400", "shut", "received 51200 intact", "fin"],
        server: &["drain", "send 50k", "close"],
        server_sees: &["received 102400 intact", "fin", "sent 51200", "closed"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_fin_of_the_server_comes_while_the_client_is_still_open() {
    Connection {
        client: &["send 10", "drain", "send 20", "close"],
        client_sees: &[
            "sent 10",
            "received 102400 intact",
            "fin",
            "sent 20",
            "closed",
        ],
        server: &["recv 10", "send 100k", "shut", "drain"],
        server_sees: &[
            "received 10 intact",
            "sent 102400",
            "shut",
            "received 20 intact",
            "fin",
        ],
    }
    .is_the_same_on_every_path();
}

#[test]
fn both_sides_may_close_at_once() {
    Connection {
        client: &["send 30k", "shut", "drain"],
        client_sees: &["sent 30720", "shut", "received 20480 intact", "fin"],
        server: &["send 20k", "shut", "drain"],
        server_sees: &["sent 20480", "shut", "received 30720 intact", "fin"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_connection_may_be_closed_without_a_byte() {
    Connection {
        client: &["shut", "drain"],
        client_sees: &["shut", "fin"],
        server: &["drain", "close"],
        server_sees: &["fin", "closed"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn the_server_may_speak_first() {
    let runs = Connection {
        client: &["recv 1000", "send 10", "recv 1000", "shut", "drain"],
        client_sees: &[
            "received 1000 intact",
            "sent 10",
            "received 1000 intact",
            "shut",
            "fin",
        ],
        server: &["send 1000", "recv 10", "send 1000", "drain", "close"],
        server_sees: &[
            "sent 1000",
            "received 10 intact",
            "sent 1000",
            "fin",
            "closed",
        ],
    }
    .is_the_same_on_every_path();
    for (path, observed) in runs {
        let waited = observed.client.number("first byte after").unwrap();
        // Nothing waits for the client to speak, such as a detection of its protocol, which takes 5 s or more.
        assert!(waited < 5.0, "{path:?}: the greeting came after {waited} s");
    }
}

#[test]
fn after_the_servers_fin_the_client_sends_on() {
    Connection {
        client: &["drain", "send 20M", "close"],
        client_sees: &["received 1000 intact", "fin", "sent 20971520", "closed"],
        server: &["send 1000", "shut", "drain"],
        server_sees: &["sent 1000", "shut", "received 20971520 intact", "fin"],
    }
    .is_the_same_on_every_path();
}

/// The one difference: the daemon that takes the connection cannot know yet that nobody listens, so
/// what is refused directly is accepted and then reset, as in every mesh of this kind. Log and metric
/// of the daemon that found the port closed say so.
#[test]
fn a_closed_port_resets_what_it_cannot_refuse() {
    const CLOSED_PORT: u16 = 4;
    let lab = lab();
    let connect = |path: Path| {
        let (address, port) = (
            path.address(lab).unwrap().to_string(),
            CLOSED_PORT.to_string(),
        );
        let words = peer(&["-", "connect-port", &address, &port, "drain"]);
        let output = lab
            .exec(path.client(), &refs(&words))
            .unwrap()
            .ok()
            .unwrap();
        Transcript::of(&output).events
    };
    assert_eq!(connect(Path::Direct), ["refused"]);
    for (path, node) in [
        (Path::Meshed, "b"),
        (Path::MeshedV6, "b"),
        (Path::Leaving, "a"),
        (Path::Entering, "b"),
    ] {
        assert_eq!(connect(path), ["connected", "rst"], "{path:?}");
        let target = SocketAddr::new(path.address(lab).unwrap(), CLOSED_PORT).to_string();
        let found = access_log::lines(lab, node).unwrap();
        let hbone = matches!(path, Path::Meshed | Path::MeshedV6);
        let field = if hbone { "dst.hbone_addr" } else { "dst.addr" };
        access_log::wait(
            lab,
            node,
            &[(field, &target), ("reason", "connect_refused")],
        )
        .unwrap_or_else(|error| panic!("{path:?}: {error:#}; {} lines", found.len()));
    }
    let failed = [("response_flags", "CONNECT"), ("reporter", "destination")];
    metrics::wait(lab, "b", "istio_tcp_connections_failed_total", &failed, 3.0).unwrap();
}
