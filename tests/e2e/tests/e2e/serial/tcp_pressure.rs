//! Bulk transfers, back-pressure, and resets of blocked connections.

use ambit_e2e::tcp::{Path, Scenario};

/// How many bytes may be in flight to an end that does not read. Across both daemons there are three sending sockets (up
/// to 4 MiB each), three receiving sockets (up to 6 MiB each), and the daemons' own buffers.
const MAX_BYTES_IN_FLIGHT: f64 = 40.0 * 1024.0 * 1024.0;

#[test]
fn client_blocks_when_the_server_does_not_read() {
    let runs = Scenario {
        client: &["overfill 64M", "shut", "drain"],
        client_events: &["blocked", "sent 67108864", "shut", "fin"],
        server: &["await blocked", "drain", "close"],
        server_events: &["received 67108864 intact", "fin", "closed"],
    }
    .assert_on_every_path();
    for (path, transcripts) in runs {
        let in_flight = transcripts.client.number("blocked after").unwrap();
        println!("{path:?}: blocked after {in_flight} bytes");
        assert!(
            in_flight < MAX_BYTES_IN_FLIGHT,
            "{path:?}: {in_flight} bytes in flight"
        );
    }
}

#[test]
fn server_blocks_when_the_client_does_not_read() {
    let runs = Scenario {
        client: &["await blocked", "drain", "close"],
        client_events: &["received 67108864 intact", "fin", "closed"],
        server: &["overfill 64M", "shut", "drain"],
        server_events: &["blocked", "sent 67108864", "shut", "fin"],
    }
    .assert_on_every_path();
    for (path, transcripts) in runs {
        let in_flight = transcripts.server.number("blocked after").unwrap();
        println!("{path:?}: blocked after {in_flight} bytes");
        assert!(
            in_flight < MAX_BYTES_IN_FLIGHT,
            "{path:?}: {in_flight} bytes in flight"
        );
    }
}

#[test]
fn reset_by_a_blocked_client_reaches_the_server() {
    Scenario {
        client: &["fill", "reset"],
        client_events: &["blocked", "reset"],
        server: &["await reset", "drain some"],
        server_events: &["received some, intact", "rst"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_by_the_client_reaches_a_blocked_server() {
    Scenario {
        client: &["await blocked", "reset"],
        client_events: &["reset"],
        server: &["fill", "send_until_broken"],
        server_events: &["blocked", "send: rst"],
    }
    .assert_on_every_path();
}

#[test]
fn gibibyte_in_each_direction_arrives_intact() {
    let runs = Scenario {
        client: &["send 1G", "shut", "drain"],
        client_events: &[
            "sent 1073741824",
            "shut",
            "received 1073741824 intact",
            "fin",
        ],
        server: &["drain", "send 1G", "close"],
        server_events: &[
            "received 1073741824 intact",
            "fin",
            "sent 1073741824",
            "closed",
        ],
    }
    .assert_on(&[Path::Direct, Path::Meshed]);
    for (path, transcripts) in runs {
        let rate = |seconds: Option<f64>| 8.0 * 1.073_741_824 / seconds.unwrap();
        let uplink = rate(transcripts.server.number("received 1073741824 in"));
        let downlink = rate(transcripts.client.number("received 1073741824 in"));
        println!("{path:?}: {uplink:.2} Gb/s to the server, {downlink:.2} Gb/s to the client");
    }
}

#[test]
fn data_in_both_directions_at_once_arrives_intact() {
    Scenario {
        client: &["exchange 64M", "shut", "drain"],
        client_events: &["exchanged 67108864 intact", "shut", "fin"],
        server: &["exchange 64M", "drain", "close"],
        server_events: &["exchanged 67108864 intact", "fin", "closed"],
    }
    .assert_on_every_path();
}

#[test]
fn single_byte_packets_arrive_intact() {
    Scenario {
        client: &["send_bytewise 20k", "shut", "drain"],
        client_events: &["sent 20480", "shut", "received 20480 intact", "fin"],
        server: &["recv 20k", "send_bytewise 20k", "drain", "close"],
        server_events: &["received 20480 intact", "sent 20480", "fin", "closed"],
    }
    .assert_on_every_path();
}
