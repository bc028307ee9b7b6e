//! Long connections: half-closed, one-way, idle, stopped. Most of the time of this suite is spent here.

use ambit_e2e::tcp::Connection;

/// Makes all of them at the same time.
fn together(connections: &[Connection<'_>]) {
    std::thread::scope(|scope| {
        for connection in connections {
            scope.spawn(|| connection.is_the_same_on_every_path());
        }
    });
}

#[test]
fn an_end_that_has_finished_is_sent_to_for_a_minute() {
    let the_client = Connection {
        client: &["send 1000", "shut", "drain"],
        client_sees: &["sent 1000", "shut", "received 31457280 intact", "fin"],
        server: &["drain", "drip 30M 60", "close"],
        server_sees: &["received 1000 intact", "fin", "sent 31457280", "closed"],
    };
    let the_server = Connection {
        client: &["drain", "drip 30M 60", "close"],
        client_sees: &["received 1000 intact", "fin", "sent 31457280", "closed"],
        server: &["send 1000", "shut", "drain"],
        server_sees: &["sent 1000", "shut", "received 31457280 intact", "fin"],
    };
    together(&[the_client, the_server]);
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
    together(&[by_the_client, by_the_server]);
}

/// No byte moves for longer than the daemons' ping interval and ping deadline together: because nobody has
/// anything to say, or because one end's window is closed. When it opens again, all that was sent arrives.
#[test]
fn a_connection_that_is_idle_or_whose_reader_has_stopped_stays_open_and_loses_nothing() {
    let the_server_stops = Connection {
        client: &["overfill 64M", "shut", "drain"],
        client_sees: &["blocked", "sent 67108864", "shut", "fin"],
        server: &["await blocked", "stop 35", "drain", "close"],
        server_sees: &["received 67108864 intact", "fin", "closed"],
    };
    let the_client_stops = Connection {
        client: &["await blocked", "stop 35", "drain", "close"],
        client_sees: &["received 67108864 intact", "fin", "closed"],
        server: &["overfill 64M", "shut", "drain"],
        server_sees: &["blocked", "sent 67108864", "shut", "fin"],
    };
    let idle = Connection {
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
    };
    together(&[the_server_stops, the_client_stops, idle]);
}
