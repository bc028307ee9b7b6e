//! The tunnel's TCP socket under TLS, and the TLS stream under h2.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::heart::Pulse;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, LARGE};
use crate::tls::classify_io;

/// Bytes that a tunnel reads before the other tasks of its thread get their turn.
pub(super) const TURN: usize = 1024 * 1024;

/// First keepalive probe after this much silence, then as often. The pings inside the tunnel notice a dead peer; this
/// is for handshakes, and for a peer whose kernel is alone left.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// A TCP socket that is read in large pieces. rustls asks for 4 KiB at a time, which would be 64 system calls instead
/// of one. The buffer is leased while undelivered bytes are in it.
pub(super) struct Transport {
    tcp: TcpStream,
    read: Chunk,
    /// Bytes until the next yield.
    turn: usize,
    cause: Cause,
}

impl Transport {
    /// `user_timeout` bounds how long sent bytes may go unacknowledged.
    pub(super) fn new(tcp: TcpStream, user_timeout: Duration, cause: Cause) -> Self {
        let socket = SockRef::from(&tcp);
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE);
        // Best effort: without these the tunnel is slower, or notices death later by its pings alone.
        let _slower = socket.set_tcp_nodelay(true);
        let _later = socket.set_tcp_keepalive(&keepalive);
        let _later = socket.set_tcp_user_timeout(Some(user_timeout));
        Self {
            tcp,
            read: Chunk::default(),
            turn: TURN,
            cause,
        }
    }
}

impl Drop for Transport {
    /// A tunnel that we end by force says so with RST, at once and without waiting for a peer that may be dead.
    fn drop(&mut self) {
        let forced = [Reason::Stopped, Reason::PingTimeout, Reason::PeerRevoked];
        if self
            .cause
            .error()
            .is_some_and(|cause| forced.contains(&cause.reason()))
        {
            // Fails only on a socket that is dead already.
            let _dead = self.tcp.set_zero_linger();
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.read.has_remaining() {
            if this.turn == 0 {
                this.turn = TURN;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.read = ready!(Chunk::poll_read(Pin::new(&mut this.tcp), cx, LARGE))?;
            this.turn = this.turn.saturating_sub(this.read.remaining());
            this.cause.pulse().felt(Instant::now());
        }
        let bytes = this.read.as_slice();
        let n = bytes.len().min(buf.remaining());
        buf.put_slice(&bytes[..n]);
        this.read.advance(n);
        if !this.read.has_remaining() {
            this.read = Chunk::default();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Whether and why a tunnel died, known to all who hold it. The first cause stays: what follows is its consequence.
#[derive(Clone)]
pub(super) struct Cause(Rc<Fate>);

struct Fate {
    peer: SocketAddr,
    error: RefCell<Option<Error>>,
    pulse: Pulse,
}

impl Cause {
    /// For the tunnel to or from `peer`.
    pub(super) fn new(peer: SocketAddr) -> Self {
        Self(Rc::new(Fate {
            peer,
            error: RefCell::default(),
            pulse: Pulse::new(Instant::now()),
        }))
    }

    pub(super) fn peer(&self) -> SocketAddr {
        self.0.peer
    }

    /// The peer's last sign of life.
    pub(super) fn pulse(&self) -> &Pulse {
        &self.0.pulse
    }

    pub(super) fn set(&self, error: Error) {
        self.0
            .error
            .borrow_mut()
            .get_or_insert(error.at(self.peer()));
    }

    pub(super) fn error(&self) -> Option<Error> {
        self.0.error.borrow().clone()
    }

    /// An error of h2, on this tunnel.
    pub(super) fn explain(&self, error: h2::Error) -> Error {
        let detail = error
            .reason()
            .map(|reason| reason.to_string())
            .unwrap_or_default();
        let (reason, of_stream) = match error.reason() {
            Some(h2::Reason::REFUSED_STREAM) if error.is_reset() => (Reason::StreamRefused, true),
            _ if error.is_reset() => (Reason::StreamReset, true),
            Some(h2::Reason::NO_ERROR) if error.is_go_away() => (Reason::GoAway, false),
            _ if error.is_go_away() => (Reason::ProtocolError, false),
            _ => (Reason::TunnelClosed, false),
        };
        match self.error() {
            Some(cause) if !of_stream => cause,
            _ => Error::new(reason)
                .because(detail)
                .caused_by(error)
                .at(self.peer()),
        }
    }
}

/// The TLS stream as h2 sees it. h2 turns an I/O error into text; this keeps what it was.
pub(super) struct Link<S> {
    stream: S,
    cause: Cause,
}

impl<S> Link<S> {
    pub(super) fn new(stream: S, cause: Cause) -> Self {
        Self { stream, cause }
    }

    fn note<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let Poll::Ready(Err(error)) = result else {
            return result;
        };
        let kind = error.kind();
        self.cause.set(classify_io(error, Reason::TunnelClosed));
        Poll::Ready(Err(kind.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Link<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.note(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Link<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.note(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.note(closed)
    }
}
