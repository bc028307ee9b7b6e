//! Long connections: half-closed, one-way, idle. Most of the time of this suite is spent here.

use ambit_e2e::tcp::Connection;

#[test]
fn a_client_that_has_finished_is_sent_to_for_a_minute() {
    Connection {
        client: &["send 1000", "shut", "drain"],
        client_sees: &["sent 1000", "shut", "received 31457280 intact", "fin"],
        server: &["drain", "drip 30M 60", "close"],
        server_sees: &["received 1000 intact", "fin", "sent 31457280", "closed"],
    }
    .is_the_same_on_every_path();
}

/// Longer than conntrack keeps a half-closed connection by default (60 s in state CLOSE_WAIT): were
/// its entry lost, so would be the redirection, and with it what comes after the silence.
#[test]
fn a_half_closed_connection_survives_more_than_a_minute_of_silence() {
    let by_the_client = Connection {
        client: &["send 1000", "shut", "quiet 65", "drain"],
        client_sees: &[
            "sent 1000",
            "shut",
            "quiet",
            "received 102400 intact",
            "fin",
        ],
        server: &["drain", "await quiet", "send 100k", "close"],
        server_sees: &["received 1000 intact", "fin", "sent 102400", "closed"],
    };
    let by_the_server = Connection {
        client: &["drain", "await quiet", "send 100k", "close"],
        client_sees: &["received 1000 intact", "fin", "sent 102400", "closed"],
        server: &["send 1000", "shut", "quiet 65", "drain"],
        server_sees: &[
            "sent 1000",
            "shut",
            "quiet",
            "received 102400 intact",
            "fin",
        ],
    };
    std::thread::scope(|scope| {
        scope.spawn(|| by_the_client.is_the_same_on_every_path());
        by_the_server.is_the_same_on_every_path();
    });
}

/// Longer than the daemons' ping interval and ping deadline together.
#[test]
fn an_idle_connection_stays_open() {
    Connection {
        client: &[
            "send 10", "recv 10", "quiet 35", "send 10", "recv 10", "shut", "drain",
        ],
        client_sees: &[
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
        server_sees: &[
            "received 10 intact",
            "sent 10",
            "quiet",
            "received 10 intact",
            "sent 10",
            "fin",
            "closed",
        ],
    }
    .is_the_same_on_every_path();
}
