//! Deadlines and hostile peers.

use std::cell::RefCell;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use hbone::{PoolConfig, Reason, RelayOpts, RelayOutcome, ServeConfig, ServeOutcome, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinSet, spawn_local};

use crate::engine::Engine;
use crate::raw;
use crate::tcp::{ask, fill, pattern, reset};
use crate::world::{Connection, Way, World, pair, until};

/// A deadline that is to be reached, but not by a handshake that goes on on a busy machine.
const SOON: Duration = Duration::from_secs(1);

async fn with_pool<E: Engine>(config: PoolConfig) -> World<E> {
    World::with(config, ServeConfig::default()).await
}

async fn failure<E: Engine>(world: &World<E>) -> hbone::Error {
    world.open().await.err().expect("the tunnel was opened")
}

pub async fn a_refused_connect_says_so_at_once<E: Engine>() {
    let mut world = World::<E>::new().await;
    world.stop_listening().await;
    let error = failure(&world).await;
    assert_eq!(error.reason(), Reason::ConnectRefused);
    assert!(error.is_retryable());
    assert!(
        error
            .to_string()
            .starts_with(&world.key.address.to_string()),
        "{error}"
    );
}

pub async fn a_connect_without_answer_ends_at_its_deadline<E: Engine>() {
    let config = PoolConfig {
        connect_timeout: SOON,
        ..PoolConfig::default()
    };
    let mut world = with_pool::<E>(config).await;
    // A listener whose queue is full does not answer a SYN.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    world.key.address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(socket) = tokio::time::timeout(SOON, TcpStream::connect(world.key.address)).await {
        queued.push(socket);
        assert!(queued.len() < 100, "the queue never fills");
    }
    assert_eq!(failure(&world).await.reason(), Reason::ConnectTimeout);
}

pub async fn a_silent_server_ends_at_the_tls_deadline<E: Engine>() {
    let config = PoolConfig {
        tls_timeout: SOON,
        ..PoolConfig::default()
    };
    let mut world = with_pool::<E>(config).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.key.address = silent.local_addr().unwrap();
    assert_eq!(failure(&world).await.reason(), Reason::TlsHandshakeTimeout);
}

pub async fn a_server_without_settings_ends_at_the_h2_deadline<E: Engine>() {
    let config = PoolConfig {
        h2_timeout: SOON,
        ..PoolConfig::default()
    };
    let mut world = with_pool::<E>(config).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.key.address = listener.local_addr().unwrap();
    spawn_local(async move {
        let tcp = listener.accept().await.unwrap().0;
        let _tls = raw::accept(tcp, &raw::server_credentials(), &[b"h2"])
            .await
            .unwrap();
        pending::<()>().await;
    });
    assert_eq!(failure(&world).await.reason(), Reason::H2HandshakeTimeout);
}

pub async fn a_connect_that_is_never_answered_ends_at_its_deadline<E: Engine>() {
    let config = PoolConfig {
        response_timeout: SOON,
        ..PoolConfig::default()
    };
    let world = with_pool::<E>(config).await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let mut stream = world.open().await.unwrap();
    let error = E::response(&mut stream).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
    drop(stream);
    until(|| world.dialer.pending.get() == 0).await;
    // A relay that waits meets the same deadline.
    let (_downstream, relayed) = pair().await;
    let end = E::relay(world.open().await.unwrap(), relayed, RelayOpts::default()).await;
    let RelayOutcome::Failed(error) = end.outcome else {
        panic!("{end:?}")
    };
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
}

async fn short_handshakes<E: Engine>() -> World<E> {
    let serve = ServeConfig {
        tls_timeout: SOON,
        h2_timeout: SOON,
        ..ServeConfig::default()
    };
    World::with(PoolConfig::default(), serve).await
}

pub async fn a_silent_client_ends_at_the_tls_deadline<E: Engine>() {
    let mut world = short_handshakes::<E>().await;
    let mut slow = TcpStream::connect(world.key.address).await.unwrap();
    // The start of a ClientHello, and no more.
    slow.write_all(b"\x16\x03\x01\x02\0").await.unwrap();
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.error.unwrap().reason(), Reason::TlsHandshakeTimeout);
    assert_eq!(end.peer, None);
}

pub async fn a_client_without_preface_ends_at_the_h2_deadline<E: Engine>() {
    let mut world = short_handshakes::<E>().await;
    let _silent = raw::tls(raw::good_client(), world.key.address)
        .await
        .unwrap();
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.error.unwrap().reason(), Reason::H2HandshakeTimeout);
    assert!(end.peer.is_some());
}

pub async fn plain_http_and_garbage_are_refused_with_a_reason<E: Engine>() {
    let mut world = World::<E>::new().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0; 4096],
        &[0xff; 65536],
    ] {
        let mut stranger = TcpStream::connect(world.key.address).await.unwrap();
        stranger.write_all(bytes).await.unwrap();
        let end = world.serve_ends.recv().await.unwrap();
        assert_eq!((end.outcome, end.peer), (ServeOutcome::Failed, None));
        assert_eq!(end.error.unwrap().reason(), Reason::NotHbone);
    }
    let nothing = TcpStream::connect(world.key.address).await.unwrap();
    drop(nothing);
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.error.unwrap().reason(), Reason::TlsHandshakeFailed);
    ask(&mut world.connect().await, b"x").await;
}

pub async fn garbage_after_tls_is_refused_with_a_reason<E: Engine>() {
    let mut world = World::<E>::new().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n         "[..], &[0xff; 65536]] {
        let mut tls = raw::tls(raw::good_client(), world.key.address)
            .await
            .unwrap();
        let _refused = tls.write_all(bytes).await;
        let end = world.serve_ends.recv().await.unwrap();
        assert_eq!(end.error.unwrap().reason(), Reason::H2HandshakeFailed);
    }
    let mut tls = raw::tls(raw::good_client(), world.key.address)
        .await
        .unwrap();
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let _refused = tls.write_all(&[0xff; 65536]).await;
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.error.unwrap().reason(), Reason::ProtocolError);
    ask(&mut world.connect().await, b"x").await;
}

pub async fn a_request_that_is_no_connect_is_refused_and_reported<E: Engine>() {
    let world = World::<E>::new().await;
    let (mut send, _driver) = raw::h2(world.key.address).await;
    let get = http::Request::get("https://10.0.0.1/").body(()).unwrap();
    let post = http::Request::post("https://10.0.0.1/").body(()).unwrap();
    for request in [
        get,
        post,
        raw::connect("10.0.0.1:0"),
        raw::connect("10.0.0.999:80"),
    ] {
        let (response, _stream) = send.send_request(request, false).unwrap();
        assert_eq!(response.await.unwrap().status(), 400);
    }
    let refusals = world.dialer.refusals.borrow();
    assert_eq!(refusals.len(), 4);
    assert!(
        refusals
            .iter()
            .all(|(reason, _)| *reason == Reason::ConnectMalformed)
    );
    assert_eq!(refusals[0].1, ":method: not CONNECT");
}

pub async fn huge_headers_are_refused_and_harm_nobody<E: Engine>() {
    let world = World::<E>::new().await;
    let mut neighbour = world.connect().await;
    let (mut send, _driver) = raw::h2(world.key.address).await;
    let mut good = raw::connect(&world.request().authority.to_string());
    for size in [80_000, 300_000] {
        let mut request = raw::connect("10.0.0.1:80");
        for i in 0..size / 10_000 {
            let name = http::HeaderName::try_from(format!("x-{i}")).unwrap();
            request
                .headers_mut()
                .insert(name, "a".repeat(10_000).parse().unwrap());
        }
        let (response, _stream) = send.send_request(request, false).unwrap();
        assert_eq!(response.await.unwrap().status(), 431, "{size} bytes");
    }
    assert_eq!(world.dialer.refusals.borrow().len(), 1);
    good.headers_mut()
        .insert("baggage", "x".repeat(9000).parse().unwrap());
    let (response, _stream) = send.send_request(good, false).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    ask(&mut neighbour, b"x").await;
}

pub async fn thousands_of_streams_are_bounded_and_harm_nobody<E: Engine>() {
    let world = World::<E>::new().await;
    let mut neighbour = world.connect().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let tls = raw::tls(raw::good_client(), world.key.address)
        .await
        .unwrap();
    let (mut send, connection) = h2::client::Builder::new()
        .initial_max_send_streams(6000)
        .handshake::<_, Bytes>(tls)
        .await
        .unwrap();
    // All of them before the limit is known.
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
    // The server may also have had enough, and closed the tunnel.
    until(|| world.dialer.pending.get() == limit || driver.is_finished()).await;
    for _ in 0..100 {
        ask(&mut neighbour, b"x").await;
        assert!(world.dialer.pending.get() <= limit);
    }
    driver.abort();
    until(|| world.dialer.pending.get() == 0).await;
}

pub async fn thousands_of_resets_harm_no_other_tunnel<E: Engine>() {
    let mut world = World::<E>::new().await;
    let mut neighbour = world.connect().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let (mut send, driver) = raw::h2(world.key.address).await;
    for _ in 0..5000 {
        let Ok(ready) = send.ready().await else { break };
        send = ready;
        let Ok((_, mut stream)) = send.send_request(raw::connect("10.0.0.1:80"), false) else {
            break;
        };
        stream.send_reset(h2::Reason::CANCEL);
        tokio::task::yield_now().await;
    }
    ask(&mut neighbour, b"x").await;
    driver.abort();
    until(|| world.dialer.pending.get() == 0).await;
    world.serve_ends.recv().await.unwrap();
}

/// A stream that was reset counts for HTTP/2 no more, and its last bytes are still held for a while.
pub async fn streams_beyond_what_earlier_ones_hold_are_refused_and_told_of<E: Engine>() {
    let mut world = World::<E>::new().await;
    let mut neighbour = world.connect().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let (mut send, driver) = raw::h2(world.key.address).await;
    let most = 2 * ServeConfig::default().max_streams as usize;
    for number in 1..=most {
        send = send.ready().await.unwrap();
        let (_, mut stream) = send
            .send_request(raw::connect("10.0.0.1:80"), false)
            .unwrap();
        stream.send_data(Bytes::from_static(b"x"), false).unwrap();
        until(|| world.dialer.pending.get() == number).await;
        stream.send_reset(h2::Reason::CANCEL);
    }
    assert_eq!(world.dialer.overloads.get(), 0);
    for _ in 0..3 {
        send = send.ready().await.unwrap();
        let (response, _stream) = send
            .send_request(raw::connect("10.0.0.1:80"), false)
            .unwrap();
        let refused = response.await.unwrap_err();
        assert_eq!(refused.reason(), Some(h2::Reason::REFUSED_STREAM));
    }
    assert_eq!(world.dialer.overloads.get(), 3);
    ask(&mut neighbour, b"x").await;
    driver.abort();
    world.serve_ends.recv().await.unwrap();
}

pub async fn a_tunnel_that_is_not_admitted_is_closed_and_carries_nothing<E: Engine>() {
    let mut world = World::<E>::new().await;
    world.dialer.admits.set(false);
    let refused = async {
        let mut stream = world.open().await?;
        E::response(&mut stream).await
    };
    assert!(refused.await.is_err());
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!((end.outcome, end.streams), (ServeOutcome::Aborted, 0));
    assert!(end.peer.is_some() && end.error.is_none());
}

/// One-byte writes, each of which travels alone.
async fn drip(from: &TcpStream, counter: &std::sync::atomic::AtomicU64, n: u64) {
    let start = counter.load(Ordering::Relaxed);
    for i in 0..n {
        from.writable().await.unwrap();
        from.try_write(&i.to_le_bytes()[..1]).unwrap();
        while counter.load(Ordering::Relaxed) < start + i + 1 {
            tokio::task::yield_now().await;
        }
    }
}

fn dripped(n: u64) -> Vec<u8> {
    (0..n).map(|i| i.to_le_bytes()[0]).collect()
}

/// The kernel joins small writes that wait, and holds some 70 KB of them even between small buffers. What is left is
/// still many more than the hundred or so small frames after which h2's defaults close a connection.
const DRIPS: u64 = 80_000;

pub async fn a_slow_upstream_reader_harms_nobody<E: Engine>() {
    let world = World::<E>::new().await.with_small_upstream_buffers().await;
    let mut slow = world.connect().await;
    let mut neighbour = world.connect().await;
    drip(&slow.downstream, &slow.counters.sent, DRIPS).await;
    ask(&mut neighbour, b"unharmed").await;
    assert_eq!(world.accepted.get(), 1, "both use one tunnel");
    slow.downstream.shutdown().await.unwrap();
    let mut got = Vec::new();
    slow.upstream.read_to_end(&mut got).await.unwrap();
    assert!(got == dripped(DRIPS));
    ask(&mut neighbour, b"still unharmed").await;
}

pub async fn a_slow_downstream_reader_harms_nobody<E: Engine>() {
    let world = World::<E>::new().await;
    let counters: Rc<RefCell<Vec<Arc<hbone::Counters>>>> = Rc::default();
    let collected = Rc::clone(&counters);
    *world.dialer.decide.borrow_mut() = Rc::new(move |_, _| {
        let opts = RelayOpts::default();
        collected.borrow_mut().push(Arc::clone(&opts.counters));
        Ok(Some(opts))
    });
    let (downstream, relayed) = small_pair().await;
    let _relay = spawn_local(E::relay(
        world.open().await.unwrap(),
        relayed,
        RelayOpts::default(),
    ));
    let mut upstream = world.upstream().await;
    let mut neighbour = world.connect().await;
    let counted = Arc::clone(&counters.borrow()[0]);
    drip(&upstream, &counted.received, DRIPS).await;
    ask(&mut neighbour, b"unharmed").await;
    upstream.shutdown().await.unwrap();
    let (mut got, mut downstream) = (Vec::new(), downstream);
    downstream.read_to_end(&mut got).await.unwrap();
    assert!(got == dripped(DRIPS));
    ask(&mut neighbour, b"still unharmed").await;
}

/// A connected pair between which the kernel holds next to nothing.
async fn small_pair() -> (TcpStream, TcpStream) {
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

pub async fn a_slow_decision_harms_nobody<E: Engine>() {
    let world = World::<E>::new().await;
    let mut neighbour = world.connect().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let (downstream, relayed) = pair().await;
    let opts = RelayOpts {
        optimistic: true,
        ..RelayOpts::default()
    };
    let counters = Arc::clone(&opts.counters);
    let relay = spawn_local(E::relay(world.open().await.unwrap(), relayed, opts));
    drip(&downstream, &counters.sent, DRIPS).await;
    ask(&mut neighbour, b"unharmed").await;
    relay.abort();
    until(|| world.dialer.pending.get() == 0).await;
}

pub async fn stalled_readers_on_all_but_one_stream_leave_it_its_window<E: Engine>() {
    const STREAMS: u8 = 8;
    let config = PoolConfig {
        streams_per_tunnel: STREAMS.into(),
        stream_window: 256 * 1024,
        ..PoolConfig::default()
    };
    let serve = ServeConfig {
        max_streams: STREAMS.into(),
        stream_window: 256 * 1024,
        ..ServeConfig::default()
    };
    let config = PoolConfig {
        eager_tunnels_per_peer: 1,
        ..config
    };
    let world = World::<E>::with(config, serve)
        .await
        .with_small_upstream_buffers()
        .await;
    let mut stalled: Vec<Connection> = Vec::new();
    for _ in 0..STREAMS - 1 {
        let mut c = world.connect().await;
        fill(&mut c).await;
        stalled.push(c);
    }
    let mut c = world.connect().await;
    assert_eq!(world.accepted.get(), 1, "all use one tunnel");
    let data = pattern(4 * 1024 * 1024);
    let send = async {
        c.downstream.write_all(&data).await.unwrap();
        c.downstream.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, n) = tokio::join!(send, c.upstream.read_to_end(&mut got));
    assert_eq!(n.unwrap(), data.len());
}

pub async fn streams_reset_under_load_harm_nobody<E: Engine>() {
    let config = PoolConfig {
        eager_tunnels_per_peer: 1,
        ..PoolConfig::default()
    };
    let world = World::<E>::with(config, ServeConfig::default()).await;
    let mut neighbour = world.connect().await;
    let data = vec![0; 256 * 1024];
    // More than the 1024 late frames that h2 forgives a peer over the life of a connection.
    for _ in 0..1500 {
        let c = world.connect().await;
        let _written = c.downstream.try_write(&data);
        tokio::task::yield_now().await;
        reset(c.upstream);
        let end = c.relay.await.unwrap();
        assert!(
            matches!(end.outcome, RelayOutcome::Reset { by: Side::Upstream }),
            "{end:?}"
        );
    }
    ask(&mut neighbour, b"unharmed").await;
    assert_eq!(world.accepted.get(), 1, "all used one tunnel");
}

pub async fn applications_that_open_and_reset_at_once_harm_nobody<E: Engine>() {
    let config = PoolConfig {
        eager_tunnels_per_peer: 1,
        ..PoolConfig::default()
    };
    let world = World::<E>::with(config, ServeConfig::default()).await;
    let mut neighbour = world.connect().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    for _ in 0..20 {
        let mut relays = JoinSet::new();
        for _ in 0..50 {
            let (downstream, relayed) = pair().await;
            let opts = RelayOpts {
                optimistic: true,
                ..RelayOpts::default()
            };
            let stream = world.open().await.unwrap();
            relays.spawn_local(E::relay(stream, relayed, opts));
            reset(downstream);
        }
        // Some give up by their reset, some are dropped: both reset their streams.
        tokio::task::yield_now().await;
        relays.shutdown().await;
    }
    until(|| world.dialer.pending.get() == 0).await;
    ask(&mut neighbour, b"unharmed").await;
    assert_eq!(world.accepted.get(), 1, "all used one tunnel");
}
