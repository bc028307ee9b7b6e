//! TCP semantics pass through exactly.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hbone::{RelayOpts, RelayOutcome, RelaySummary, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Connection, Way, until};

/// Bytes whose order shows.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i % 251).to_le_bytes()[0] ^ (i / 65536).to_le_bytes()[0])
        .collect()
}

fn assert_reset(by: Side, end: &RelaySummary) {
    assert!(
        matches!(end.outcome, RelayOutcome::Reset { by: actual } if actual == by),
        "{end:?}"
    );
}

pub async fn assert_reset_seen(socket: &mut TcpStream) {
    let mut rest = Vec::new();
    let error = socket
        .read_to_end(&mut rest)
        .await
        .expect_err("a FIN instead of a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

pub async fn ask(c: &mut Connection, question: &[u8]) {
    c.downstream.write_all(question).await.unwrap();
    let mut buffer = vec![0; question.len()];
    c.upstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(buffer, question);
    c.upstream.write_all(question).await.unwrap();
    c.downstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(buffer, question);
}

pub async fn bytes_arrive_in_order_and_are_counted_in_both_directions<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    c.downstream.write_all(b"question").await.unwrap();
    let mut buffer = [0; 8];
    c.upstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"question");
    c.upstream.write_all(b"an").await.unwrap();
    c.downstream.read_exact(&mut buffer[..2]).await.unwrap();
    let counted = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    until(|| (counted(&c.counters.sent), counted(&c.counters.received)) == (8, 2)).await;
    drop((c.downstream, c.upstream));
    let end = c.relay.await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Closed), "{end:?}");
    assert_eq!((end.sent, end.received), (8, 2));
}

pub async fn much_data_arrives_unchanged_in_both_directions_at_once<W: Way>() {
    const MUCH: usize = 24 * 1024 * 1024;
    let world = W::new().await;
    let c = world.connect().await;
    let data = pattern(MUCH);
    let through = async |socket: TcpStream| {
        let (mut read, mut write) = socket.into_split();
        let send = async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut got = Vec::with_capacity(MUCH);
        let (_, n) = tokio::join!(send, read.read_to_end(&mut got));
        assert_eq!(n.unwrap(), MUCH);
        assert!(got == data, "the bytes have changed");
    };
    tokio::join!(through(c.downstream), through(c.upstream));
    let end = c.relay.await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Closed), "{end:?}");
    assert_eq!((end.sent, end.received), (MUCH as u64, MUCH as u64));
}

pub async fn the_server_may_speak_first<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    c.upstream.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    c.downstream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

pub async fn a_fin_passes_and_the_other_direction_stays_open<W: Way>() {
    let world = W::new().await;
    let c = world.connect().await;
    half_close(c.downstream, c.upstream).await;
    let end = c.relay.await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Closed), "{end:?}");
}

pub async fn a_fin_of_the_upstream_passes_and_the_downstream_may_go_on<W: Way>() {
    let world = W::new().await;
    let c = world.connect().await;
    half_close(c.upstream, c.downstream).await;
    let end = c.relay.await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Closed), "{end:?}");
}

/// `first` closes its direction; `second` sees that, and sends much afterwards.
async fn half_close(mut first: TcpStream, mut second: TcpStream) {
    const MUCH: usize = 8 * 1024 * 1024;
    first.write_all(b"last words").await.unwrap();
    first.shutdown().await.unwrap();
    let mut words = Vec::new();
    second.read_to_end(&mut words).await.unwrap();
    assert_eq!(words, b"last words");
    let data = pattern(MUCH);
    let send = async {
        second.write_all(&data).await.unwrap();
        drop(second);
    };
    let mut got = Vec::new();
    let (_, n) = tokio::join!(send, first.read_to_end(&mut got));
    assert_eq!(n.unwrap(), MUCH);
    assert!(got == data, "the bytes have changed");
}

pub async fn a_reset_of_the_downstream_reaches_the_upstream<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    reset(c.downstream);
    assert_reset_seen(&mut c.upstream).await;
    assert_reset(Side::Downstream, &c.relay.await.unwrap());
}

pub async fn a_reset_of_the_upstream_reaches_the_downstream<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    reset(c.upstream);
    assert_reset_seen(&mut c.downstream).await;
    assert_reset(Side::Upstream, &c.relay.await.unwrap());
}

pub async fn what_was_sent_before_a_reset_arrives_before_it<W: Way>() {
    let world = W::new().await;
    for from_upstream in [true, false] {
        let mut c = world.connect().await;
        ask(&mut c, b"x").await;
        let (mut from, mut to) = (c.downstream, c.upstream);
        if from_upstream {
            std::mem::swap(&mut from, &mut to);
        }
        from.write_all(b"last words").await.unwrap();
        reset(from);
        let mut words = [0; 10];
        to.read_exact(&mut words).await.unwrap();
        assert_eq!(&words, b"last words");
        assert_reset_seen(&mut to).await;
    }
}

pub async fn a_server_may_answer_and_close_without_reading_everything<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    let upload = pattern(1024 * 1024);
    let mut started = [0; 1];
    let (sent, _) = tokio::join!(
        c.downstream.write_all(&upload),
        c.upstream.read_exact(&mut started)
    );
    sent.unwrap();
    c.upstream.write_all(b"413 too large").await.unwrap();
    // With unread bytes the kernel sends RST and not FIN.
    drop(c.upstream);
    let mut answer = [0; 13];
    c.downstream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"413 too large");
    assert_reset_seen(&mut c.downstream).await;
}

pub async fn a_reset_is_noticed_while_nobody_takes_the_bytes<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    let written = fill(&mut c).await;
    assert!(written > 0);
    reset(c.downstream);
    assert_reset(Side::Downstream, &c.relay.await.unwrap());
    assert_reset_seen(&mut c.upstream).await;
}

pub async fn a_reset_is_noticed_after_a_fin<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    c.downstream.shutdown().await.unwrap();
    assert_eq!(c.upstream.read(&mut [0; 1]).await.unwrap(), 0);
    reset(c.downstream);
    assert_reset(Side::Downstream, &c.relay.await.unwrap());
    // The upstream has seen the FIN already; the kernel reports the reset to the next one who asks.
    until(|| c.upstream.take_error().unwrap().is_some()).await;
}

pub async fn a_reset_of_the_upstream_is_noticed_after_its_fin<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    c.upstream.shutdown().await.unwrap();
    assert_eq!(c.downstream.read(&mut [0; 1]).await.unwrap(), 0);
    reset(c.upstream);
    assert_reset(Side::Upstream, &c.relay.await.unwrap());
    until(|| c.downstream.take_error().unwrap().is_some()).await;
}

pub async fn a_reader_that_stalls_stops_its_writer_and_loses_nothing<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    let written = fill(&mut c).await;
    // The stream's window, and what five sockets hold at most.
    assert!(
        written < 64 * 1024 * 1024,
        "{written} bytes were taken for one that reads nothing"
    );
    c.downstream.shutdown().await.unwrap();
    let mut got = Vec::new();
    c.upstream.read_to_end(&mut got).await.unwrap();
    assert_eq!(got.len(), written);
    assert!(got == pattern(written), "the bytes have changed");
}

pub async fn a_stop_resets_both_sides_and_gives_its_reason<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    let stop = c.stop.clone();
    std::thread::spawn(move || stop.stop("policy_changed"))
        .join()
        .unwrap();
    assert_reset_seen(&mut c.downstream).await;
    assert_reset_seen(&mut c.upstream).await;
    let end = c.relay.await.unwrap();
    assert!(
        matches!(
            end.outcome,
            RelayOutcome::Stopped {
                reason: "policy_changed"
            }
        ),
        "{end:?}"
    );
}

pub async fn a_relay_that_is_dropped_resets_both_sides<W: Way>() {
    let world = W::new().await;
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
    c.relay.abort();
    assert_reset_seen(&mut c.downstream).await;
    assert_reset_seen(&mut c.upstream).await;
}

pub async fn the_prefix_goes_first_and_is_not_counted<W: Way>() {
    let world = W::new().await;
    let opts = RelayOpts {
        prefix: b"PROXY ".to_vec(),
        ..RelayOpts::default()
    };
    let counters = Arc::clone(&opts.counters);
    let mut c = world.connect_with(opts).await;
    c.downstream.write_all(b"hello").await.unwrap();
    let mut got = [0; 11];
    c.upstream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"PROXY hello");
    until(|| counters.sent.load(Ordering::Relaxed) == 5).await;
}

pub fn reset(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
}

/// Writes downstream until nothing on the whole way takes any more.
pub async fn fill(c: &mut Connection) -> usize {
    let piece = pattern(256 * 1024 * 251);
    let mut written = 0;
    loop {
        match c.downstream.try_write(&piece[written..]) {
            Ok(n) => written += n,
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        assert!(written < piece.len());
        let before = c.counters.sent.load(Ordering::Relaxed);
        let patience = std::time::Duration::from_millis(300);
        let writable = tokio::time::timeout(patience, c.downstream.writable()).await;
        if writable.is_err() && c.counters.sent.load(Ordering::Relaxed) == before {
            return written;
        }
    }
}
