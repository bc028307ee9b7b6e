//! Slow readers, floods and resets do not affect the other streams of a tunnel, nor other tunnels.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use hbone::{PoolConfig, RelayOpts, RelayOutcome, ServeConfig, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::{JoinSet, spawn_local};

use crate::engine::Engine;
use crate::fixture::{Connection, Fixture, Path, socket_pair, wait_until};
use crate::raw_peer as raw;
use crate::tcp_semantics::{assert_relays, fill_buffers, reset, test_pattern};

pub async fn streams_over_the_limit_do_not_affect_other_tunnels<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut neighbour = fixture.connect().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let tls = raw::tls(raw::valid_client(), fixture.key.address)
        .await
        .unwrap();
    let (mut send, connection) = h2::client::Builder::new()
        .initial_max_send_streams(6000)
        .handshake::<_, Bytes>(tls)
        .await
        .unwrap();
    // All of them are sent before the client receives the server's limit.
    let mut responses = JoinSet::new();
    for _ in 0..5000 {
        let (response, stream) = send
            .send_request(raw::connect("10.0.0.1:80"), false)
            .unwrap();
        responses.spawn_local(async move {
            let _open = stream;
            response.await.unwrap_err().reason()
        });
        send = send.ready().await.unwrap();
    }
    let driver = spawn_local(connection);
    let limit = ServeConfig::default().max_streams as usize;
    // The server may also close the tunnel.
    wait_until(|| fixture.service.pending.get() == limit || driver.is_finished()).await;
    for _ in 0..100 {
        assert_relays(&mut neighbour, b"x").await;
        assert!(fixture.service.pending.get() <= limit);
    }
    driver.abort();
    wait_until(|| fixture.service.pending.get() == 0).await;
}

pub async fn rapid_resets_do_not_affect_other_tunnels<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let mut neighbour = fixture.connect().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let (mut send, driver) = raw::h2(fixture.key.address).await;
    for _ in 0..5000 {
        let Ok(ready) = send.ready().await else { break };
        send = ready;
        let Ok((_, mut stream)) = send.send_request(raw::connect("10.0.0.1:80"), false) else {
            break;
        };
        stream.send_reset(h2::Reason::CANCEL);
        tokio::task::yield_now().await;
    }
    assert_relays(&mut neighbour, b"x").await;
    driver.abort();
    wait_until(|| fixture.service.pending.get() == 0).await;
    fixture.serve_summaries.recv().await.unwrap();
}

/// HTTP/2 no longer counts a stream that was reset, but the server still holds its last bytes for a while.
pub async fn streams_over_the_task_limit_are_refused_and_reported<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let mut neighbour = fixture.connect().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let (mut send, driver) = raw::h2(fixture.key.address).await;
    let max_tasks = 2 * ServeConfig::default().max_streams as usize;
    for number in 1..=max_tasks {
        send = send.ready().await.unwrap();
        let (_, mut stream) = send
            .send_request(raw::connect("10.0.0.1:80"), false)
            .unwrap();
        stream.send_data(Bytes::from_static(b"x"), false).unwrap();
        wait_until(|| fixture.service.pending.get() == number).await;
        stream.send_reset(h2::Reason::CANCEL);
    }
    assert_eq!(fixture.service.refused_streams.get(), 0);
    for _ in 0..3 {
        send = send.ready().await.unwrap();
        let (response, _stream) = send
            .send_request(raw::connect("10.0.0.1:80"), false)
            .unwrap();
        let refused = response.await.unwrap_err();
        assert_eq!(refused.reason(), Some(h2::Reason::REFUSED_STREAM));
    }
    assert_eq!(fixture.service.refused_streams.get(), 3);
    assert_relays(&mut neighbour, b"x").await;
    driver.abort();
    fixture.serve_summaries.recv().await.unwrap();
}

/// Writes single bytes, and waits after each until the relay has sent it as a frame of its own.
async fn send_one_byte_frames(from: &TcpStream, counter: &std::sync::atomic::AtomicU64, n: u64) {
    let start = counter.load(Ordering::Relaxed);
    for i in 0..n {
        from.writable().await.unwrap();
        from.try_write(&i.to_le_bytes()[..1]).unwrap();
        while counter.load(Ordering::Relaxed) < start + i + 1 {
            tokio::task::yield_now().await;
        }
    }
}

fn one_byte_frames(n: u64) -> Vec<u8> {
    (0..n).map(|i| i.to_le_bytes()[0]).collect()
}

/// The kernel merges small writes that wait, and holds about 70 KB of them even with small buffers. The remaining frames
/// are still many more than the about 100 small frames after which h2 closes a connection by default.
const FRAMES: u64 = 80_000;

pub async fn slow_upstream_reader_does_not_affect_other_streams<E: Engine>() {
    let fixture = Fixture::<E>::new()
        .await
        .with_small_upstream_buffers()
        .await;
    let mut slow = fixture.connect().await;
    let mut neighbour = fixture.connect().await;
    send_one_byte_frames(&slow.downstream, &slow.counters.sent, FRAMES).await;
    assert_relays(&mut neighbour, b"during").await;
    assert_eq!(fixture.connections.get(), 1, "both streams use one tunnel");
    slow.downstream.shutdown().await.unwrap();
    let mut got = Vec::new();
    slow.upstream.read_to_end(&mut got).await.unwrap();
    assert!(got == one_byte_frames(FRAMES));
    assert_relays(&mut neighbour, b"after").await;
}

pub async fn slow_downstream_reader_does_not_affect_other_streams<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let counters: Rc<RefCell<Vec<Arc<hbone::Counters>>>> = Rc::default();
    let collected = Rc::clone(&counters);
    *fixture.service.decide.borrow_mut() = Rc::new(move |_, _| {
        let opts = RelayOpts::default();
        collected.borrow_mut().push(Arc::clone(&opts.counters));
        Ok(Some(opts))
    });
    let (downstream, relayed) = small_socket_pair().await;
    let _relay = spawn_local(E::relay(
        fixture.open().await.unwrap(),
        relayed,
        RelayOpts::default(),
    ));
    let mut upstream = fixture.upstream().await;
    let mut neighbour = fixture.connect().await;
    let counted = Arc::clone(&counters.borrow()[0]);
    send_one_byte_frames(&upstream, &counted.received, FRAMES).await;
    assert_relays(&mut neighbour, b"during").await;
    upstream.shutdown().await.unwrap();
    let (mut got, mut downstream) = (Vec::new(), downstream);
    downstream.read_to_end(&mut got).await.unwrap();
    assert!(got == one_byte_frames(FRAMES));
    assert_relays(&mut neighbour, b"after").await;
}

/// A connected pair of sockets with small kernel buffers.
async fn small_socket_pair() -> (TcpStream, TcpStream) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let client = TcpSocket::new_v4().unwrap();
    client.set_recv_buffer_size(4096).unwrap();
    let connect = client.connect(listener.local_addr().unwrap());
    let (a, b) = tokio::join!(connect, listener.accept());
    (a.unwrap(), b.unwrap().0)
}

pub async fn slow_decision_does_not_affect_other_streams<E: Engine>() {
    let config = PoolConfig {
        // The response never arrives, and the frames take more than the default of 15 s on a busy machine.
        response_timeout: Duration::from_secs(600),
        ..PoolConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let mut neighbour = fixture.connect().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let (downstream, relayed) = socket_pair().await;
    let opts = RelayOpts {
        optimistic: true,
        ..RelayOpts::default()
    };
    let counters = Arc::clone(&opts.counters);
    let relay = spawn_local(E::relay(fixture.open().await.unwrap(), relayed, opts));
    send_one_byte_frames(&downstream, &counters.sent, FRAMES).await;
    assert_relays(&mut neighbour, b"during").await;
    relay.abort();
    wait_until(|| fixture.service.pending.get() == 0).await;
}

pub async fn stalled_readers_do_not_use_the_window_of_another_stream<E: Engine>() {
    const STREAMS: u8 = 8;
    let config = PoolConfig {
        max_streams_per_tunnel: STREAMS.into(),
        stream_window: 256 * 1024,
        ..PoolConfig::default()
    };
    let serve = ServeConfig {
        max_streams: STREAMS.into(),
        stream_window: 256 * 1024,
        ..ServeConfig::default()
    };
    let config = PoolConfig {
        max_preconnect_tunnels_per_peer: 1,
        ..config
    };
    let fixture = Fixture::<E>::with_config(config, serve)
        .await
        .with_small_upstream_buffers()
        .await;
    let mut stalled: Vec<Connection> = Vec::new();
    for _ in 0..STREAMS - 1 {
        let mut c = fixture.connect().await;
        fill_buffers(&mut c).await;
        stalled.push(c);
    }
    let mut c = fixture.connect().await;
    assert_eq!(fixture.connections.get(), 1, "all streams use one tunnel");
    let data = test_pattern(4 * 1024 * 1024);
    let send = async {
        c.downstream.write_all(&data).await.unwrap();
        c.downstream.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, n) = tokio::join!(send, c.upstream.read_to_end(&mut got));
    assert_eq!(n.unwrap(), data.len());
}

pub async fn streams_reset_under_load_do_not_affect_other_streams<E: Engine>() {
    let config = PoolConfig {
        max_preconnect_tunnels_per_peer: 1,
        ..PoolConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let mut neighbour = fixture.connect().await;
    let data = vec![0; 256 * 1024];
    // More than the 1024 late frames that h2 tolerates from a peer on one connection.
    for _ in 0..1500 {
        let c = fixture.connect().await;
        let _written = c.downstream.try_write(&data);
        tokio::task::yield_now().await;
        reset(c.upstream);
        let summary = c.relay.await.unwrap();
        assert!(
            matches!(summary.outcome, RelayOutcome::Reset { by: Side::Upstream }),
            "{summary:?}"
        );
    }
    assert_relays(&mut neighbour, b"during").await;
    assert_eq!(fixture.connections.get(), 1, "all streams use one tunnel");
}

pub async fn streams_reset_right_after_open_do_not_affect_other_streams<E: Engine>() {
    let config = PoolConfig {
        max_preconnect_tunnels_per_peer: 1,
        ..PoolConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let mut neighbour = fixture.connect().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    for _ in 0..20 {
        let mut relays = JoinSet::new();
        for _ in 0..50 {
            let (downstream, relayed) = socket_pair().await;
            let opts = RelayOpts {
                optimistic: true,
                ..RelayOpts::default()
            };
            let stream = fixture.open().await.unwrap();
            relays.spawn_local(E::relay(stream, relayed, opts));
            reset(downstream);
        }
        // Some relays end by the reset, others are dropped: both reset their streams.
        tokio::task::yield_now().await;
        relays.shutdown().await;
    }
    wait_until(|| fixture.service.pending.get() == 0).await;
    assert_relays(&mut neighbour, b"during").await;
    assert_eq!(fixture.connections.get(), 1, "all streams use one tunnel");
}
