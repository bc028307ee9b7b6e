use super::peers::{Decision, View, decide};
use super::*;

const IDLE: View = View {
    usable: true,
    retired: false,
    streams: 0,
    limit: 100,
    busy: false,
};

fn with(streams: usize) -> View {
    View { streams, ..IDLE }
}

#[test]
fn the_first_stream_waits_for_a_dial() {
    assert_eq!(decide(&[], &PoolConfig::default()), Decision::Dial);
}

#[test]
fn the_least_loaded_tunnel_is_chosen() {
    let decision = decide(&[with(3), with(1), with(2)], &PoolConfig::default());
    assert_eq!(
        decision,
        Decision::Use {
            index: 1,
            another: false
        }
    );
}

#[test]
fn a_tunnel_that_moves_many_bytes_is_the_last_choice_and_asks_for_another() {
    let busy = View {
        busy: true,
        ..with(1)
    };
    let config = PoolConfig::default();
    assert_eq!(
        decide(&[busy, with(3)], &config),
        Decision::Use {
            index: 1,
            another: false
        }
    );
    assert_eq!(
        decide(&[busy], &config),
        Decision::Use {
            index: 0,
            another: true
        }
    );
}

#[test]
fn many_streams_on_every_tunnel_ask_for_another_up_to_a_limit() {
    let config = PoolConfig::default();
    let loaded = with(config.busy_streams);
    assert_eq!(
        decide(&[loaded], &config),
        Decision::Use {
            index: 0,
            another: true
        }
    );
    let all = vec![loaded; config.eager_tunnels_per_peer];
    assert_eq!(
        decide(&all, &config),
        Decision::Use {
            index: 0,
            another: false
        }
    );
}

#[test]
fn full_or_unusable_tunnels_are_never_chosen_and_their_number_is_bounded() {
    let full = View {
        limit: 1,
        ..with(1)
    };
    let retired = View {
        usable: false,
        retired: true,
        ..IDLE
    };
    let of_another_identity = View {
        usable: false,
        ..IDLE
    };
    let config = PoolConfig {
        tunnels_per_peer: 2,
        retired_per_peer: 2,
        ..PoolConfig::default()
    };
    assert_eq!(decide(&[full, retired], &config), Decision::Dial);
    assert_eq!(decide(&[full, retired, full], &config), Decision::Full);
    assert_eq!(decide(&[retired, retired], &config), Decision::Full);
    assert_eq!(
        decide(&[of_another_identity, of_another_identity], &config),
        Decision::Dial
    );
}
