//! Tunnels: when they are dialled, shared, left and closed.

use std::io::ErrorKind;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{
    PoolConfig, PoolKey, Reason, Rejected, RelayOpts, RelayOutcome, ServeConfig, ServeOutcome,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinSet, spawn_local};
use tokio::time::Instant;

use crate::engine::Engine;
use crate::tcp::{ask, assert_reset_seen};
use crate::world::{SERVER, Way, World, client_tls, id, pair, server_tls, until};

/// The life of a tunnel that is to be seen to end: longer than a busy machine takes to open a stream in it.
const SOON: Duration = Duration::from_millis(300);

fn opens<E: Engine>(world: &World<E>, n: usize) -> JoinSet<Result<E::Stream, hbone::Error>> {
    let mut opens = JoinSet::new();
    for _ in 0..n {
        let (pool, key, tls) = (Rc::clone(&world.pool), world.key.clone(), world.tls.clone());
        let request = world.request();
        opens.spawn_local(async move { E::open(&pool, &key, &[id(SERVER)], &tls, request).await });
    }
    opens
}

pub async fn those_who_wait_share_one_dial<E: Engine>() {
    let config = PoolConfig {
        eager_tunnels_per_peer: 1,
        ..PoolConfig::default()
    };
    let world = World::<E>::with(config, ServeConfig::default()).await;
    let streams: Vec<_> = opens(&world, 50).join_all().await;
    assert!(streams.iter().all(Result::is_ok));
    assert_eq!((world.sockets.dials.get(), E::tunnels(&world.pool)), (1, 1));
}

pub async fn those_who_wait_share_its_failure<E: Engine>() {
    let mut world = World::<E>::new().await;
    world.stop_listening().await;
    let failures: Vec<_> = opens(&world, 50).join_all().await;
    for failure in failures {
        assert_eq!(failure.err().unwrap().reason(), Reason::ConnectRefused);
    }
    assert_eq!(world.sockets.dials.get(), 1);
    // The next one tries again.
    assert!(world.open().await.is_err());
    assert_eq!(world.sockets.dials.get(), 2);
}

pub async fn a_dial_goes_on_when_the_first_who_waited_has_gone<E: Engine>() {
    let world = World::<E>::new().await;
    let mut first = opens(&world, 1);
    until(|| world.sockets.dials.get() == 1).await;
    first.shutdown().await;
    world.open().await.unwrap();
    assert_eq!(world.sockets.dials.get(), 1);
}

pub async fn the_peers_stream_limit_is_respected<E: Engine>() {
    let serve = ServeConfig {
        max_streams: 3,
        ..ServeConfig::default()
    };
    let world = World::<E>::with(PoolConfig::default(), serve).await;
    let mut streams: Vec<_> = opens(&world, 10)
        .join_all()
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    for stream in &mut streams {
        E::response(stream).await.unwrap();
    }
    assert_eq!(E::tunnels(&world.pool), 4);
}

pub async fn a_full_peer_is_an_error_and_not_a_wait<E: Engine>() {
    let config = PoolConfig {
        streams_per_tunnel: 2,
        tunnels_per_peer: 2,
        ..PoolConfig::default()
    };
    let world = World::<E>::with(config, ServeConfig::default()).await;
    let streams: Vec<_> = opens(&world, 4).join_all().await;
    assert!(streams.iter().all(Result::is_ok));
    let full = world.open().await.err().unwrap();
    assert_eq!(full.reason(), Reason::TooManyStreams);
    drop(streams);
    until_open(&world).await;
}

async fn until_open<E: Engine>(world: &World<E>) {
    while world.open().await.is_err() {
        tokio::task::yield_now().await;
    }
}

pub async fn another_workload_at_the_same_address_gets_another_tunnel<E: Engine>() {
    let world = World::<E>::new().await;
    let _first = world.open().await.unwrap();
    let key = PoolKey {
        destination: Arc::from("cluster//Pod/b/server/2"),
        ..world.key.clone()
    };
    let _second = E::open(
        &world.pool,
        &key,
        &[id(SERVER)],
        &world.tls,
        world.request(),
    )
    .await;
    assert_eq!(E::tunnels(&world.pool), 2);
}

pub async fn a_busy_tunnel_gets_company<E: Engine>() {
    let world = World::<E>::new().await;
    let mut c = world.connect().await;
    assert_eq!(E::tunnels(&world.pool), 1);
    let send = async {
        let data = vec![0; 16 * 1024 * 1024];
        c.downstream.write_all(&data).await.unwrap();
        c.downstream.shutdown().await.unwrap();
    };
    let mut sink = tokio::io::sink();
    let (_, n) = tokio::join!(send, tokio::io::copy(&mut c.upstream, &mut sink));
    assert_eq!(n.unwrap(), 16 * 1024 * 1024);
    let _stream = world.open().await.unwrap();
    until(|| E::tunnels(&world.pool) == 2).await;
}

pub async fn a_purged_tunnel_is_not_chosen_and_its_streams_live_on<E: Engine>() {
    let world = World::<E>::new().await;
    let mut old = world.connect().await;
    E::purge(&world.pool, &world.key.destination);
    assert_eq!(E::tunnels(&world.pool), 0);
    let mut new = world.connect().await;
    assert_eq!((world.sockets.dials.get(), E::tunnels(&world.pool)), (2, 1));
    ask(&mut old, b"old").await;
    ask(&mut new, b"new").await;
    E::purge(&world.pool, "somebody else");
    assert_eq!(E::tunnels(&world.pool), 1);
}

pub async fn a_drained_server_says_goaway_and_its_streams_live_on<E: Engine>() {
    let mut world = World::<E>::new().await;
    let mut old = world.connect().await;
    ask(&mut old, b"before").await;
    world.drain.cancel();
    world.drain = tokio_util::sync::CancellationToken::new();
    // A new stream meets a server that has drained from the start, and is refused or answered; never lost in silence.
    until(|| world.accepted.get() == 1).await;
    ask(&mut old, b"after").await;
    let refused = loop {
        match world.open().await {
            Ok(mut stream) => match E::response(&mut stream).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => break error,
            },
            Err(error) => break error,
        }
    };
    assert!(refused.is_retryable(), "{refused:?}");
    ask(&mut old, b"still").await;
    drop((old.downstream, old.upstream));
    assert!(matches!(
        old.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    assert_eq!(
        world.serve_ends.recv().await.unwrap().outcome,
        ServeOutcome::Drained
    );
}

pub async fn a_tunnel_that_is_old_takes_no_new_streams_and_keeps_its_own<E: Engine>() {
    let config = PoolConfig {
        max_age: SOON,
        ..PoolConfig::default()
    };
    let mut world = World::<E>::with(config, ServeConfig::default()).await;
    let mut old = world.connect().await;
    until(|| E::tunnels(&world.pool) == 0).await;
    let mut new = world.connect().await;
    assert_eq!(world.sockets.dials.get(), 2);
    ask(&mut old, b"still").await;
    ask(&mut new, b"again").await;
    drop((old.downstream, old.upstream));
    assert!(matches!(
        old.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    // With its last stream it is gone.
    assert_eq!(
        world.serve_ends.recv().await.unwrap().outcome,
        ServeOutcome::ClosedByPeer
    );
}

const DENIED: Rejected = Rejected {
    status: 401,
    reason: "denied",
};

pub async fn a_server_asks_for_a_new_tunnel_when_one_is_old<E: Engine>() {
    let serve = ServeConfig {
        max_age: SOON,
        ..ServeConfig::default()
    };
    let mut world = World::<E>::with(PoolConfig::default(), serve).await;
    let mut old = world.connect().await;
    let accept = world.dialer.decide.replace(Rc::new(|_, _| Err(DENIED)));
    while world.sockets.dials.get() < 2 {
        let mut stream = world.open().await.unwrap();
        let refused = E::response(&mut stream).await.unwrap_err();
        // One that crosses the GOAWAY on its way has reached nobody, and the next tunnel takes it.
        let crossed = refused.reason() == Reason::GoAway && refused.is_retryable();
        assert!(
            crossed || refused.reason() == Reason::ConnectRejected(401),
            "{refused:?}"
        );
    }
    world.dialer.decide.replace(accept);
    let mut new = world.connect().await;
    ask(&mut old, b"still").await;
    ask(&mut new, b"again").await;
    drop((old.downstream, old.upstream));
    assert!(matches!(
        old.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    assert_eq!(
        world.serve_ends.recv().await.unwrap().outcome,
        ServeOutcome::Drained
    );
}

pub async fn an_idle_tunnel_is_closed_and_one_with_a_silent_stream_is_not<E: Engine>() {
    let config = PoolConfig {
        idle_timeout: SOON,
        ping_interval: Duration::from_millis(20),
        ..PoolConfig::default()
    };
    let mut world = World::<E>::with(config, ServeConfig::default()).await;
    let mut c = world.connect().await;
    tokio::time::sleep(2 * SOON).await;
    ask(&mut c, b"after a silence").await;
    drop((c.downstream, c.upstream));
    assert!(matches!(
        c.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    until(|| E::tunnels(&world.pool) == 0).await;
    assert_eq!(
        world.serve_ends.recv().await.unwrap().outcome,
        ServeOutcome::ClosedByPeer
    );
}

pub async fn a_peer_that_no_longer_answers_is_noticed<E: Engine>() {
    let config = PoolConfig {
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_secs(2),
        ..PoolConfig::default()
    };
    let mut world = World::<E>::with(config, ServeConfig::default()).await;
    let silent = Silence::before(&mut world).await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    silent.begin();
    let end = c.relay.await.unwrap();
    let RelayOutcome::Failed(error) = end.outcome else {
        panic!("{end:?}")
    };
    assert_eq!(error.reason(), Reason::PingTimeout);
    assert_eq!(error.peer(), Some(world.key.address));
    assert_reset_seen(&mut c.downstream).await;
    assert_eq!(E::tunnels(&world.pool), 0);
}

/// A wire that can be cut without anybody being told.
pub struct Silence(Rc<std::cell::Cell<bool>>);

impl Silence {
    pub async fn before<E: Engine>(world: &mut World<E>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = std::mem::replace(&mut world.key.address, listener.local_addr().unwrap());
        let cut = Rc::new(std::cell::Cell::new(false));
        let silent = Rc::clone(&cut);
        spawn_local(async move {
            let here = listener.accept().await.unwrap().0;
            let there = TcpStream::connect(to).await.unwrap();
            tokio::join!(carry(&here, &there, &silent), carry(&there, &here, &silent));
        });
        Self(cut)
    }

    pub fn begin(&self) {
        self.0.set(true);
    }
}

async fn carry(from: &TcpStream, to: &TcpStream, cut: &std::cell::Cell<bool>) {
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
        while !rest.is_empty() && !cut.get() {
            to.writable().await.unwrap();
            match to.try_write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
            }
        }
    }
}

pub async fn a_tunnel_that_breaks_resets_its_applications<E: Engine>() {
    let mut world = World::<E>::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = std::mem::replace(&mut world.key.address, listener.local_addr().unwrap());
    let wire = spawn_local(async move {
        let mut here = listener.accept().await.unwrap().0;
        let mut there = TcpStream::connect(to).await.unwrap();
        here.set_zero_linger().unwrap();
        there.set_zero_linger().unwrap();
        tokio::io::copy_bidirectional(&mut here, &mut there).await
    });
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    wire.abort();
    assert_reset_seen(&mut c.downstream).await;
    assert_reset_seen(&mut c.upstream).await;
    let end = c.relay.await.unwrap();
    let RelayOutcome::Failed(error) = end.outcome else {
        panic!("{end:?}")
    };
    assert_eq!(error.reason(), Reason::TunnelClosed);
    let end = world.upstream_ends.recv().await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Failed(_)), "{end:?}");
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.error.unwrap().reason(), Reason::TunnelClosed);
    until(|| E::tunnels(&world.pool) == 0).await;
}

pub async fn an_aborted_server_resets_its_applications<E: Engine>() {
    let mut world = World::<E>::new().await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    world.abort.cancel();
    assert_reset_seen(&mut c.downstream).await;
    assert_reset_seen(&mut c.upstream).await;
    assert!(matches!(
        c.relay.await.unwrap().outcome,
        RelayOutcome::Failed(_)
    ));
    let end = world.upstream_ends.recv().await.unwrap();
    let RelayOutcome::Failed(error) = end.outcome else {
        panic!("{end:?}")
    };
    assert_eq!(error.reason(), Reason::Stopped);
    assert_eq!(
        world.serve_ends.recv().await.unwrap().outcome,
        ServeOutcome::Aborted
    );
}

pub async fn a_closed_pool_waits_for_its_streams_and_takes_no_more<E: Engine>() {
    let world = World::<E>::new().await;
    let mut c = world.connect().await;
    let pool = Rc::clone(&world.pool);
    let close = spawn_local(async move {
        E::close(&pool, Instant::now() + Duration::from_secs(30)).await;
    });
    until(|| E::tunnels(&world.pool) == 0).await;
    assert_eq!(world.open().await.err().unwrap().reason(), Reason::Draining);
    ask(&mut c, b"still here").await;
    assert!(!close.is_finished());
    drop((c.downstream, c.upstream));
    assert!(matches!(
        c.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    close.await.unwrap();
}

pub async fn a_closed_pool_resets_what_outlives_its_deadline<E: Engine>() {
    let world = World::<E>::new().await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    E::close(&world.pool, Instant::now() + Duration::from_millis(50)).await;
    assert_reset_seen(&mut c.downstream).await;
    assert_reset_seen(&mut c.upstream).await;
    let end = c.relay.await.unwrap();
    let RelayOutcome::Failed(error) = end.outcome else {
        panic!("{end:?}")
    };
    assert_eq!(error.reason(), Reason::Stopped);
}

pub async fn a_rejection_carries_its_status_and_resets_the_application<E: Engine>() {
    let world = World::<E>::new().await;
    let denied = Rejected {
        status: 401,
        reason: "policy_denied",
    };
    *world.dialer.decide.borrow_mut() = Rc::new(move |_, _| Err(denied));
    let mut stream = world.open().await.unwrap();
    let error = E::response(&mut stream).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectRejected(401));
    assert!(!error.is_retryable());
    let (mut downstream, relayed) = pair().await;
    let end = E::relay(stream, relayed, RelayOpts::default()).await;
    let RelayOutcome::Failed(error) = end.outcome else {
        panic!("{end:?}")
    };
    assert_eq!(error.reason(), Reason::ConnectRejected(401));
    assert_reset_seen(&mut downstream).await;
    // The tunnel is none the worse.
    assert_eq!(E::tunnels(&world.pool), 1);
}

pub async fn optimistic_bytes_are_on_their_way_before_the_answer<E: Engine>() {
    let world = World::<E>::new().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let relay = async |optimistic| {
        let (mut downstream, relayed) = pair().await;
        downstream.write_all(b"early").await.unwrap();
        let opts = RelayOpts {
            optimistic,
            ..RelayOpts::default()
        };
        let counters = Arc::clone(&opts.counters);
        let relay = spawn_local(E::relay(world.open().await.unwrap(), relayed, opts));
        (downstream, counters, relay)
    };
    let patient = relay(false).await;
    let eager = relay(true).await;
    let sent =
        |counters: &hbone::Counters| counters.sent.load(std::sync::atomic::Ordering::Relaxed);
    until(|| sent(&eager.1) == 5).await;
    assert_eq!(sent(&patient.1), 0);
    patient.2.abort();
    eager.2.abort();
}

pub async fn a_peer_that_gives_up_cancels_the_decision<E: Engine>() {
    let world = World::<E>::new().await;
    *world.dialer.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let stream = world.open().await.unwrap();
    until(|| world.dialer.pending.get() == 1).await;
    drop(stream);
    until(|| world.dialer.pending.get() == 0).await;
}

pub async fn a_stream_is_a_byte_stream_for_other_protocols<E: Engine>() {
    let world = World::<E>::of(
        client_tls(),
        server_tls(),
        PoolConfig::default(),
        ServeConfig::default(),
    )
    .await;
    let mut io = E::into_io(world.open().await.unwrap());
    let mut upstream = world.upstream().await;
    let data = crate::tcp::pattern(8 * 1024 * 1024);
    let send = async {
        io.write_all(&data).await.unwrap();
        io.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, n) = tokio::join!(send, upstream.read_to_end(&mut got));
    assert_eq!(n.unwrap(), data.len());
    upstream.write_all(b"answer").await.unwrap();
    drop(upstream);
    got.clear();
    io.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"answer");
}
