//! TCP to TCP, and what both kinds of relay do with an application's socket.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use bytes::Buf;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::yield_now;
use tokio_util::io::poll_write_buf;

use super::buffer::{Chunk, LARGE};
use super::{RelayOpts, RelayOutcome, RelaySummary, Side};

/// Reads of one direction before the other connections of the thread get their turn.
pub(crate) const READS_PER_TURN: usize = 4;

/// An application's socket that closes with RST, unless the relay has ended in good order.
///
/// So whatever goes wrong, and also if the relay is dropped half-way, the application never takes a broken connection
/// for one that has ended.
pub(crate) struct ResetOnDrop {
    tcp: TcpStream,
    finished: bool,
}

impl ResetOnDrop {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        // Best effort: without it small writes are late, not wrong.
        let _slower = tcp.set_nodelay(true);
        Self {
            tcp,
            finished: false,
        }
    }

    /// Both directions have ended with FIN.
    pub(crate) fn finish(mut self) {
        self.finished = true;
    }
}

impl Deref for ResetOnDrop {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.tcp
    }
}

impl DerefMut for ResetOnDrop {
    fn deref_mut(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if !self.finished {
            // Fails only on a socket that is dead already.
            let _dead = self.tcp.set_zero_linger();
        }
    }
}

/// Resolves when the socket has been reset, also while nobody reads it. A FIN is no error.
pub(crate) async fn broken(tcp: &TcpStream) -> io::Error {
    match tcp.ready(Interest::ERROR).await {
        Ok(_) => match tcp.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(),
        },
        Err(error) => error,
    }
}

/// Sends FIN. An application that is gone already has nobody to tell.
pub(crate) fn finish_writing(tcp: &TcpStream) -> io::Result<()> {
    match SockRef::from(tcp).shutdown(std::net::Shutdown::Write) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}

/// Moves bytes between two TCP sockets until both directions have closed, with exact TCP semantics.
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
    let (forth_holds, back_holds) = (Cell::new(false), Cell::new(false));
    let outcome = {
        let ((down_read, down_write), (up_read, up_write)) = (down.split(), up.split());
        let forth = Flow {
            from: down_read,
            to: up_write,
            sides: (Side::Downstream, Side::Upstream),
            counter: &counters.sent,
            holds: &forth_holds,
            done: &Cell::new(false),
        };
        let back = Flow {
            from: up_read,
            to: down_write,
            sides: (Side::Upstream, Side::Downstream),
            counter: &counters.received,
            holds: &back_holds,
            done: &Cell::new(false),
        };
        let done = (forth.done, back.done);
        let mut forth = pin!(forth.run(prefix));
        let mut back = pin!(back.run(Vec::new()));
        let mut stopped = pin!(stop.stopped());
        poll_fn(|cx| {
            if let Poll::Ready(reason) = stopped.as_mut().poll(cx) {
                return Poll::Ready(RelayOutcome::Stopped { reason });
            }
            for flow in [
                forth.as_mut() as Pin<&mut dyn Future<Output = Side>>,
                back.as_mut(),
            ] {
                if let Poll::Ready(by) = flow.poll(cx) {
                    return Poll::Ready(RelayOutcome::Reset { by });
                }
            }
            let closed = done.0.get() && done.1.get();
            if closed {
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
        } if !forth_holds.get() => last_words(&down, &up, &counters.sent),
        RelayOutcome::Reset { by: Side::Upstream } if !back_holds.get() => {
            last_words(&up, &down, &counters.received);
        }
        _ => {}
    }
    RelaySummary::new(&counters, outcome)
}

/// What `from` had sent before it broke the connection goes ahead of the reset, as it does without a relay: an answer,
/// for example, of a server that closes without reading the rest of an upload. Only as much as `to` takes at once.
fn last_words(from: &TcpStream, to: &TcpStream, counter: &AtomicU64) {
    let mut buffer = [0; 16 * 1024];
    loop {
        let read = read_now(from, &mut buffer);
        // Straight to the kernel, as in `read_now`.
        let written = (&*SockRef::from(to)).write(&buffer[..read]).unwrap_or(0);
        counter.fetch_add(written as u64, Ordering::Relaxed);
        if read == 0 || written < read {
            return;
        }
    }
}

/// Reads what the kernel has, 0 bytes if that is nothing. The runtime learns of readiness only when it polls next, and
/// a broken connection is often noticed before that, by a failed write.
pub(crate) fn read_now(from: &TcpStream, buffer: &mut [u8]) -> usize {
    (&*SockRef::from(from)).read(buffer).unwrap_or(0)
}

/// One direction.
struct Flow<'a> {
    from: ReadHalf<'a>,
    to: WriteHalf<'a>,
    sides: (Side, Side),
    counter: &'a AtomicU64,
    /// Set while bytes were read and are not all written.
    holds: &'a Cell<bool>,
    /// Set when FIN has been passed on.
    done: &'a Cell<bool>,
}

impl Flow<'_> {
    /// Resolves only with the side that broke the connection.
    async fn run(mut self, prefix: Vec<u8>) -> Side {
        if let Err(side) = self.write(Chunk::from(prefix), &AtomicU64::new(0)).await {
            return side;
        }
        let mut reads = 0;
        loop {
            let from = &mut self.from;
            let chunk = match poll_fn(|cx| Chunk::poll_read(Pin::new(from), cx, LARGE)).await {
                Ok(chunk) => chunk,
                Err(_) => return self.sides.0,
            };
            if !chunk.has_remaining() {
                break;
            }
            if let Err(side) = self.write(chunk, self.counter).await {
                return side;
            }
            reads += 1;
            if reads % READS_PER_TURN == 0 {
                yield_now().await;
            }
        }
        if finish_writing(self.to.as_ref()).is_err() {
            return self.sides.1;
        }
        self.done.set(true);
        broken(self.from.as_ref()).await;
        self.sides.0
    }

    /// Writes all of `chunk`. Meanwhile nobody reads the other side, which may yet reset the connection.
    async fn write(&mut self, mut chunk: Chunk, counter: &AtomicU64) -> Result<(), Side> {
        let Self {
            from,
            to,
            sides,
            holds,
            ..
        } = self;
        let mut broken = pin!(broken(from.as_ref()));
        holds.set(chunk.has_remaining());
        while chunk.has_remaining() {
            let written = poll_fn(|cx| match poll_write_buf(Pin::new(to), cx, &mut chunk) {
                Poll::Ready(Ok(n)) => Poll::Ready(Ok(n)),
                Poll::Ready(Err(_)) => Poll::Ready(Err(sides.1)),
                Poll::Pending => broken.as_mut().poll(cx).map(|_| Err(sides.0)),
            });
            counter.fetch_add(written.await? as u64, Ordering::Relaxed);
        }
        holds.set(false);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each open plain connection costs at least this.
    #[test]
    fn a_plain_relay_is_a_small_future() {
        fn size<F: Future>(_: impl FnOnce(TcpStream, TcpStream, RelayOpts) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(relay_tcp);
        assert!(size <= 2048, "{size} bytes");
    }
}
