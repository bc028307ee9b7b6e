//! Resets: how each end observes them, and which data arrives before them.

use ambit_e2e::tcp::Scenario;

#[test]
fn reset_by_a_sending_client_resets_the_server() {
    Scenario {
        client: &["send 4M", "reset"],
        client_events: &["sent 4194304", "reset"],
        server: &["drain some"],
        server_events: &["received some, intact", "rst"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_by_a_receiving_client_resets_the_server() {
    Scenario {
        client: &["recv 3M", "reset"],
        client_events: &["received 3145728 intact", "reset"],
        server: &["send_until_broken"],
        server_events: &["send: rst"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_by_a_sending_server_resets_the_client() {
    Scenario {
        client: &["drain some"],
        client_events: &["received some, intact", "rst"],
        server: &["await connected", "send 4M", "reset"],
        server_events: &["sent 4194304", "reset"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_by_a_receiving_server_resets_the_client() {
    Scenario {
        client: &["send_until_broken"],
        client_events: &["send: rst"],
        server: &["recv 3M", "reset"],
        server_events: &["received 3145728 intact", "reset"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_of_an_idle_connection_by_the_client_reaches_the_server() {
    Scenario {
        client: &["send 10", "recv 10", "quiet 1", "reset"],
        client_events: &["sent 10", "received 10 intact", "quiet", "reset"],
        server: &["recv 10", "send 10", "drain"],
        server_events: &["received 10 intact", "sent 10", "rst"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_of_an_idle_connection_by_the_server_reaches_the_client() {
    Scenario {
        client: &["send 10", "recv 10", "drain"],
        client_events: &["sent 10", "received 10 intact", "rst"],
        server: &["recv 10", "send 10", "quiet 1", "reset"],
        server_events: &["received 10 intact", "sent 10", "quiet", "reset"],
    }
    .assert_on_every_path();
}

/// An end that has received FIN observes a reset as EPIPE.
#[test]
fn reset_after_the_clients_fin_is_epipe_at_the_server() {
    Scenario {
        client: &["send 10", "shut", "recv 3M", "reset"],
        client_events: &["sent 10", "shut", "received 3145728 intact", "reset"],
        server: &["drain", "send_until_broken"],
        server_events: &["received 10 intact", "fin", "send: broken pipe"],
    }
    .assert_on_every_path();
}

#[test]
fn reset_after_the_servers_fin_is_epipe_at_the_client() {
    Scenario {
        client: &["drain", "send_until_broken"],
        client_events: &["received 10 intact", "fin", "send: broken pipe"],
        server: &["send 10", "shut", "recv 3M", "reset"],
        server_events: &["sent 10", "shut", "received 3145728 intact", "reset"],
    }
    .assert_on_every_path();
}

/// A close with data in flight sends RST, like an explicit reset.
#[test]
fn close_with_data_in_flight_resets_the_sender() {
    Scenario {
        client: &["send 10", "shut", "recv 3M", "close"],
        client_events: &["sent 10", "shut", "received 3145728 intact", "closed"],
        server: &["drain", "send_until_broken"],
        server_events: &["received 10 intact", "fin", "send: broken pipe"],
    }
    .assert_on_every_path();
}

/// For example, a server that refuses an upload responds and closes without reading the rest.
#[test]
fn response_arrives_before_the_reset_of_a_close_with_unread_data() {
    Scenario {
        client: &["send 60k", "await closed", "drain"],
        client_events: &["sent 61440", "received 500 intact", "rst"],
        server: &["recv 1k", "send 500", "close"],
        server_events: &["received 1024 intact", "sent 500", "closed"],
    }
    .assert_on_every_path();
}

/// The same while the client's upload is blocked.
#[test]
fn response_arrives_before_the_reset_of_a_blocked_upload() {
    Scenario {
        client: &["fill", "await closed", "drain"],
        client_events: &["blocked", "received 500 intact", "rst"],
        server: &["await blocked", "send 500", "close"],
        server_events: &["sent 500", "closed"],
    }
    .assert_on_every_path();
}

#[test]
fn response_arrives_before_an_immediate_reset() {
    Scenario {
        client: &["send 10", "await reset", "drain"],
        client_events: &["sent 10", "received 500 intact", "rst"],
        server: &["recv 10", "send 500", "reset"],
        server_events: &["received 10 intact", "sent 500", "reset"],
    }
    .assert_on_every_path();
}

#[test]
fn request_arrives_before_an_immediate_reset() {
    Scenario {
        client: &["send 500", "reset"],
        client_events: &["sent 500", "reset"],
        server: &["await reset", "drain"],
        server_events: &["received 500 intact", "rst"],
    }
    .assert_on_every_path();
}
