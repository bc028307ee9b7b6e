//! TCP semantics pass through exactly.

use std::sync::atomic::Ordering;

use hbone::{Outcome, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::engine::Engine;
use crate::world::World;

pub async fn bytes_arrive_in_order_and_are_counted_in_both_directions<E: Engine>() {
    let mut world = World::<E>::new().await;
    let mut c = world.connect().await;
    c.downstream.write_all(b"question").await.unwrap();
    let mut buffer = [0; 8];
    c.upstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"question");
    c.upstream.write_all(b"an").await.unwrap();
    c.downstream.read_exact(&mut buffer[..2]).await.unwrap();
    assert_eq!(c.counters.sent.load(Ordering::Relaxed), 8);
    assert_eq!(c.counters.received.load(Ordering::Relaxed), 2);
    drop((c.downstream, c.upstream));
    let end = c.relay.await.unwrap();
    assert!(matches!(end.outcome, Outcome::Closed), "{end:?}");
    assert_eq!((end.sent, end.received), (8, 2));
    let end = world.upstream_ends.recv().await.unwrap();
    assert!(matches!(end.outcome, Outcome::Closed), "{end:?}");
    assert_eq!((end.sent, end.received), (8, 2));
    let _ = Side::Upstream;
}
