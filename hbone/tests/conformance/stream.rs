//! Requests and responses of a stream: rejection, optimistic data, cancellation, and the byte-stream interface.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hbone::{Counters, Reason, Rejected, RelayOpts, RelayOutcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_local;

use crate::engine::Engine;
use crate::fixture::{Fixture, Path, socket_pair, wait_until};
use crate::tcp_semantics::{assert_receives_reset, test_pattern};

pub async fn rejection_reports_its_status_and_resets_the_application<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let denied = Rejected {
        status: 401,
        reason: "policy_denied",
    };
    *fixture.service.decide.borrow_mut() = Rc::new(move |_, _| Err(denied));
    let mut stream = fixture.open().await.unwrap();
    let error = E::response(&mut stream).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectRejected(401));
    assert!(!error.is_retryable());
    let (mut downstream, relayed) = socket_pair().await;
    let summary = E::relay(stream, relayed, RelayOpts::default()).await;
    let RelayOutcome::Failed(error) = summary.outcome else {
        panic!("{summary:?}")
    };
    assert_eq!(error.reason(), Reason::ConnectRejected(401));
    assert_receives_reset(&mut downstream).await;
    // The tunnel remains usable.
    assert_eq!(E::usable_tunnels(&fixture.pool), 1);
}

pub async fn optimistic_relay_sends_before_the_response<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let relay = async |optimistic| {
        let (mut downstream, relayed) = socket_pair().await;
        downstream.write_all(b"early").await.unwrap();
        let opts = RelayOpts {
            optimistic,
            ..RelayOpts::default()
        };
        let counters = Arc::clone(&opts.counters);
        let relay = spawn_local(E::relay(fixture.open().await.unwrap(), relayed, opts));
        (downstream, counters, relay)
    };
    let waiting = relay(false).await;
    let optimistic = relay(true).await;
    let sent = |counters: &Counters| counters.sent.load(Ordering::Relaxed);
    wait_until(|| sent(&optimistic.1) == 5).await;
    assert_eq!(sent(&waiting.1), 0);
    waiting.2.abort();
    optimistic.2.abort();
}

pub async fn client_reset_cancels_the_decision<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let stream = fixture.open().await.unwrap();
    wait_until(|| fixture.service.pending.get() == 1).await;
    drop(stream);
    wait_until(|| fixture.service.pending.get() == 0).await;
}

pub async fn into_io_relays_bytes_in_both_directions<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut io = E::into_io(fixture.open().await.unwrap());
    let mut upstream = fixture.upstream().await;
    let data = test_pattern(8 * 1024 * 1024);
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
