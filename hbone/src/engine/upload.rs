//! From an application's socket into a stream.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Buf;
use h2::SendStream;
use tokio::net::tcp::ReadHalf;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::relay::{Broken, LAST_WORDS, Relay};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, Flight, LARGE, READS_PER_TURN, broken};

/// The direction from the application into the stream.
pub(super) struct Upload<'a, 'b> {
    pub(super) relay: &'a Relay<'a>,
    pub(super) read: ReadHalf<'b>,
    pub(super) send: &'a mut SendStream<Chunk>,
    pub(super) flight: &'a Rc<Flight>,
    /// The peer has answered.
    pub(super) answered: &'a Cell<bool>,
    /// The other direction has ended, so that only this one can still notice a reset of the stream.
    pub(super) received_all: &'a Cell<bool>,
}

impl Upload<'_, '_> {
    /// Resolves only with what broke the connection; sets `sent_all` after END_STREAM.
    pub(super) async fn run(mut self, prefix: Vec<u8>, sent_all: &Cell<bool>) -> Broken {
        match self.all(prefix).await {
            Ok(()) => {
                sent_all.set(true);
                // The other direction goes on, and the application may yet reset it without having anything to read.
                broken(self.read.as_ref()).await;
            }
            Err(Broken::App) => {}
            Err(tunnel) => return tunnel,
        }
        // Boxed, because it is rare, and its timer would make every relay larger.
        Box::pin(self.answered()).await;
        Broken::App
    }

    /// Waits a little for the peer's answer, before the stream is reset. A reset that meets a stream before the peer has
    /// looked at it counts against the whole tunnel: h2 and its like end one with a few dozen of them, and with it the
    /// streams of others. So one application could cut off its neighbours by opening and resetting fast.
    async fn answered(&self) {
        // The task wakes for the answer because the other direction waits for it.
        let answered = poll_fn(|_| {
            if self.answered.get() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        let _late = timeout(LAST_WORDS, answered).await;
    }

    async fn all(&mut self, prefix: Vec<u8>) -> Result<(), Broken> {
        if !prefix.is_empty() {
            self.put(Chunk::from(prefix), false)?;
        }
        let mut reads = 0;
        loop {
            poll_fn(|cx| self.poll_readable(cx)).await?;
            let window = self.window().await?;
            let read =
                poll_fn(|cx| Poll::Ready(Chunk::poll_read(Pin::new(&mut self.read), cx, window)));
            let chunk = match read.await {
                // Readiness was a false alarm; the next round waits for the next.
                Poll::Pending => continue,
                Poll::Ready(chunk) => chunk.map_err(|_| Broken::App)?,
            };
            let n = chunk.remaining();
            self.put(chunk, n == 0)?;
            if n == 0 {
                return Ok(());
            }
            self.relay.count(self.relay.counter().0, n);
            reads += 1;
            if reads % READS_PER_TURN == 0 {
                yield_now().await;
            }
        }
    }

    fn put(&mut self, chunk: Chunk, end: bool) -> Result<(), Broken> {
        self.send
            .send_data(self.flight.board(chunk), end)
            .map_err(|e| Broken::Tunnel(self.relay.cause.explain(e)))
    }

    /// Waits for bytes without reading them. A stream that waits holds none of the connection's window.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.received_all.get()
            && let Poll::Ready(broken) = self.poll_reset(cx)
        {
            return Poll::Ready(Err(broken));
        }
        let ready = self.read.as_ref().poll_read_ready(cx);
        if ready.is_pending() && self.send.capacity() > 0 {
            self.send.reserve_capacity(0);
        }
        ready.map_err(|_| Broken::App)
    }

    /// Bytes that may be sent now; waits until there are some, and for a reset by the application, which nobody reads
    /// meanwhile.
    async fn window(&mut self) -> Result<usize, Broken> {
        if self.send.capacity() < LARGE {
            self.send.reserve_capacity(LARGE);
        }
        match self.send.capacity() {
            0 => {}
            n => return Ok(n),
        }
        let (send, cause) = (&mut *self.send, self.relay.cause);
        let mut broken = pin!(broken(self.read.as_ref()));
        poll_fn(|cx| {
            loop {
                match send.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(0))) => {}
                    Poll::Ready(Some(Ok(n))) => return Poll::Ready(Ok(n)),
                    Poll::Ready(Some(Err(e))) => {
                        return Poll::Ready(Err(Broken::Tunnel(cause.explain(e))));
                    }
                    Poll::Ready(None) => {
                        let closed = Error::new(Reason::StreamReset);
                        return Poll::Ready(Err(Broken::Tunnel(closed)));
                    }
                    Poll::Pending => break,
                }
            }
            broken.as_mut().poll(cx).map(|_| Err(Broken::App))
        })
        .await
    }

    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<Broken> {
        self.send.poll_reset(cx).map(|reset| {
            Broken::Tunnel(match reset {
                Ok(reason) => Error::new(Reason::StreamReset).because(reason.description()),
                Err(e) => self.relay.cause.explain(e),
            })
        })
    }
}
