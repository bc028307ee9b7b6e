//! Pings: what they must notice, and what they must not disturb.

use std::rc::Rc;
use std::time::Duration;

use hbone::{PoolConfig, Reason, RelayOutcome, ServeConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::engine::Engine;
use crate::pool::Silence;
use crate::tcp::ask;
use crate::world::{Way, World, until};

/// Streams of one tunnel, whose windows exceed by far what two kernels hold of it.
const STREAMS: usize = 8;

/// Each way on each stream.
const MUCH: usize = 24 * 1024 * 1024;

/// A peer that must write a ping, or the answer to one, reads nothing before it has; and it cannot write while the other
/// end does not read. So two ends that ping while both directions are full may wait for each other for ever.
pub async fn pings_do_not_disturb_bulk_in_both_directions<E: Engine>() {
    let config = PoolConfig {
        eager_tunnels_per_peer: 1,
        ping_interval: Duration::from_millis(5),
        ping_timeout: Duration::from_secs(5),
        ..PoolConfig::default()
    };
    let serve = ServeConfig {
        ping_interval: config.ping_interval,
        ping_timeout: config.ping_timeout,
        ..ServeConfig::default()
    };
    let world = World::<E>::with(config, serve)
        .await
        .with_small_tunnel_buffers();
    let mut sides = JoinSet::new();
    let mut relays = Vec::new();
    for _ in 0..STREAMS {
        let c = world.connect().await;
        sides.spawn_local(exchange(c.downstream));
        sides.spawn_local(exchange(c.upstream));
        relays.push(c.relay);
    }
    for relay in relays {
        let end = relay.await.unwrap();
        assert!(matches!(end.outcome, RelayOutcome::Closed), "{end:?}");
    }
    sides.join_all().await;
    assert_eq!(world.accepted.get(), 1, "all used one tunnel");
}

/// Sends much and receives as much.
async fn exchange(socket: TcpStream) {
    let (mut read, mut write) = socket.into_split();
    let send = async {
        let piece = vec![7; 256 * 1024];
        for _ in 0..MUCH / piece.len() {
            write.write_all(&piece).await?;
        }
        write.shutdown().await
    };
    let receive = async {
        let (mut piece, mut got) = (vec![0; 256 * 1024], 0);
        loop {
            match read.read(&mut piece).await? {
                0 => return Ok::<_, std::io::Error>(got),
                n => got += n,
            }
        }
    };
    let (sent, got) = tokio::join!(send, receive);
    sent.unwrap();
    assert_eq!(got.unwrap(), MUCH);
}

const PATIENCE: Duration = Duration::from_millis(100);

/// Long before its pings would tell: an application that waits for one that is gone waits for nothing.
pub async fn a_tunnel_whose_peer_has_vanished_is_left_before_it_is_dead<E: Engine>() {
    let mut world = World::<E>::new().await;
    let silent = Silence::before(&mut world).await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    silent.begin();
    let mut stream = world.open().await.unwrap();
    let error = E::response_within(&mut stream, PATIENCE).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
    assert!(error.reason().is_retryable_before_send());
    until(|| E::tunnels(&world.pool) == 0).await;
    assert!(!c.relay.is_finished(), "who is connected may still wait");
}

pub async fn a_peer_that_is_slow_to_answer_keeps_its_tunnel<E: Engine>() {
    let world = World::<E>::new().await;
    let mut c = world.connect().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let mut stream = world.open().await.unwrap();
    let error = E::response_within(&mut stream, PATIENCE).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
    // Longer than it has to prove that it lives.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(E::tunnels(&world.pool), 1);
    ask(&mut c, b"x").await;
}

pub async fn a_stream_that_comes_at_the_last_moment_keeps_its_tunnel<E: Engine>() {
    const IDLE: Duration = Duration::from_millis(400);
    let config = PoolConfig {
        idle_timeout: IDLE,
        ..PoolConfig::default()
    };
    let world = World::<E>::with(config, ServeConfig::default()).await;
    let c = world.connect().await;
    drop((c.downstream, c.upstream));
    c.relay.await.unwrap();
    tokio::time::sleep(IDLE / 4).await;
    let mut late = world.connect().await;
    tokio::time::sleep(IDLE).await;
    assert_eq!(E::tunnels(&world.pool), 1);
    ask(&mut late, b"x").await;
}
