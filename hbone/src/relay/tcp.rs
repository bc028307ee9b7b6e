//! How bytes move between two TCP sockets.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io::Write;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use bytes::Buf;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::yield_now;
use tokio_util::io::poll_write_buf;

use super::buffer::{Chunk, READ_BUFFER_BYTES};
use super::socket::{READS_PER_YIELD, ResetOnDrop, read_available, shutdown_write, wait_for_reset};
use super::{RelayOpts, RelayOutcome, RelaySummary, Side};

/// Moves bytes between two TCP sockets until both directions have closed, and preserves TCP semantics.
pub async fn relay_tcp(
    downstream: TcpStream,
    upstream: TcpStream,
    opts: RelayOpts,
) -> RelaySummary {
    let RelayOpts {
        counters,
        stop,
        prefix,
        ..
    } = opts;
    let (mut down, mut up) = (ResetOnDrop::new(downstream), ResetOnDrop::new(upstream));
    let (uplink_state, downlink_state) = (State::default(), State::default());
    let outcome = {
        let ((down_read, down_write), (up_read, up_write)) = (down.split(), up.split());
        let uplink = Direction {
            from: down_read,
            to: up_write,
            source: Side::Downstream,
            counter: &counters.sent,
            state: &uplink_state,
        };
        let downlink = Direction {
            from: up_read,
            to: down_write,
            source: Side::Upstream,
            counter: &counters.received,
            state: &downlink_state,
        };
        let mut uplink = pin!(uplink.run(prefix));
        let mut downlink = pin!(downlink.run(Vec::new()));
        let mut stopped = pin!(stop.stopped());
        poll_fn(|cx| {
            if let Poll::Ready(reason) = stopped.as_mut().poll(cx) {
                return Poll::Ready(RelayOutcome::Stopped { reason });
            }
            for direction in [
                uplink.as_mut() as Pin<&mut dyn Future<Output = Side>>,
                downlink.as_mut(),
            ] {
                if let Poll::Ready(by) = direction.poll(cx) {
                    return Poll::Ready(RelayOutcome::Reset { by });
                }
            }
            let is_closed = uplink_state.is_done.get() && downlink_state.is_done.get();
            if is_closed {
                Poll::Ready(RelayOutcome::Closed)
            } else {
                Poll::Pending
            }
        })
        .await
    };
    match outcome {
        RelayOutcome::Closed => {
            down.finish();
            up.finish();
        }
        RelayOutcome::Reset {
            by: Side::Downstream,
        } if !uplink_state.has_pending.get() => {
            flush_before_reset(&down, &up, &counters.sent);
        }
        RelayOutcome::Reset { by: Side::Upstream } if !downlink_state.has_pending.get() => {
            flush_before_reset(&up, &down, &counters.received);
        }
        _ => {}
    }
    RelaySummary::new(&counters, outcome)
}

/// Passes on what `from` sent before its reset, as would happen without a relay. Example: the response of a server that
/// closes without reading the rest of an upload. Limited to what the kernel accepts for `to` without waiting.
fn flush_before_reset(from: &TcpStream, to: &TcpStream, counter: &AtomicU64) {
    let mut buffer = [0; 16 * 1024];
    loop {
        let read = read_available(from, &mut buffer);
        // Writes to the socket directly, for the reason given at `read_available`.
        let written = (&*SockRef::from(to)).write(&buffer[..read]).unwrap_or(0);
        counter.fetch_add(written as u64, Ordering::Relaxed);
        if read == 0 || written < read {
            return;
        }
    }
}

/// Progress of one direction.
#[derive(Default)]
struct State {
    /// Bytes were read and are not all written.
    has_pending: Cell<bool>,
    /// FIN has been passed on.
    is_done: Cell<bool>,
}

/// One direction of a relay.
struct Direction<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    /// The side of `from`.
    source: Side,
    counter: &'a AtomicU64,
    state: &'a State,
}

impl Direction<'_> {
    /// Resolves only when the connection breaks, with the side that broke it.
    async fn run(mut self, prefix: Vec<u8>) -> Side {
        if let Err(side) = self.write(Chunk::from(prefix), &AtomicU64::new(0)).await {
            return side;
        }
        let mut reads = 0;
        loop {
            let from = &mut self.from;
            let read = poll_fn(|cx| Chunk::poll_read(Pin::new(from), cx, READ_BUFFER_BYTES));
            let Ok(chunk) = read.await else {
                return self.source;
            };
            if !chunk.has_remaining() {
                break;
            }
            if let Err(side) = self.write(chunk, self.counter).await {
                return side;
            }
            reads += 1;
            if reads % READS_PER_YIELD == 0 {
                yield_now().await;
            }
        }
        if shutdown_write(self.to.as_ref()).is_err() {
            return self.source.opposite();
        }
        self.state.is_done.set(true);
        wait_for_reset(self.from.as_ref()).await;
        self.source
    }

    /// Writes all of `chunk`. Also detects a reset of the source, which is not read meanwhile.
    async fn write(&mut self, mut chunk: Chunk, counter: &AtomicU64) -> Result<(), Side> {
        let Self {
            from,
            to,
            source,
            state,
            ..
        } = self;
        let mut reset = pin!(wait_for_reset(from.as_ref()));
        state.has_pending.set(chunk.has_remaining());
        while chunk.has_remaining() {
            let written = poll_fn(|cx| match poll_write_buf(Pin::new(to), cx, &mut chunk) {
                Poll::Ready(Ok(n)) => Poll::Ready(Ok(n)),
                Poll::Ready(Err(_)) => Poll::Ready(Err(source.opposite())),
                Poll::Pending => reset.as_mut().poll(cx).map(|_| Err(*source)),
            });
            counter.fetch_add(written.await? as u64, Ordering::Relaxed);
        }
        state.has_pending.set(false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each open plain connection costs at least this.
    #[test]
    fn plain_relay_future_is_at_most_2_kib() {
        fn size<F: Future>(_: impl FnOnce(TcpStream, TcpStream, RelayOpts) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(relay_tcp);
        assert!(size <= 2048, "{size} bytes");
    }
}
