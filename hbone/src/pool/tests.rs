use super::choose_tunnel::{Choice, TunnelView, choose};
use super::*;

const IDLE: TunnelView = TunnelView {
    is_usable: true,
    is_retired: false,
    streams: 0,
    max_streams: 100,
    is_busy: false,
};

fn with_streams(streams: usize) -> TunnelView {
    TunnelView { streams, ..IDLE }
}

fn use_tunnel(index: usize, preconnect: bool) -> Choice {
    Choice::Use { index, preconnect }
}

#[test]
fn first_stream_dials() {
    assert_eq!(choose(&[], &PoolConfig::default()), Choice::Dial);
}

#[test]
fn least_loaded_tunnel_is_chosen() {
    let tunnels = [with_streams(3), with_streams(1), with_streams(2)];
    assert_eq!(
        choose(&tunnels, &PoolConfig::default()),
        use_tunnel(1, false)
    );
}

#[test]
fn busy_tunnel_is_chosen_last_and_causes_a_preconnect() {
    let busy = TunnelView {
        is_busy: true,
        ..with_streams(1)
    };
    let config = PoolConfig::default();
    assert_eq!(
        choose(&[busy, with_streams(3)], &config),
        use_tunnel(1, false)
    );
    assert_eq!(choose(&[busy], &config), use_tunnel(0, true));
}

#[test]
fn many_streams_on_every_tunnel_cause_preconnects_up_to_the_limit() {
    let config = PoolConfig::default();
    let loaded = with_streams(config.preconnect_streams);
    assert_eq!(choose(&[loaded], &config), use_tunnel(0, true));
    let all = vec![loaded; config.max_preconnect_tunnels_per_peer];
    assert_eq!(choose(&all, &config), use_tunnel(0, false));
}

#[test]
fn full_and_unusable_tunnels_are_not_chosen_and_their_number_is_bounded() {
    let full = TunnelView {
        max_streams: 1,
        ..with_streams(1)
    };
    let retired = TunnelView {
        is_usable: false,
        is_retired: true,
        ..IDLE
    };
    let of_another_identity = TunnelView {
        is_usable: false,
        ..IDLE
    };
    let config = PoolConfig {
        max_tunnels_per_peer: 2,
        max_retired_tunnels_per_peer: 2,
        ..PoolConfig::default()
    };
    assert_eq!(choose(&[full, retired], &config), Choice::Dial);
    assert_eq!(choose(&[full, retired, full], &config), Choice::Full);
    assert_eq!(choose(&[retired, retired], &config), Choice::Full);
    assert_eq!(
        choose(&[of_another_identity, of_another_identity], &config),
        Choice::Dial
    );
}
