//! How bytes move from an application's socket to a stream.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Buf;
use h2::SendStream;
use tokio::net::tcp::ReadHalf;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::context::{Progress, RESET_GRACE, RelayContext, RelayError};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, PendingWrites, READ_BUFFER_BYTES, READS_PER_YIELD, wait_for_reset};

/// The direction from the application to the stream.
pub(super) struct Upload<'a, 'b> {
    pub(super) context: &'a RelayContext<'a>,
    pub(super) read: ReadHalf<'b>,
    pub(super) send: &'a mut SendStream<Chunk>,
    pub(super) pending: &'a Rc<PendingWrites>,
    pub(super) progress: &'a Progress,
}

impl Upload<'_, '_> {
    /// Resolves only with an error. After FIN it sends END_STREAM and waits for a reset.
    pub(super) async fn run(mut self, prefix: Vec<u8>) -> RelayError {
        match self.send_all(prefix).await {
            Ok(()) => {
                self.progress.has_sent_end.set(true);
                // The download continues, and does not detect a reset while it has nothing to write.
                wait_for_reset(self.read.as_ref()).await;
            }
            Err(RelayError::App) => {}
            Err(tunnel) => return tunnel,
        }
        // Boxed, because it is rare, and its timer would enlarge every relay.
        Box::pin(self.wait_for_answer()).await;
        RelayError::App
    }

    /// Waits up to [`RESET_GRACE`] for the peer's response before the stream is reset.
    ///
    /// A stream that is reset before the peer has accepted it counts against the whole tunnel: h2 and similar servers
    /// close a connection after a few dozen of them, with all its streams. Without the wait, an application that opens
    /// and resets connections fast could cut off the other applications on the tunnel.
    async fn wait_for_answer(&self) {
        // The download registers the task's waker for the response.
        let answered = poll_fn(|_| {
            if self.progress.is_answered.get() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        let _timed_out = timeout(RESET_GRACE, answered).await;
    }

    /// Sends the prefix and the application's bytes up to FIN, which becomes END_STREAM.
    async fn send_all(&mut self, prefix: Vec<u8>) -> Result<(), RelayError> {
        if !prefix.is_empty() {
            self.send_data(Chunk::from(prefix), false)?;
        }
        let mut reads = 0;
        loop {
            poll_fn(|cx| self.poll_readable(cx)).await?;
            let window = self.window().await?;
            let read =
                poll_fn(|cx| Poll::Ready(Chunk::poll_read(Pin::new(&mut self.read), cx, window)));
            let chunk = match read.await {
                // Spurious readiness: the next iteration waits again.
                Poll::Pending => continue,
                Poll::Ready(chunk) => chunk.map_err(|_| RelayError::App)?,
            };
            let n = chunk.remaining();
            self.send_data(chunk, n == 0)?;
            if n == 0 {
                return Ok(());
            }
            self.context.count_upload(n);
            reads += 1;
            if reads % READS_PER_YIELD == 0 {
                yield_now().await;
            }
        }
    }

    fn send_data(&mut self, chunk: Chunk, is_end: bool) -> Result<(), RelayError> {
        self.send
            .send_data(self.pending.track(chunk), is_end)
            .map_err(|e| self.tunnel_error(e))
    }

    fn tunnel_error(&self, error: h2::Error) -> RelayError {
        RelayError::Tunnel(self.context.status.convert_error(error))
    }

    /// Waits for bytes without reading them. A stream that waits reserves none of the connection's window.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RelayError>> {
        // The download detects a reset of the stream until it has received END_STREAM.
        if self.progress.has_received_end.get()
            && let Poll::Ready(error) = self.poll_reset(cx)
        {
            return Poll::Ready(Err(error));
        }
        let ready = self.read.as_ref().poll_read_ready(cx);
        if ready.is_pending() && self.send.capacity() > 0 {
            self.send.reserve_capacity(0);
        }
        ready.map_err(|_| RelayError::App)
    }

    /// Waits until bytes may be sent, and returns how many. Also detects a reset by the application, which is not read
    /// meanwhile.
    async fn window(&mut self) -> Result<usize, RelayError> {
        if self.send.capacity() < READ_BUFFER_BYTES {
            self.send.reserve_capacity(READ_BUFFER_BYTES);
        }
        match self.send.capacity() {
            0 => {}
            n => return Ok(n),
        }
        let (send, status) = (&mut *self.send, self.context.status);
        let mut reset = pin!(wait_for_reset(self.read.as_ref()));
        poll_fn(|cx| {
            loop {
                match send.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(0))) => {}
                    Poll::Ready(Some(Ok(n))) => return Poll::Ready(Ok(n)),
                    Poll::Ready(Some(Err(e))) => {
                        return Poll::Ready(Err(RelayError::Tunnel(status.convert_error(e))));
                    }
                    Poll::Ready(None) => {
                        let closed = Error::new(Reason::StreamReset);
                        return Poll::Ready(Err(RelayError::Tunnel(closed)));
                    }
                    Poll::Pending => break,
                }
            }
            reset.as_mut().poll(cx).map(|_| Err(RelayError::App))
        })
        .await
    }

    /// Ready when the peer has reset the stream.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<RelayError> {
        self.send.poll_reset(cx).map(|reset| match reset {
            Ok(reason) => {
                let error = Error::new(Reason::StreamReset).with_detail(reason.description());
                RelayError::Tunnel(error)
            }
            Err(e) => self.tunnel_error(e),
        })
    }
}
