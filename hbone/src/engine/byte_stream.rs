//! A stream as `AsyncRead + AsyncWrite`, for protocols other than a plain relay.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::recv_buffer::RecvBuffer;
use super::stream::{ResponseState, Stream};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, READ_BUFFER_BYTES};

impl Stream {
    /// Converts the stream to a byte stream, for a tunnel inside the tunnel, or HTTP.
    ///
    /// Much slower than [`Stream::relay`]. Reads wait for the peer's response first. Shutdown sends END_STREAM; dropping
    /// it before the shutdown, or before the end was read, resets the stream.
    pub fn into_io(self) -> impl AsyncRead + AsyncWrite + Unpin {
        ByteStream {
            stream: self,
            is_shut_down: false,
        }
    }
}

/// Reads and writes both take frames that have arrived, so that a writer without a reader does not affect other streams,
/// see [`super`].
struct ByteStream {
    stream: Stream,
    is_shut_down: bool,
}

impl ByteStream {
    /// Ready with received bytes, at END_STREAM, or with an error.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&mut RecvBuffer>> {
        let Stream {
            response, tunnel, ..
        } = &mut self.stream;
        ready!(response.poll_ready(cx, tunnel));
        match response {
            ResponseState::Accepted(_, received) => match received.poll_fill(cx) {
                Poll::Ready(Err(e)) => Poll::Ready(Err(io_error(tunnel.status().convert_error(e)))),
                Poll::Pending if received.is_empty() => Poll::Pending,
                _ => Poll::Ready(Ok(received)),
            },
            ResponseState::Failed(error) => Poll::Ready(Err(io_error(error.clone()))),
            ResponseState::Pending { .. } => Poll::Ready(Err(io_error(Reason::Internal.into()))),
        }
    }

    fn send_data(&mut self, chunk: Chunk, is_end: bool) -> io::Result<()> {
        let Stream { send, tunnel, .. } = &mut self.stream;
        send.send_data(chunk, is_end)
            .map_err(|e| io_error(tunnel.status().convert_error(e)))
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let received = ready!(self.get_mut().poll_fill(cx))?;
        let before = buf.remaining();
        while received.queue().has_remaining() && buf.remaining() > 0 {
            let n = received.queue().chunk().len().min(buf.remaining());
            buf.put_slice(&received.queue().chunk()[..n]);
            received.queue().advance(n);
        }
        received.consume(before - buf.remaining());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ByteStream {
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
        send.reserve_capacity(buf.len().min(READ_BUFFER_BYTES));
        while send.capacity() == 0 {
            match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(e)) => {
                    return Poll::Ready(Err(io_error(tunnel.status().convert_error(e))));
                }
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        let n = send.capacity().min(buf.len());
        this.send_data(Chunk::from(buf[..n].to_vec()), false)?;
        Poll::Ready(Ok(n))
    }

    /// Does nothing: the tunnel's driver sends queued bytes without a flush.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !std::mem::replace(&mut this.is_shut_down, true) {
            this.send_data(Chunk::default(), true)?;
        }
        Poll::Ready(Ok(()))
    }
}

fn io_error(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
