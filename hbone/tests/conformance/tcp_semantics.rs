//! A relay preserves TCP semantics: order, FIN, reset and back-pressure.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hbone::{RelayOpts, RelayOutcome, RelaySummary, Side};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{Connection, Path, wait_until};

/// Bytes whose order can be checked.
pub fn test_pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i % 251).to_le_bytes()[0] ^ (i / 65536).to_le_bytes()[0])
        .collect()
}

fn assert_reset(by: Side, summary: &RelaySummary) {
    assert!(
        matches!(summary.outcome, RelayOutcome::Reset { by: actual } if actual == by),
        "{summary:?}"
    );
}

pub async fn assert_receives_reset(socket: &mut TcpStream) {
    let mut rest = Vec::new();
    let error = socket
        .read_to_end(&mut rest)
        .await
        .expect_err("received a FIN instead of a reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Checks that bytes are relayed in both directions.
pub async fn assert_relays(c: &mut Connection, bytes: &[u8]) {
    c.downstream.write_all(bytes).await.unwrap();
    let mut buffer = vec![0; bytes.len()];
    c.upstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(buffer, bytes);
    c.upstream.write_all(bytes).await.unwrap();
    c.downstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(buffer, bytes);
}

pub async fn bytes_are_relayed_and_counted_in_both_directions<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    c.downstream.write_all(b"question").await.unwrap();
    let mut buffer = [0; 8];
    c.upstream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"question");
    c.upstream.write_all(b"an").await.unwrap();
    c.downstream.read_exact(&mut buffer[..2]).await.unwrap();
    let counted = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    wait_until(|| (counted(&c.counters.sent), counted(&c.counters.received)) == (8, 2)).await;
    drop((c.downstream, c.upstream));
    let summary = c.relay.await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Closed),
        "{summary:?}"
    );
    assert_eq!((summary.sent, summary.received), (8, 2));
}

pub async fn bulk_data_is_unchanged_in_both_directions_at_once<P: Path>() {
    const BULK_BYTES: usize = 24 * 1024 * 1024;
    let fixture = P::new().await;
    let c = fixture.connect().await;
    let data = test_pattern(BULK_BYTES);
    let through = async |socket: TcpStream| {
        let (mut read, mut write) = socket.into_split();
        let send = async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let mut got = Vec::with_capacity(BULK_BYTES);
        let (_, n) = tokio::join!(send, read.read_to_end(&mut got));
        assert_eq!(n.unwrap(), BULK_BYTES);
        assert!(got == data, "the received bytes differ");
    };
    tokio::join!(through(c.downstream), through(c.upstream));
    let summary = c.relay.await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Closed),
        "{summary:?}"
    );
    assert_eq!(
        (summary.sent, summary.received),
        (BULK_BYTES as u64, BULK_BYTES as u64)
    );
}

pub async fn server_can_send_first<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    c.upstream.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    c.downstream.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

pub async fn downstream_fin_is_relayed_and_upstream_can_still_send<P: Path>() {
    let fixture = P::new().await;
    let c = fixture.connect().await;
    assert_half_close(c.downstream, c.upstream).await;
    let summary = c.relay.await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Closed),
        "{summary:?}"
    );
}

pub async fn upstream_fin_is_relayed_and_downstream_can_still_send<P: Path>() {
    let fixture = P::new().await;
    let c = fixture.connect().await;
    assert_half_close(c.upstream, c.downstream).await;
    let summary = c.relay.await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Closed),
        "{summary:?}"
    );
}

/// `first` sends FIN; `second` receives it and sends bulk data afterwards.
async fn assert_half_close(mut first: TcpStream, mut second: TcpStream) {
    const BULK_BYTES: usize = 8 * 1024 * 1024;
    first.write_all(b"last bytes").await.unwrap();
    first.shutdown().await.unwrap();
    let mut received = Vec::new();
    second.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"last bytes");
    let data = test_pattern(BULK_BYTES);
    let send = async {
        second.write_all(&data).await.unwrap();
        drop(second);
    };
    let mut got = Vec::new();
    let (_, n) = tokio::join!(send, first.read_to_end(&mut got));
    assert_eq!(n.unwrap(), BULK_BYTES);
    assert!(got == data, "the received bytes differ");
}

pub async fn downstream_reset_resets_upstream<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    reset(c.downstream);
    assert_receives_reset(&mut c.upstream).await;
    assert_reset(Side::Downstream, &c.relay.await.unwrap());
}

pub async fn upstream_reset_resets_downstream<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    reset(c.upstream);
    assert_receives_reset(&mut c.downstream).await;
    assert_reset(Side::Upstream, &c.relay.await.unwrap());
}

pub async fn bytes_sent_before_a_reset_are_delivered<P: Path>() {
    let fixture = P::new().await;
    for from_upstream in [true, false] {
        let mut c = fixture.connect().await;
        assert_relays(&mut c, b"x").await;
        let (mut from, mut to) = (c.downstream, c.upstream);
        if from_upstream {
            std::mem::swap(&mut from, &mut to);
        }
        from.write_all(b"last bytes").await.unwrap();
        reset(from);
        let mut received = [0; 10];
        to.read_exact(&mut received).await.unwrap();
        assert_eq!(&received, b"last bytes");
        assert_receives_reset(&mut to).await;
    }
}

pub async fn response_of_a_server_that_closes_with_unread_bytes_is_delivered<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    let upload = test_pattern(1024 * 1024);
    let mut started = [0; 1];
    let (sent, _) = tokio::join!(
        c.downstream.write_all(&upload),
        c.upstream.read_exact(&mut started)
    );
    sent.unwrap();
    c.upstream.write_all(b"413 too large").await.unwrap();
    // With unread bytes in its buffer the kernel sends RST instead of FIN.
    drop(c.upstream);
    let mut answer = [0; 13];
    c.downstream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"413 too large");
    assert_receives_reset(&mut c.downstream).await;
}

pub async fn reset_is_detected_while_the_reader_stalls<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    let written = fill_buffers(&mut c).await;
    assert!(written > 0);
    reset(c.downstream);
    assert_reset(Side::Downstream, &c.relay.await.unwrap());
    assert_receives_reset(&mut c.upstream).await;
}

pub async fn downstream_reset_after_fin_is_detected<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    c.downstream.shutdown().await.unwrap();
    assert_eq!(c.upstream.read(&mut [0; 1]).await.unwrap(), 0);
    reset(c.downstream);
    assert_reset(Side::Downstream, &c.relay.await.unwrap());
    // The upstream has read the FIN already; the kernel reports the reset at the next check of the socket's error.
    wait_until(|| c.upstream.take_error().unwrap().is_some()).await;
}

pub async fn upstream_reset_after_fin_is_detected<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    c.upstream.shutdown().await.unwrap();
    assert_eq!(c.downstream.read(&mut [0; 1]).await.unwrap(), 0);
    reset(c.upstream);
    assert_reset(Side::Upstream, &c.relay.await.unwrap());
    wait_until(|| c.downstream.take_error().unwrap().is_some()).await;
}

pub async fn stalled_reader_blocks_its_writer_and_loses_no_bytes<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    let written = fill_buffers(&mut c).await;
    // The stream's window, and the buffers of five sockets.
    assert!(
        written < 64 * 1024 * 1024,
        "{written} bytes were accepted while the reader was stalled"
    );
    c.downstream.shutdown().await.unwrap();
    let mut got = Vec::new();
    c.upstream.read_to_end(&mut got).await.unwrap();
    assert_eq!(got.len(), written);
    assert!(got == test_pattern(written), "the received bytes differ");
}

pub async fn stop_resets_both_sides_and_reports_its_reason<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    let stop = c.stop.clone();
    std::thread::spawn(move || stop.stop("policy_changed"))
        .join()
        .unwrap();
    assert_receives_reset(&mut c.downstream).await;
    assert_receives_reset(&mut c.upstream).await;
    let summary = c.relay.await.unwrap();
    assert!(
        matches!(
            summary.outcome,
            RelayOutcome::Stopped {
                reason: "policy_changed"
            }
        ),
        "{summary:?}"
    );
}

pub async fn dropped_relay_resets_both_sides<P: Path>() {
    let fixture = P::new().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
    c.relay.abort();
    assert_receives_reset(&mut c.downstream).await;
    assert_receives_reset(&mut c.upstream).await;
}

pub async fn prefix_is_sent_first_and_not_counted<P: Path>() {
    let fixture = P::new().await;
    let opts = RelayOpts {
        prefix: b"PROXY ".to_vec(),
        ..RelayOpts::default()
    };
    let counters = Arc::clone(&opts.counters);
    let mut c = fixture.connect_with(opts).await;
    c.downstream.write_all(b"hello").await.unwrap();
    let mut got = [0; 11];
    c.upstream.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"PROXY hello");
    wait_until(|| counters.sent.load(Ordering::Relaxed) == 5).await;
}

/// Closes a socket with RST.
pub fn reset(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
}

/// Writes downstream until every buffer of the path is full. Returns the number of bytes written.
pub async fn fill_buffers(c: &mut Connection) -> usize {
    let piece = test_pattern(256 * 1024 * 251);
    let mut written = 0;
    loop {
        match c.downstream.try_write(&piece[written..]) {
            Ok(n) => written += n,
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        assert!(written < piece.len());
        let before = c.counters.sent.load(Ordering::Relaxed);
        let quiet = std::time::Duration::from_millis(300);
        let writable = tokio::time::timeout(quiet, c.downstream.writable()).await;
        if writable.is_err() && c.counters.sent.load(Ordering::Relaxed) == before {
            return written;
        }
    }
}
