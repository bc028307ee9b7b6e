//! When a pool dials a tunnel, shares it, or opens another.

use std::rc::Rc;
use std::sync::Arc;

use hbone::{PoolConfig, PoolKey, Reason, ServeConfig};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

use crate::certs::{SERVER, id};
use crate::engine::Engine;
use crate::fixture::{Fixture, Path, wait_until};

fn concurrent_opens<E: Engine>(
    fixture: &Fixture<E>,
    n: usize,
) -> JoinSet<Result<E::Stream, hbone::Error>> {
    let mut opens = JoinSet::new();
    for _ in 0..n {
        let (pool, key, tls) = (
            Rc::clone(&fixture.pool),
            fixture.key.clone(),
            fixture.tls.clone(),
        );
        let request = fixture.request();
        opens.spawn_local(async move { E::open(&pool, &key, &[id(SERVER)], &tls, request).await });
    }
    opens
}

pub async fn concurrent_opens_share_one_dial<E: Engine>() {
    let config = PoolConfig {
        max_preconnect_tunnels_per_peer: 1,
        ..PoolConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let streams: Vec<_> = concurrent_opens(&fixture, 50).join_all().await;
    assert!(streams.iter().all(Result::is_ok));
    assert_eq!(
        (
            fixture.sockets.dials.get(),
            E::usable_tunnels(&fixture.pool)
        ),
        (1, 1)
    );
}

pub async fn concurrent_opens_share_the_failure_of_a_dial<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    fixture.stop_listening().await;
    let failures: Vec<_> = concurrent_opens(&fixture, 50).join_all().await;
    for failure in failures {
        assert_eq!(failure.err().unwrap().reason(), Reason::ConnectRefused);
    }
    assert_eq!(fixture.sockets.dials.get(), 1);
    // The next call dials again.
    assert!(fixture.open().await.is_err());
    assert_eq!(fixture.sockets.dials.get(), 2);
}

pub async fn dial_continues_when_its_first_caller_is_dropped<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut first = concurrent_opens(&fixture, 1);
    wait_until(|| fixture.sockets.dials.get() == 1).await;
    first.shutdown().await;
    fixture.open().await.unwrap();
    assert_eq!(fixture.sockets.dials.get(), 1);
}

pub async fn stream_limit_of_the_peer_is_respected<E: Engine>() {
    let serve = ServeConfig {
        max_streams: 3,
        ..ServeConfig::default()
    };
    let fixture = Fixture::<E>::with_config(PoolConfig::default(), serve).await;
    let mut streams: Vec<_> = concurrent_opens(&fixture, 10)
        .join_all()
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    for stream in &mut streams {
        E::response(stream).await.unwrap();
    }
    assert_eq!(E::usable_tunnels(&fixture.pool), 4);
}

pub async fn open_fails_at_once_when_all_tunnels_are_full<E: Engine>() {
    let config = PoolConfig {
        max_streams_per_tunnel: 2,
        max_tunnels_per_peer: 2,
        ..PoolConfig::default()
    };
    let fixture = Fixture::<E>::with_config(config, ServeConfig::default()).await;
    let streams: Vec<_> = concurrent_opens(&fixture, 4).join_all().await;
    assert!(streams.iter().all(Result::is_ok));
    let full = fixture.open().await.err().unwrap();
    assert_eq!(full.reason(), Reason::TooManyStreams);
    drop(streams);
    wait_until_open(&fixture).await;
}

async fn wait_until_open<E: Engine>(fixture: &Fixture<E>) {
    while fixture.open().await.is_err() {
        tokio::task::yield_now().await;
    }
}

pub async fn workloads_at_one_address_do_not_share_a_tunnel<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let _first = fixture.open().await.unwrap();
    let key = PoolKey {
        destination: Arc::from("cluster//Pod/b/server/2"),
        ..fixture.key.clone()
    };
    let _second = E::open(
        &fixture.pool,
        &key,
        &[id(SERVER)],
        &fixture.tls,
        fixture.request(),
    )
    .await;
    assert_eq!(E::usable_tunnels(&fixture.pool), 2);
}

pub async fn busy_tunnel_causes_a_preconnect<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut c = fixture.connect().await;
    assert_eq!(E::usable_tunnels(&fixture.pool), 1);
    let send = async {
        let data = vec![0; 16 * 1024 * 1024];
        c.downstream.write_all(&data).await.unwrap();
        c.downstream.shutdown().await.unwrap();
    };
    let mut sink = tokio::io::sink();
    let (_, n) = tokio::join!(send, tokio::io::copy(&mut c.upstream, &mut sink));
    assert_eq!(n.unwrap(), 16 * 1024 * 1024);
    let _stream = fixture.open().await.unwrap();
    wait_until(|| E::usable_tunnels(&fixture.pool) == 2).await;
}
