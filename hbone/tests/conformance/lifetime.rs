//! When a tunnel accepts no more streams, when it closes, and what happens to its open streams.

use std::rc::Rc;
use std::time::Duration;

use hbone::{PoolConfig, Reason, Rejected, RelayOutcome, ServeConfig, ServeOutcome};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::spawn_local;
use tokio::time::Instant;

use crate::engine::Engine;
use crate::fixture::{Fixture, Path, wait_until};
use crate::tcp_semantics::{assert_receives_reset, assert_relays};

/// Age or idle time of a tunnel at which it ends. Longer than a busy machine takes to open a stream on it.
const SHORT_LIFETIME: Duration = Duration::from_millis(300);

pub async fn retired_destination_gets_a_new_tunnel_and_open_streams_continue<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut old = fixture.connect().await;
    E::retire_destination(&fixture.pool, &fixture.key.destination);
    assert_eq!(E::usable_tunnels(&fixture.pool), 0);
    let mut new = fixture.connect().await;
    assert_eq!(
        (
            fixture.sockets.dials.get(),
            E::usable_tunnels(&fixture.pool)
        ),
        (2, 1)
    );
    assert_relays(&mut old, b"old").await;
    assert_relays(&mut new, b"new").await;
    E::retire_destination(&fixture.pool, "cluster//Pod/b/other/1");
    assert_eq!(E::usable_tunnels(&fixture.pool), 1);
}

pub async fn drained_server_sends_goaway_and_open_streams_continue<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let mut old = fixture.connect().await;
    assert_relays(&mut old, b"before").await;
    fixture.drain.cancel();
    fixture.drain = tokio_util::sync::CancellationToken::new();
    // A new tunnel's server is drained from the start. A stream on it is rejected or answered, never left without a
    // response.
    wait_until(|| fixture.connections.get() == 1).await;
    assert_relays(&mut old, b"after").await;
    let refused = loop {
        match fixture.open().await {
            Ok(mut stream) => match E::response(&mut stream).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => break error,
            },
            Err(error) => break error,
        }
    };
    assert!(refused.is_retryable(), "{refused:?}");
    assert_relays(&mut old, b"still").await;
    drop((old.downstream, old.upstream));
    assert!(matches!(
        old.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    assert_eq!(
        fixture.serve_summaries.recv().await.unwrap().outcome,
        ServeOutcome::Drained
    );
}

pub async fn tunnel_over_its_max_age_is_retired_and_open_streams_continue<E: Engine>() {
    let config = PoolConfig {
        max_age: SHORT_LIFETIME,
        ..PoolConfig::default()
    };
    let mut fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let mut old = fixture.connect().await;
    wait_until(|| E::usable_tunnels(&fixture.pool) == 0).await;
    let mut new = fixture.connect().await;
    assert_eq!(fixture.sockets.dials.get(), 2);
    assert_relays(&mut old, b"still").await;
    assert_relays(&mut new, b"again").await;
    drop((old.downstream, old.upstream));
    assert!(matches!(
        old.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    // It closes with its last stream.
    assert_eq!(
        fixture.serve_summaries.recv().await.unwrap().outcome,
        ServeOutcome::ClosedByPeer
    );
}

const DENIED: Rejected = Rejected {
    status: 401,
    reason: "denied",
};

pub async fn server_sends_goaway_at_max_age_and_open_streams_continue<E: Engine>() {
    let serve = ServeConfig {
        max_age: SHORT_LIFETIME,
        ..ServeConfig::default()
    };
    let mut fixture = Fixture::<E>::with_config(PoolConfig::default(), serve).await;
    let mut old = fixture.connect().await;
    let accept = fixture.service.decide.replace(Rc::new(|_, _| Err(DENIED)));
    while fixture.sockets.dials.get() < 2 {
        let mut stream = fixture.open().await.unwrap();
        let refused = E::response(&mut stream).await.unwrap_err();
        // A request that crosses the GOAWAY was not processed; the next one uses a new tunnel.
        let has_crossed_goaway = refused.reason() == Reason::GoAway && refused.is_retryable();
        assert!(
            has_crossed_goaway || refused.reason() == Reason::ConnectRejected(401),
            "{refused:?}"
        );
    }
    fixture.service.decide.replace(accept);
    let mut new = fixture.connect().await;
    assert_relays(&mut old, b"still").await;
    assert_relays(&mut new, b"again").await;
    drop((old.downstream, old.upstream));
    assert!(matches!(
        old.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    assert_eq!(
        fixture.serve_summaries.recv().await.unwrap().outcome,
        ServeOutcome::Drained
    );
}

pub async fn idle_tunnel_is_closed_and_a_silent_stream_keeps_its_tunnel<E: Engine>() {
    let config = PoolConfig {
        idle_timeout: SHORT_LIFETIME,
        ping_interval: Duration::from_millis(20),
        ..PoolConfig::default()
    };
    let mut fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let mut c = fixture.connect().await;
    tokio::time::sleep(2 * SHORT_LIFETIME).await;
    assert_relays(&mut c, b"after a silence").await;
    drop((c.downstream, c.upstream));
    assert!(matches!(
        c.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    wait_until(|| E::usable_tunnels(&fixture.pool) == 0).await;
    assert_eq!(
        fixture.serve_summaries.recv().await.unwrap().outcome,
        ServeOutcome::ClosedByPeer
    );
}

pub async fn stream_opened_before_the_idle_timeout_keeps_the_tunnel<E: Engine>() {
    const IDLE: Duration = Duration::from_millis(400);
    let config = PoolConfig {
        idle_timeout: IDLE,
        ..PoolConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let c = fixture.connect().await;
    drop((c.downstream, c.upstream));
    c.relay.await.unwrap();
    tokio::time::sleep(IDLE / 4).await;
    let mut late = fixture.connect().await;
    tokio::time::sleep(IDLE).await;
    assert_eq!(E::usable_tunnels(&fixture.pool), 1);
    assert_relays(&mut late, b"x").await;
}

pub async fn broken_tunnel_resets_its_applications<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = std::mem::replace(&mut fixture.key.address, listener.local_addr().unwrap());
    let wire = spawn_local(async move {
        let mut here = listener.accept().await.unwrap().0;
        let mut there = TcpStream::connect(to).await.unwrap();
        here.set_zero_linger().unwrap();
        there.set_zero_linger().unwrap();
        tokio::io::copy_bidirectional(&mut here, &mut there).await
    });
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    wire.abort();
    assert_receives_reset(&mut c.downstream).await;
    assert_receives_reset(&mut c.upstream).await;
    let summary = c.relay.await.unwrap();
    let RelayOutcome::Failed(error) = summary.outcome else {
        panic!("{summary:?}")
    };
    assert_eq!(error.reason(), Reason::TunnelClosed);
    let summary = fixture.upstream_summaries.recv().await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Failed(_)),
        "{summary:?}"
    );
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.error.unwrap().reason(), Reason::TunnelClosed);
    wait_until(|| E::usable_tunnels(&fixture.pool) == 0).await;
}

pub async fn aborted_server_resets_its_applications<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    fixture.abort.cancel();
    assert_receives_reset(&mut c.downstream).await;
    assert_receives_reset(&mut c.upstream).await;
    assert!(matches!(
        c.relay.await.unwrap().outcome,
        RelayOutcome::Failed(_)
    ));
    let summary = fixture.upstream_summaries.recv().await.unwrap();
    let RelayOutcome::Failed(error) = summary.outcome else {
        panic!("{summary:?}")
    };
    assert_eq!(error.reason(), Reason::Stopped);
    assert_eq!(
        fixture.serve_summaries.recv().await.unwrap().outcome,
        ServeOutcome::Aborted
    );
}

pub async fn closing_pool_waits_for_open_streams_and_rejects_new_ones<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut c = fixture.connect().await;
    let pool = Rc::clone(&fixture.pool);
    let close = spawn_local(async move {
        E::close(&pool, Instant::now() + Duration::from_secs(30)).await;
    });
    wait_until(|| E::usable_tunnels(&fixture.pool) == 0).await;
    assert_eq!(
        fixture.open().await.err().unwrap().reason(),
        Reason::Draining
    );
    assert_relays(&mut c, b"still here").await;
    assert!(!close.is_finished());
    drop((c.downstream, c.upstream));
    assert!(matches!(
        c.relay.await.unwrap().outcome,
        RelayOutcome::Closed
    ));
    close.await.unwrap();
}

pub async fn closing_pool_resets_streams_at_its_deadline<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    E::close(&fixture.pool, Instant::now() + Duration::from_millis(50)).await;
    assert_receives_reset(&mut c.downstream).await;
    assert_receives_reset(&mut c.upstream).await;
    let summary = c.relay.await.unwrap();
    let RelayOutcome::Failed(error) = summary.outcome else {
        panic!("{summary:?}")
    };
    assert_eq!(error.reason(), Reason::Stopped);
}
