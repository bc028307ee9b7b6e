//! Bulk, back-pressure, and a reset against it.

use ambit_e2e::tcp::{Connection, Path};

/// More than this in flight between two ends of which one does not read is a buffer without bound: over both
/// daemons there are three sockets that send (4 MiB at most) and three that receive (6 MiB), and what the daemons hold.
const MOST_IN_FLIGHT: f64 = 40.0 * 1024.0 * 1024.0;

#[test]
fn a_client_is_blocked_by_a_server_that_does_not_read() {
    let runs = Connection {
        client: &["overfill 64M", "shut", "drain"],
        client_sees: &["blocked", "sent 67108864", "shut", "fin"],
        server: &["await blocked", "drain", "close"],
        server_sees: &["received 67108864 intact", "fin", "closed"],
    }
    .is_the_same_on_every_path();
    for (path, observed) in runs {
        let in_flight = observed.client.number("blocked after").unwrap();
        println!("{path:?}: blocked after {in_flight} bytes");
        assert!(
            in_flight < MOST_IN_FLIGHT,
            "{path:?}: {in_flight} bytes in flight"
        );
    }
}

#[test]
fn a_server_is_blocked_by_a_client_that_does_not_read() {
    let runs = Connection {
        client: &["await blocked", "drain", "close"],
        client_sees: &["received 67108864 intact", "fin", "closed"],
        server: &["overfill 64M", "shut", "drain"],
        server_sees: &["blocked", "sent 67108864", "shut", "fin"],
    }
    .is_the_same_on_every_path();
    for (path, observed) in runs {
        let in_flight = observed.server.number("blocked after").unwrap();
        println!("{path:?}: blocked after {in_flight} bytes");
        assert!(
            in_flight < MOST_IN_FLIGHT,
            "{path:?}: {in_flight} bytes in flight"
        );
    }
}

#[test]
fn a_blocked_client_can_reset() {
    Connection {
        client: &["fill", "reset"],
        client_sees: &["blocked", "reset"],
        server: &["await reset", "drain some"],
        server_sees: &["received some, intact", "rst"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_blocked_server_can_be_reset_by_its_client() {
    Connection {
        client: &["await blocked", "reset"],
        client_sees: &["reset"],
        server: &["fill", "send_until_broken"],
        server_sees: &["blocked", "send: rst"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_gibibyte_each_way_arrives_intact() {
    let runs = Connection {
        client: &["send 1G", "shut", "drain"],
        client_sees: &[
            "sent 1073741824",
            "shut",
            "received 1073741824 intact",
            "fin",
        ],
        server: &["drain", "send 1G", "close"],
        server_sees: &[
            "received 1073741824 intact",
            "fin",
            "sent 1073741824",
            "closed",
        ],
    }
    .is_the_same_on(&[Path::Direct, Path::Meshed]);
    for (path, observed) in runs {
        let rate = |seconds: Option<f64>| 8.0 * 1.073_741_824 / seconds.unwrap();
        let there = rate(observed.server.number("received 1073741824 in"));
        let back = rate(observed.client.number("received 1073741824 in"));
        println!("{path:?}: {there:.2} Gb/s there, {back:.2} Gb/s back");
    }
}

#[test]
fn bytes_pass_both_ways_at_once() {
    Connection {
        client: &["both 64M", "shut", "drain"],
        client_sees: &["exchanged 67108864 intact", "shut", "fin"],
        server: &["both 64M", "drain", "close"],
        server_sees: &["exchanged 67108864 intact", "fin", "closed"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn single_bytes_pass_as_they_come() {
    Connection {
        client: &["dribble 20k", "shut", "drain"],
        client_sees: &["sent 20480", "shut", "received 20480 intact", "fin"],
        server: &["recv 20k", "dribble 20k", "drain", "close"],
        server_sees: &["received 20480 intact", "sent 20480", "fin", "closed"],
    }
    .is_the_same_on_every_path();
}
