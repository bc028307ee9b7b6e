//! What every engine must do, written against the public interface of `hbone`.
//!
//! A scenario is a function that is generic over an [`Engine`](engine::Engine). To apply the scenarios to a second
//! engine, implement the trait for it and add another module of `conformance!` blocks.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails"
)]
#![allow(
    unreachable_pub,
    missing_docs,
    reason = "a test has no public interface"
)]

mod bad_input;
mod certs;
mod deadlines;
mod engine;
mod fixture;
mod isolation;
mod keepalive;
mod lifetime;
mod peer_verification;
mod pool;
mod raw_peer;
mod stream;
mod tcp_semantics;

/// One test per scenario, for one subject: an engine, or a path between two applications.
macro_rules! conformance {
    ($subject:ty: $module:ident { $($name:ident),* $(,)? }) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    crate::fixture::run(crate::$module::$name::<$subject>());
                }
            )*
        }
    };
}

macro_rules! tcp_semantics {
    ($path:ty) => {
        conformance! { $path: tcp_semantics {
            bytes_are_relayed_and_counted_in_both_directions,
            bulk_data_is_unchanged_in_both_directions_at_once,
            server_can_send_first,
            downstream_fin_is_relayed_and_upstream_can_still_send,
            upstream_fin_is_relayed_and_downstream_can_still_send,
            downstream_reset_resets_upstream,
            upstream_reset_resets_downstream,
            bytes_sent_before_a_reset_are_delivered,
            response_of_a_server_that_closes_with_unread_bytes_is_delivered,
            reset_is_detected_while_the_reader_stalls,
            downstream_reset_after_fin_is_detected,
            upstream_reset_after_fin_is_detected,
            stalled_reader_blocks_its_writer_and_loses_no_bytes,
            stop_resets_both_sides_and_reports_its_reason,
            dropped_relay_resets_both_sides,
            prefix_is_sent_first_and_not_counted,
        } }
    };
}

mod plain {
    tcp_semantics! { crate::fixture::PlainTcp }
}

mod h2 {
    tcp_semantics! { crate::fixture::Fixture<crate::engine::H2> }

    conformance! { crate::engine::H2: peer_verification {
        both_ends_report_the_peer_identity,
        unexpected_server_identity_is_rejected_before_http2,
        empty_expected_list_rejects_every_server,
        server_of_another_root_is_rejected,
        client_of_another_root_is_rejected_and_both_ends_report_why,
        expired_certificate_is_rejected,
        client_without_certificate_is_rejected,
        client_with_two_spiffe_ids_is_rejected,
        server_with_two_spiffe_ids_is_rejected,
        peer_without_alpn_h2_is_rejected,
        tls_1_2_is_rejected,
        key_exchange_is_hybrid_and_no_session_tickets_are_sent,
        certificate_of_another_source_than_the_pool_key_is_rejected,
        revoked_peer_is_rejected_and_both_ends_report_why,
        revocation_of_the_server_closes_its_open_tunnel,
        revocation_of_the_client_closes_its_open_tunnel,
    } }

    conformance! { crate::engine::H2: deadlines {
        refused_tcp_connect_fails_at_once,
        unanswered_tcp_connect_fails_at_its_deadline,
        silent_server_fails_at_the_tls_deadline,
        server_without_settings_fails_at_the_h2_deadline,
        unanswered_request_fails_at_its_deadline,
        silent_client_fails_at_the_tls_deadline,
        client_without_preface_fails_at_the_h2_deadline,
    } }

    conformance! { crate::engine::H2: bad_input {
        plain_http_and_garbage_are_rejected_with_a_reason,
        garbage_after_tls_is_rejected_with_a_reason,
        malformed_connect_is_rejected_and_reported,
        oversized_headers_are_rejected_without_effect_on_other_streams,
        tunnel_that_is_not_accepted_is_closed_without_streams,
    } }

    conformance! { crate::engine::H2: isolation {
        streams_over_the_limit_do_not_affect_other_tunnels,
        rapid_resets_do_not_affect_other_tunnels,
        streams_over_the_task_limit_are_refused_and_reported,
        slow_upstream_reader_does_not_affect_other_streams,
        slow_downstream_reader_does_not_affect_other_streams,
        slow_decision_does_not_affect_other_streams,
        stalled_readers_do_not_use_the_window_of_another_stream,
        streams_reset_under_load_do_not_affect_other_streams,
        streams_reset_right_after_open_do_not_affect_other_streams,
    } }

    conformance! { crate::engine::H2: pool {
        concurrent_opens_share_one_dial,
        concurrent_opens_share_the_failure_of_a_dial,
        dial_continues_when_its_first_caller_is_dropped,
        stream_limit_of_the_peer_is_respected,
        open_fails_at_once_when_all_tunnels_are_full,
        workloads_at_one_address_do_not_share_a_tunnel,
        busy_tunnel_causes_a_preconnect,
    } }

    conformance! { crate::engine::H2: lifetime {
        retired_destination_gets_a_new_tunnel_and_open_streams_continue,
        drained_server_sends_goaway_and_open_streams_continue,
        tunnel_over_its_max_age_is_retired_and_open_streams_continue,
        server_sends_goaway_at_max_age_and_open_streams_continue,
        idle_tunnel_is_closed_and_a_silent_stream_keeps_its_tunnel,
        stream_opened_before_the_idle_timeout_keeps_the_tunnel,
        broken_tunnel_resets_its_applications,
        aborted_server_resets_its_applications,
        closing_pool_waits_for_open_streams_and_rejects_new_ones,
        closing_pool_resets_streams_at_its_deadline,
    } }

    conformance! { crate::engine::H2: keepalive {
        unresponsive_peer_fails_the_tunnel,
        tunnel_to_a_vanished_peer_is_retired_before_the_ping_timeout,
        slow_response_does_not_retire_the_tunnel,
        pings_do_not_block_bulk_transfer_in_both_directions,
    } }

    conformance! { crate::engine::H2: stream {
        rejection_reports_its_status_and_resets_the_application,
        optimistic_relay_sends_before_the_response,
        client_reset_cancels_the_decision,
        into_io_relays_bytes_in_both_directions,
    } }
}
