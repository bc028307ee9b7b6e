//! Whether and why a tunnel has failed, shared by its driver, its socket and its streams.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::keepalive::LastReceived;
use crate::error::Error;
use crate::reason::Reason;
use crate::tls::classify_io;

/// Status of one tunnel. The first error is kept, because later ones are its consequences.
#[derive(Clone)]
pub(super) struct TunnelStatus(Rc<Inner>);

struct Inner {
    peer: SocketAddr,
    error: RefCell<Option<Error>>,
    last_received: LastReceived,
}

impl TunnelStatus {
    /// A tunnel to or from `peer`.
    pub(super) fn new(peer: SocketAddr) -> Self {
        Self(Rc::new(Inner {
            peer,
            error: RefCell::default(),
            last_received: LastReceived::new(Instant::now()),
        }))
    }

    /// The address of the peer.
    pub(super) fn peer(&self) -> SocketAddr {
        self.0.peer
    }

    /// When bytes last arrived from the peer.
    pub(super) fn last_received(&self) -> &LastReceived {
        &self.0.last_received
    }

    /// Records an error, unless one is recorded already.
    pub(super) fn set_error(&self, error: Error) {
        self.0
            .error
            .borrow_mut()
            .get_or_insert(error.with_peer(self.peer()));
    }

    /// The first error.
    pub(super) fn error(&self) -> Option<Error> {
        self.0.error.borrow().clone()
    }

    /// Converts an error of h2 on this tunnel. An error of the whole connection is replaced by the recorded one.
    pub(super) fn convert_error(&self, error: h2::Error) -> Error {
        let detail = error
            .reason()
            .map(|reason| reason.to_string())
            .unwrap_or_default();
        let (reason, is_of_stream) = match error.reason() {
            Some(h2::Reason::REFUSED_STREAM) if error.is_reset() => (Reason::StreamRefused, true),
            _ if error.is_reset() => (Reason::StreamReset, true),
            Some(h2::Reason::NO_ERROR) if error.is_go_away() => (Reason::GoAway, false),
            _ if error.is_go_away() => (Reason::ProtocolError, false),
            _ => (Reason::TunnelClosed, false),
        };
        match self.error() {
            Some(first) if !is_of_stream => first,
            _ => Error::new(reason)
                .with_detail(detail)
                .with_source(error)
                .with_peer(self.peer()),
        }
    }

    /// Converts an error of the HTTP/2 handshake. An error of TLS or of the keepalive takes precedence.
    pub(super) fn convert_handshake_error(&self, error: h2::Error) -> Error {
        match self.error() {
            Some(first) if first.reason() != Reason::TunnelClosed => first,
            _ => Error::new(Reason::H2HandshakeFailed)
                .with_source(error)
                .with_peer(self.peer()),
        }
    }
}

/// The TLS stream under h2. h2 reduces an I/O error to text, so this type records the error in the tunnel's status.
pub(super) struct ErrorTap<S> {
    stream: S,
    status: TunnelStatus,
}

impl<S> ErrorTap<S> {
    pub(super) fn new(stream: S, status: TunnelStatus) -> Self {
        Self { stream, status }
    }

    fn record_error<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let Poll::Ready(Err(error)) = result else {
            return result;
        };
        let kind = error.kind();
        self.status
            .set_error(classify_io(error, Reason::TunnelClosed));
        Poll::Ready(Err(kind.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ErrorTap<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.record_error(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ErrorTap<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.record_error(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.record_error(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.record_error(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.record_error(closed)
    }
}
