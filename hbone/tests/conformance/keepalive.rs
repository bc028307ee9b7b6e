//! Which peers pings detect, and that pings do not block bulk transfer.

use std::cell::Cell;
use std::io::ErrorKind;
use std::rc::Rc;
use std::time::Duration;

use hbone::{PoolConfig, Reason, RelayOutcome, ServeConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_local};

use crate::engine::Engine;
use crate::fixture::{Fixture, Path, wait_until};
use crate::tcp_semantics::{assert_receives_reset, assert_relays};

pub async fn unresponsive_peer_fails_the_tunnel<E: Engine>() {
    let config = PoolConfig {
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_secs(2),
        ..PoolConfig::default()
    };
    let mut fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let blackhole = Blackhole::before(&mut fixture).await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    blackhole.discard_all();
    let summary = c.relay.await.unwrap();
    let RelayOutcome::Failed(error) = summary.outcome else {
        panic!("{summary:?}")
    };
    assert_eq!(error.reason(), Reason::PingTimeout);
    assert_eq!(error.peer(), Some(fixture.key.address));
    assert_receives_reset(&mut c.downstream).await;
    assert_eq!(E::usable_tunnels(&fixture.pool), 0);
}

/// Deadline of a response, much shorter than the ping interval.
const RESPONSE_DEADLINE: Duration = Duration::from_millis(100);

pub async fn tunnel_to_a_vanished_peer_is_retired_before_the_ping_timeout<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let blackhole = Blackhole::before(&mut fixture).await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    blackhole.discard_all();
    let mut stream = fixture.open().await.unwrap();
    let error = E::response_within(&mut stream, RESPONSE_DEADLINE)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
    assert!(error.reason().is_retryable_before_send());
    wait_until(|| E::usable_tunnels(&fixture.pool) == 0).await;
    assert!(!c.relay.is_finished(), "an open stream continues");
}

pub async fn slow_response_does_not_retire_the_tunnel<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut c = fixture.connect().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let mut stream = fixture.open().await.unwrap();
    let error = E::response_within(&mut stream, RESPONSE_DEADLINE)
        .await
        .unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
    // Longer than the timeout of a suspected peer.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(E::usable_tunnels(&fixture.pool), 1);
    assert_relays(&mut c, b"x").await;
}

/// Streams on one tunnel, whose windows together far exceed the kernel buffers of both ends.
const STREAMS: usize = 8;

/// Bytes in each direction of each stream.
const BULK_BYTES: usize = 24 * 1024 * 1024;

/// An end that has to write a ping or its response reads nothing until it is written, and it cannot write while the
/// other end does not read. So two ends that ping during bulk transfer in both directions can block forever.
pub async fn pings_do_not_block_bulk_transfer_in_both_directions<E: Engine>() {
    let config = PoolConfig {
        max_preconnect_tunnels_per_peer: 1,
        ping_interval: Duration::from_millis(5),
        ping_timeout: Duration::from_secs(5),
        ..PoolConfig::default()
    };
    let serve = ServeConfig {
        ping_interval: config.ping_interval,
        ping_timeout: config.ping_timeout,
        ..ServeConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, serve)
        .await
        .with_small_tunnel_buffers();
    let mut sides = JoinSet::new();
    let mut relays = Vec::new();
    for _ in 0..STREAMS {
        let c = fixture.connect().await;
        sides.spawn_local(send_and_receive_bulk(c.downstream));
        sides.spawn_local(send_and_receive_bulk(c.upstream));
        relays.push(c.relay);
    }
    for relay in relays {
        let summary = relay.await.unwrap();
        assert!(
            matches!(summary.outcome, RelayOutcome::Closed),
            "{summary:?}"
        );
    }
    sides.join_all().await;
    assert_eq!(fixture.connections.get(), 1, "all streams use one tunnel");
}

/// Sends and receives [`BULK_BYTES`].
async fn send_and_receive_bulk(socket: TcpStream) {
    let (mut read, mut write) = socket.into_split();
    let send = async {
        let piece = vec![7; 256 * 1024];
        for _ in 0..BULK_BYTES / piece.len() {
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
    assert_eq!(got.unwrap(), BULK_BYTES);
}

/// A TCP proxy before the server that can start to discard all bytes, without closing a connection.
struct Blackhole(Rc<Cell<bool>>);

impl Blackhole {
    async fn before<E: Engine>(fixture: &mut Fixture<E>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = std::mem::replace(&mut fixture.key.address, listener.local_addr().unwrap());
        let is_discarding = Rc::new(Cell::new(false));
        let flag = Rc::clone(&is_discarding);
        spawn_local(async move {
            let near = listener.accept().await.unwrap().0;
            let far = TcpStream::connect(to).await.unwrap();
            tokio::join!(forward(&near, &far, &flag), forward(&far, &near, &flag));
        });
        Self(is_discarding)
    }

    fn discard_all(&self) {
        self.0.set(true);
    }
}

async fn forward(from: &TcpStream, to: &TcpStream, is_discarding: &Cell<bool>) {
    let mut buffer = vec![0; 65536];
    loop {
        from.readable().await.unwrap();
        let n = match from.try_read(&mut buffer) {
            Ok(0) => return std::future::pending().await,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => continue,
            Err(_) => return std::future::pending().await,
        };
        let mut rest = &buffer[..n];
        while !rest.is_empty() && !is_discarding.get() {
            to.writable().await.unwrap();
            match to.try_write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
    }
}
