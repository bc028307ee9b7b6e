//! What every engine must do, written against the interface of `hbone` alone.
//!
//! A scenario is a function generic over an [`Engine`](engine::Engine). To hold a second engine to the same rules,
//! implement the trait for it and name it in one more `conformance!` block.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails says so by panic"
)]
#![allow(unreachable_pub, missing_docs, reason = "a test is nobody's library")]

mod engine;
mod heart;
mod limits;
mod pool;
mod raw;
mod tcp;
mod trust;
mod world;

/// One test per scenario, for one subject: an engine, or a way between two applications.
macro_rules! conformance {
    ($subject:ty: $module:ident { $($name:ident),* $(,)? }) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    crate::world::run(crate::$module::$name::<$subject>());
                }
            )*
        }
    };
}

macro_rules! tcp_semantics {
    ($way:ty) => {
        conformance! { $way: tcp {
            bytes_arrive_in_order_and_are_counted_in_both_directions,
            much_data_arrives_unchanged_in_both_directions_at_once,
            the_server_may_speak_first,
            a_fin_passes_and_the_other_direction_stays_open,
            a_fin_of_the_upstream_passes_and_the_downstream_may_go_on,
            a_reset_of_the_downstream_reaches_the_upstream,
            a_reset_of_the_upstream_reaches_the_downstream,
            what_was_sent_before_a_reset_arrives_before_it,
            a_server_may_answer_and_close_without_reading_everything,
            a_reset_is_noticed_while_nobody_takes_the_bytes,
            a_reset_is_noticed_after_a_fin,
            a_reset_of_the_upstream_is_noticed_after_its_fin,
            a_reader_that_stalls_stops_its_writer_and_loses_nothing,
            a_stop_resets_both_sides_and_gives_its_reason,
            a_relay_that_is_dropped_resets_both_sides,
            the_prefix_goes_first_and_is_not_counted,
        } }
    };
}

mod plain {
    tcp_semantics! { crate::world::Plain }
}

mod h2 {
    tcp_semantics! { crate::world::World<crate::engine::H2> }

    conformance! { crate::engine::H2: trust {
        both_sides_learn_the_identity_of_the_other,
        a_peer_with_another_identity_is_refused_before_http,
        nobody_is_expected_so_nobody_is_accepted,
        a_server_of_another_root_is_refused,
        a_client_of_another_root_is_refused_and_both_know_why,
        an_expired_certificate_is_refused,
        a_client_without_a_certificate_is_refused,
        a_client_with_two_identities_is_refused,
        a_server_with_two_identities_is_refused,
        a_peer_without_alpn_is_refused,
        tls_1_2_is_refused,
        the_key_exchange_is_hybrid_and_no_tickets_are_sent,
        a_certificate_that_is_not_the_pool_keys_is_refused,
        a_revoked_peer_is_refused_and_both_know_why,
        a_revocation_ends_the_open_tunnel_of_a_server,
        a_revocation_ends_the_open_tunnel_of_a_client,
    } }

    conformance! { crate::engine::H2: limits {
        a_refused_connect_says_so_at_once,
        a_connect_without_answer_ends_at_its_deadline,
        a_silent_server_ends_at_the_tls_deadline,
        a_server_without_settings_ends_at_the_h2_deadline,
        a_connect_that_is_never_answered_ends_at_its_deadline,
        a_silent_client_ends_at_the_tls_deadline,
        a_client_without_preface_ends_at_the_h2_deadline,
        plain_http_and_garbage_are_refused_with_a_reason,
        garbage_after_tls_is_refused_with_a_reason,
        a_request_that_is_no_connect_is_refused_and_reported,
        huge_headers_are_refused_and_harm_nobody,
        thousands_of_streams_are_bounded_and_harm_nobody,
        thousands_of_resets_harm_no_other_tunnel,
        streams_beyond_what_earlier_ones_hold_are_refused_and_told_of,
        a_tunnel_that_is_not_admitted_is_closed_and_carries_nothing,
        a_slow_upstream_reader_harms_nobody,
        a_slow_downstream_reader_harms_nobody,
        a_slow_decision_harms_nobody,
        stalled_readers_on_all_but_one_stream_leave_it_its_window,
        streams_reset_under_load_harm_nobody,
        applications_that_open_and_reset_at_once_harm_nobody,
    } }

    conformance! { crate::engine::H2: heart {
        pings_do_not_disturb_bulk_in_both_directions,
        a_tunnel_whose_peer_has_vanished_is_left_before_it_is_dead,
        a_peer_that_is_slow_to_answer_keeps_its_tunnel,
        a_stream_that_comes_at_the_last_moment_keeps_its_tunnel,
    } }

    conformance! { crate::engine::H2: pool {
        those_who_wait_share_one_dial,
        those_who_wait_share_its_failure,
        a_dial_goes_on_when_the_first_who_waited_has_gone,
        the_peers_stream_limit_is_respected,
        a_full_peer_is_an_error_and_not_a_wait,
        another_workload_at_the_same_address_gets_another_tunnel,
        a_busy_tunnel_gets_company,
        a_purged_tunnel_is_not_chosen_and_its_streams_live_on,
        a_drained_server_says_goaway_and_its_streams_live_on,
        a_tunnel_that_is_old_takes_no_new_streams_and_keeps_its_own,
        a_server_asks_for_a_new_tunnel_when_one_is_old,
        an_idle_tunnel_is_closed_and_one_with_a_silent_stream_is_not,
        a_peer_that_no_longer_answers_is_noticed,
        a_tunnel_that_breaks_resets_its_applications,
        an_aborted_server_resets_its_applications,
        a_closed_pool_waits_for_its_streams_and_takes_no_more,
        a_closed_pool_resets_what_outlives_its_deadline,
        a_rejection_carries_its_status_and_resets_the_application,
        optimistic_bytes_are_on_their_way_before_the_answer,
        a_peer_that_gives_up_cancels_the_decision,
        a_stream_is_a_byte_stream_for_other_protocols,
    } }
}
