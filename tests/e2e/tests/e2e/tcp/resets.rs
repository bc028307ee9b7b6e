//! Resets: who sees them, as what, and what arrives before them.

use ambit_e2e::tcp::Connection;

#[test]
fn a_reset_by_the_client_while_it_sends_resets_the_server() {
    Connection {
        client: &["send 4M", "reset"],
        client_sees: &["sent 4194304", "reset"],
        server: &["drain some"],
        server_sees: &["received some, intact", "rst"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_reset_by_the_client_while_it_receives_resets_the_server() {
    Connection {
        client: &["recv 3M", "reset"],
        client_sees: &["received 3145728 intact", "reset"],
        server: &["send_until_broken"],
        server_sees: &["send: rst"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_reset_by_the_server_while_it_sends_resets_the_client() {
    Connection {
        client: &["drain some"],
        client_sees: &["received some, intact", "rst"],
        server: &["await connected", "send 4M", "reset"],
        server_sees: &["sent 4194304", "reset"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_reset_by_the_server_while_it_receives_resets_the_client() {
    Connection {
        client: &["send_until_broken"],
        client_sees: &["send: rst"],
        server: &["recv 3M", "reset"],
        server_sees: &["received 3145728 intact", "reset"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_reset_of_an_idle_connection_by_the_client_reaches_the_server() {
    Connection {
        client: &["send 10", "recv 10", "quiet 1", "reset"],
        client_sees: &["sent 10", "received 10 intact", "quiet", "reset"],
        server: &["recv 10", "send 10", "drain"],
        server_sees: &["received 10 intact", "sent 10", "rst"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_reset_of_an_idle_connection_by_the_server_reaches_the_client() {
    Connection {
        client: &["send 10", "recv 10", "drain"],
        client_sees: &["sent 10", "received 10 intact", "rst"],
        server: &["recv 10", "send 10", "quiet 1", "reset"],
        server_sees: &["received 10 intact", "sent 10", "quiet", "reset"],
    }
    .is_the_same_on_every_path();
}

/// To one who has seen the other's FIN, a reset is a broken pipe.
#[test]
fn a_reset_after_the_clients_fin_is_a_broken_pipe_to_the_server() {
    Connection {
        client: &["send 10", "shut", "recv 3M", "reset"],
        client_sees: &["sent 10", "shut", "received 3145728 intact", "reset"],
        server: &["drain", "send_until_broken"],
        server_sees: &["received 10 intact", "fin", "send: broken pipe"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_reset_after_the_servers_fin_is_a_broken_pipe_to_the_client() {
    Connection {
        client: &["drain", "send_until_broken"],
        client_sees: &["received 10 intact", "fin", "send: broken pipe"],
        server: &["send 10", "shut", "recv 3M", "reset"],
        server_sees: &["sent 10", "shut", "received 3145728 intact", "reset"],
    }
    .is_the_same_on_every_path();
}

/// A client that closes, rather than resets, while data is on its way resets all the same.
#[test]
fn a_close_under_incoming_data_resets_the_sender() {
    Connection {
        client: &["send 10", "shut", "recv 3M", "close"],
        client_sees: &["sent 10", "shut", "received 3145728 intact", "closed"],
        server: &["drain", "send_until_broken"],
        server_sees: &["received 10 intact", "fin", "send: broken pipe"],
    }
    .is_the_same_on_every_path();
}

/// As a server does that refuses an upload: it answers and closes without reading the rest.
#[test]
fn an_answer_arrives_before_the_reset_of_a_close_with_unread_data() {
    Connection {
        client: &["send 60k", "await closed", "drain"],
        client_sees: &["sent 61440", "received 500 intact", "rst"],
        server: &["recv 1k", "send 500", "close"],
        server_sees: &["received 1024 intact", "sent 500", "closed"],
    }
    .is_the_same_on_every_path();
}

/// The same while the client is still in the middle of its upload and gets no byte further.
#[test]
fn an_answer_arrives_before_the_reset_of_a_blocked_upload() {
    Connection {
        client: &["fill", "await closed", "drain"],
        client_sees: &["blocked", "received 500 intact", "rst"],
        server: &["await blocked", "send 500", "close"],
        server_sees: &["sent 500", "closed"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn an_answer_arrives_before_the_reset_that_follows_it_at_once() {
    Connection {
        client: &["send 10", "await reset", "drain"],
        client_sees: &["sent 10", "received 500 intact", "rst"],
        server: &["recv 10", "send 500", "reset"],
        server_sees: &["received 10 intact", "sent 500", "reset"],
    }
    .is_the_same_on_every_path();
}

#[test]
fn a_request_arrives_before_the_reset_that_follows_it_at_once() {
    Connection {
        client: &["send 500", "reset"],
        client_sees: &["sent 500", "reset"],
        server: &["await reset", "drain"],
        server_sees: &["received 500 intact", "rst"],
    }
    .is_the_same_on_every_path();
}
