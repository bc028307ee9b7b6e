//! Between an application's socket and a stream.
//!
//! Two directions in one task. The upload reads the application only when the stream has window for what it reads, so
//! back-pressure reaches the application as it would without a tunnel, and bytes wait in the kernel and not here. The
//! download writes what has arrived. A reset of either side ends both.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use h2::SendStream;
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;
use tokio::time::timeout;
use tokio_util::io::poll_write_buf;

use super::inbox::Inbox;
use super::load::Load;
use super::transport::Cause;
use super::upload::Upload;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{
    Chunk, Counters, Flight, LARGE, RelayOutcome, ResetOnDrop, Side, finish_writing, read_now,
};
use crate::stop_token::StopToken;

/// What has not been passed on this long after a reset is lost, as is what a resetting sender has not sent. It has window,
/// and needs only its turn on the wire and an application that accepts.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(2);

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
    pub(super) stop: &'a StopToken,
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
    ) -> RelayOutcome {
        let mut app = ResetOnDrop::new(app);
        let flight = Rc::new(Flight::default());
        let (sent_all, received_all) = (Cell::new(false), Cell::new(false));
        let answered = Cell::new(false);
        let outcome = {
            let (read, write) = app.split();
            let upload = Upload {
                relay: self,
                read,
                send: &mut send,
                flight: &flight,
                answered: &answered,
                received_all: &received_all,
            };
            let mut upload = pin!(upload.run(prefix, &sent_all));
            let mut download = pin!(self.download(write, inbox, &answered, &received_all));
            let mut written_all = false;
            let mut stopped = pin!(self.stop.stopped());
            poll_fn(|cx| {
                if let Poll::Ready(reason) = stopped.as_mut().poll(cx) {
                    return Poll::Ready(RelayOutcome::Stopped { reason });
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
                    Poll::Ready(RelayOutcome::Closed)
                } else {
                    Poll::Pending
                }
            })
            .await
        };
        match &outcome {
            RelayOutcome::Closed => app.finish(),
            RelayOutcome::Reset { by } if *by == self.app => {
                if !sent_all.get() {
                    self.last_words(&app, &mut send, &flight);
                }
                // Boxed, because it is rare, and its timer would make every relay larger.
                Box::pin(self.landed(&flight)).await;
                // RFC 9113, section 8.5: what a proxy says when the TCP connection broke.
                send.send_reset(h2::Reason::CONNECT_ERROR);
            }
            _ => send.send_reset(h2::Reason::CANCEL),
        }
        outcome
    }

    /// Waits a little for what is to be written before the reset: h2 lets a reset overtake it, and throws it away.
    async fn landed(&self, flight: &Flight) {
        tokio::select! {
            biased;
            _ = self.stop.stopped() => {}
            _ = timeout(LAST_WORDS, poll_fn(|cx| flight.poll_empty(cx))) => {}
        }
    }

    /// What the application had sent before it broke the connection goes ahead of the reset, as it does without a
    /// tunnel: an answer, for example, of a server that closes without reading the rest of an upload. Only as much as
    /// the stream has window for; nothing is waited for.
    fn last_words(&self, app: &TcpStream, send: &mut SendStream<Chunk>, flight: &Rc<Flight>) {
        loop {
            send.reserve_capacity(LARGE);
            let mut bytes = vec![0; send.capacity().min(LARGE)];
            let n = read_now(app, &mut bytes);
            bytes.truncate(n);
            if n == 0 || send.send_data(flight.board(bytes.into()), false).is_err() {
                return;
            }
            self.count(self.counter().0, n);
        }
    }

    /// Writes as much of what has arrived as the application takes at once.
    fn deliver(&self, inbox: &mut Inbox, write: &mut WriteHalf<'_>, cx: &mut Context<'_>) {
        while !inbox.is_empty() {
            match poll_write_buf(Pin::new(write), cx, inbox.queue()) {
                Poll::Ready(Ok(n)) if n > 0 => self.count(self.counter().1, inbox.took(n)),
                _ => return,
            }
        }
    }

    /// For a stream that the peer has reset before it was answered: what it had sent arrives, and then the reset.
    pub(super) async fn deliver_only(
        &self,
        app: TcpStream,
        mut inbox: Inbox,
        error: h2::Error,
    ) -> RelayOutcome {
        let mut app = ResetOnDrop::new(app);
        if let Some(reason) = self.stop.reason() {
            return RelayOutcome::Stopped { reason };
        }
        let (_, mut write) = app.split();
        let filled = poll_fn(|cx| {
            let filled = inbox.poll_fill(cx);
            self.deliver(&mut inbox, &mut write, cx);
            Poll::Ready(filled)
        });
        let error = match filled.await {
            Poll::Ready(Err(reset)) => reset,
            _ => error,
        };
        self.outcome(Broken::Tunnel(self.cause.explain(error)))
    }

    fn outcome(&self, broken: Broken) -> RelayOutcome {
        match (broken, self.app) {
            (Broken::App, by) => RelayOutcome::Reset { by },
            (Broken::Tunnel(error), app) if error.reason() == Reason::StreamReset => {
                let by = if app == Side::Downstream {
                    Side::Upstream
                } else {
                    Side::Downstream
                };
                RelayOutcome::Reset { by }
            }
            (Broken::Tunnel(error), _) => RelayOutcome::Failed(error),
        }
    }

    /// Counters of the bytes (from the application, to the application).
    pub(super) fn counter(&self) -> (&AtomicU64, &AtomicU64) {
        let Counters { sent, received } = self.counters;
        if self.app == Side::Downstream {
            (sent, received)
        } else {
            (received, sent)
        }
    }

    pub(super) fn count(&self, counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
        if let Some(load) = self.load {
            load.add(n);
        }
    }

    async fn download(
        &self,
        mut write: WriteHalf<'_>,
        inbox: impl Future<Output = Result<Inbox, Broken>>,
        answered: &Cell<bool>,
        received_all: &Cell<bool>,
    ) -> Result<(), Broken> {
        let mut inbox = inbox.await?;
        answered.set(true);
        loop {
            let written = poll_fn(|cx| {
                match inbox.poll_fill(cx) {
                    Poll::Ready(Ok(())) => received_all.set(true),
                    Poll::Ready(Err(e)) => {
                        self.deliver(&mut inbox, &mut write, cx);
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
