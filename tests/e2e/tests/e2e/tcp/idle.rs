//! Connections that are half-closed, idle or stopped for more than half a minute. These tests take the longest.

use ambit_e2e::tcp::Scenario;

/// Runs scenarios concurrently, each on every path.
fn run_concurrently(scenarios: &[Scenario<'_>]) {
    std::thread::scope(|scope| {
        for scenario in scenarios {
            scope.spawn(|| scenario.assert_on_every_path());
        }
    });
}

/// The silence is longer than conntrack's timeout of a half-closed connection in a new pod of the lab (20 s in state
/// CLOSE_WAIT), which the daemon raises. If the entry expired, the redirection and the data after the silence would be
/// lost.
#[test]
fn half_closed_connection_survives_the_conntrack_timeout() {
    let client_closes = Scenario {
        client: &["send 1000", "shut", "quiet 35", "drain"],
        client_events: &[
            "sent 1000",
            "shut",
            "quiet",
            "received 102400 intact",
            "fin",
        ],
        server: &["drain", "await quiet", "send 100k", "close"],
        server_events: &["received 1000 intact", "fin", "sent 102400", "closed"],
    };
    let server_closes = Scenario {
        client: &["drain", "await quiet", "send 100k", "close"],
        client_events: &["received 1000 intact", "fin", "sent 102400", "closed"],
        server: &["send 1000", "shut", "quiet 35", "drain"],
        server_events: &[
            "sent 1000",
            "shut",
            "quiet",
            "received 102400 intact",
            "fin",
        ],
    };
    run_concurrently(&[client_closes, server_closes]);
}

/// No byte is transferred for longer than the daemons' ping interval and ping timeout together, because the connection
/// is idle or because one end's window is closed. Once the window opens, everything arrives.
#[test]
fn idle_connections_and_stopped_readers_survive_the_ping_timeout() {
    let server_stops = Scenario {
        client: &["overfill 64M", "shut", "drain"],
        client_events: &["blocked", "sent 67108864", "shut", "fin"],
        server: &["await blocked", "pause 35", "drain", "close"],
        server_events: &["received 67108864 intact", "fin", "closed"],
    };
    let client_stops = Scenario {
        client: &["await blocked", "pause 35", "drain", "close"],
        client_events: &["received 67108864 intact", "fin", "closed"],
        server: &["overfill 64M", "shut", "drain"],
        server_events: &["blocked", "sent 67108864", "shut", "fin"],
    };
    let idle = Scenario {
        client: &[
            "send 10", "recv 10", "quiet 35", "send 10", "recv 10", "shut", "drain",
        ],
        client_events: &[
            "sent 10",
            "received 10 intact",
            "quiet",
            "sent 10",
            "received 10 intact",
            "shut",
            "fin",
        ],
        server: &[
            "recv 10",
            "send 10",
            "keepalive 1",
            "quiet 33",
            "recv 10",
            "send 10",
            "drain",
            "close",
        ],
        server_events: &[
            "received 10 intact",
            "sent 10",
            "quiet",
            "received 10 intact",
            "sent 10",
            "fin",
            "closed",
        ],
    };
    run_concurrently(&[server_stops, client_stops, idle]);
}
