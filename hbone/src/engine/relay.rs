//! Between an application's socket and a stream.
//!
//! Two directions in one task. [`upload`] reads the application only when the stream has window for what it reads, so
//! back-pressure reaches the application as it would without a tunnel, and bytes wait in the kernel and not here.
//! [`download`] writes what has arrived. A reset of either side ends both.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use bytes::Buf;
use h2::SendStream;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::yield_now;
use tokio_util::io::poll_write_buf;

use super::inbox::Inbox;
use super::transport::Cause;
use super::tunnel::Load;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{
    Chunk, Counters, LARGE, Outcome, READS_PER_TURN, ResetOnDrop, Side, broken, finish_writing,
};
use crate::stop::Stop;

/// What broke a connection.
pub(super) enum Broken {
    /// The application's socket.
    App,
    /// The stream, or its tunnel.
    Tunnel(Error),
}

/// What both directions of a relay share.
pub(super) struct Relay<'a> {
    /// Which side the application is on: downstream outbound, upstream inbound.
    pub(super) app: Side,
    pub(super) counters: &'a Counters,
    pub(super) stop: &'a Stop,
    pub(super) cause: &'a Cause,
    pub(super) load: Option<&'a Load>,
}

impl Relay<'_> {
    /// Runs until both directions have ended. `inbox` resolves when the other side may answer.
    pub(super) async fn run(
        &self,
        app: TcpStream,
        prefix: Vec<u8>,
        mut send: SendStream<Chunk>,
        inbox: impl Future<Output = Result<Inbox, Broken>>,
    ) -> Outcome {
        let mut app = ResetOnDrop::new(app);
        let (sent_all, received_all) = (Cell::new(false), Cell::new(false));
        let outcome = {
            let (read, write) = app.split();
            let upload = Upload {
                relay: self,
                read,
                send: &mut send,
                received_all: &received_all,
            };
            let mut upload = pin!(upload.run(prefix, &sent_all));
            let mut download = pin!(self.download(write, inbox, &received_all));
            let mut written_all = false;
            let mut stopped = pin!(self.stop.stopped());
            poll_fn(|cx| {
                if let Poll::Ready(reason) = stopped.as_mut().poll(cx) {
                    return Poll::Ready(Outcome::Stopped { reason });
                }
                if !written_all && let Poll::Ready(done) = download.as_mut().poll(cx) {
                    match done {
                        Ok(()) => written_all = true,
                        Err(broken) => return Poll::Ready(self.outcome(broken)),
                    }
                }
                if let Poll::Ready(broken) = upload.as_mut().poll(cx) {
                    return Poll::Ready(self.outcome(broken));
                }
                let closed = written_all && sent_all.get();
                if closed {
                    Poll::Ready(Outcome::Closed)
                } else {
                    Poll::Pending
                }
            })
            .await
        };
        match &outcome {
            Outcome::Closed => app.finish(),
            // RFC 9113, section 8.5: what a proxy says when the TCP connection broke.
            Outcome::Reset { by } if *by == self.app => send.send_reset(h2::Reason::CONNECT_ERROR),
            _ => send.send_reset(h2::Reason::CANCEL),
        }
        outcome
    }

    fn outcome(&self, broken: Broken) -> Outcome {
        match (broken, self.app) {
            (Broken::App, by) => Outcome::Reset { by },
            (Broken::Tunnel(error), app) if error.reason() == Reason::StreamReset => {
                let by = if app == Side::Downstream {
                    Side::Upstream
                } else {
                    Side::Downstream
                };
                Outcome::Reset { by }
            }
            (Broken::Tunnel(error), _) => Outcome::Failed(error),
        }
    }

    /// Counters of the bytes (from the application, to the application).
    fn counter(&self) -> (&AtomicU64, &AtomicU64) {
        let Counters { sent, received } = self.counters;
        if self.app == Side::Downstream {
            (sent, received)
        } else {
            (received, sent)
        }
    }

    fn count(&self, counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
        if let Some(load) = self.load {
            load.add(n);
        }
    }

    async fn download(
        &self,
        mut write: WriteHalf<'_>,
        inbox: impl Future<Output = Result<Inbox, Broken>>,
        received_all: &Cell<bool>,
    ) -> Result<(), Broken> {
        let mut inbox = inbox.await?;
        loop {
            let written = poll_fn(|cx| {
                match inbox.poll_fill(cx) {
                    Poll::Ready(Ok(())) => received_all.set(true),
                    Poll::Ready(Err(e)) => {
                        return Poll::Ready(Err(Broken::Tunnel(self.cause.explain(e))));
                    }
                    Poll::Pending if inbox.is_empty() => return Poll::Pending,
                    Poll::Pending => {}
                }
                if inbox.is_empty() {
                    return Poll::Ready(Ok(0));
                }
                let written = poll_write_buf(Pin::new(&mut write), cx, inbox.queue());
                written.map_err(|_| Broken::App)
            });
            match written.await? {
                0 => break,
                n => self.count(self.counter().1, inbox.took(n)),
            }
        }
        finish_writing(write.as_ref()).map_err(|_| Broken::App)
    }
}

/// The direction from the application into the stream.
struct Upload<'a, 'b> {
    relay: &'a Relay<'a>,
    read: ReadHalf<'b>,
    send: &'a mut SendStream<Chunk>,
    /// The other direction has ended, so that only this one can still notice a reset of the stream.
    received_all: &'a Cell<bool>,
}

impl Upload<'_, '_> {
    /// Resolves only with what broke the connection; sets `sent_all` after END_STREAM.
    async fn run(mut self, prefix: Vec<u8>, sent_all: &Cell<bool>) -> Broken {
        match self.all(prefix).await {
            Ok(()) => sent_all.set(true),
            Err(broken) => return broken,
        }
        // The other direction goes on, and the application may yet reset it without having anything to read.
        broken(self.read.as_ref()).await;
        Broken::App
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
            .send_data(chunk, end)
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
