//! A stream as `AsyncRead + AsyncWrite`: the slow path.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::inbox::Inbox;
use super::stream::{Answer, Stream};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, LARGE};

/// A stream whose reader or writer is polled now and then. Both take in what has arrived, so that a reader which
/// stalls while its writer goes on holds up nobody else; see [`super`].
pub(super) struct Io {
    stream: Stream,
    finished: bool,
}

impl Io {
    pub(super) fn new(stream: Stream) -> Self {
        Self {
            stream,
            finished: false,
        }
    }

    /// Ready with the inbox when the stream has ended, or with what broke it.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&mut Inbox>> {
        let Stream { answer, tunnel, .. } = &mut self.stream;
        ready!(answer.poll_wait(cx, tunnel));
        match answer {
            Answer::Accepted(_, inbox) => match inbox.poll_fill(cx) {
                Poll::Ready(Err(e)) => Poll::Ready(Err(broken(tunnel.cause().explain(e)))),
                Poll::Pending if inbox.is_empty() => Poll::Pending,
                _ => Poll::Ready(Ok(inbox)),
            },
            Answer::Failed(error) => Poll::Ready(Err(broken(error.clone()))),
            Answer::Awaited(..) => Poll::Ready(Err(broken(Reason::Internal.into()))),
        }
    }

    fn put(&mut self, chunk: Chunk, end: bool) -> io::Result<()> {
        let Stream { send, tunnel, .. } = &mut self.stream;
        send.send_data(chunk, end)
            .map_err(|e| broken(tunnel.cause().explain(e)))
    }
}

impl AsyncRead for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let inbox = ready!(self.get_mut().poll_fill(cx))?;
        let before = buf.remaining();
        while inbox.queue().has_remaining() && buf.remaining() > 0 {
            let n = inbox.queue().chunk().len().min(buf.remaining());
            buf.put_slice(&inbox.queue().chunk()[..n]);
            inbox.queue().advance(n);
        }
        inbox.took(before - buf.remaining());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Poll::Ready(Err(error)) = this.poll_fill(cx) {
            return Poll::Ready(Err(error));
        }
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let Stream { send, tunnel, .. } = &mut this.stream;
        send.reserve_capacity(buf.len().min(LARGE));
        while send.capacity() == 0 {
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(e)) => return Poll::Ready(Err(broken(tunnel.cause().explain(e)))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let n = send.capacity().min(buf.len());
        this.put(Chunk::from(buf[..n].to_vec()), false)?;
        Poll::Ready(Ok(n))
    }

    /// What was written is on its way: the tunnel's driver needs no asking.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.finished, true) {
            this.put(Chunk::default(), true)?;
        }
        Poll::Ready(Ok(()))
    }
}

fn broken(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
