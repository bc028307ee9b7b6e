//! How a tunnel's TCP socket is configured, read and closed.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Buf;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::{client, server};

use super::failure::{ErrorTap, TunnelStatus};
use crate::reason::Reason;
use crate::relay::{Chunk, READ_BUFFER_BYTES};

/// The connection under h2 at the client end.
pub(super) type ClientIo = ErrorTap<client::TlsStream<Transport>>;

/// The connection under h2 at the server end.
pub(super) type ServerIo = ErrorTap<server::TlsStream<Transport>>;

/// Bytes that a tunnel reads before its task yields to the other tasks of the thread.
pub(super) const READ_BUDGET_BYTES: usize = 1024 * 1024;

/// Idle time before the first TCP keepalive probe, and interval of further probes. HTTP/2 pings detect a dead peer; TCP
/// keepalive covers the handshakes, and a peer whose process is gone while its kernel still answers.
const TCP_KEEPALIVE: Duration = Duration::from_secs(10);

/// A TCP socket that is read in large pieces.
///
/// rustls reads 4 KiB at a time, which would be 64 system calls instead of one. The read buffer is leased only while it
/// contains bytes.
pub(super) struct Transport {
    tcp: TcpStream,
    read: Chunk,
    /// Bytes until the next yield.
    read_budget: usize,
    status: TunnelStatus,
}

impl Transport {
    /// `user_timeout` bounds how long sent bytes may go unacknowledged.
    pub(super) fn new(tcp: TcpStream, user_timeout: Duration, status: TunnelStatus) -> Self {
        let socket = SockRef::from(&tcp);
        let keepalive = TcpKeepalive::new()
            .with_time(TCP_KEEPALIVE)
            .with_interval(TCP_KEEPALIVE);
        // Best effort: without these options the tunnel is slower, or only HTTP/2 pings detect a dead peer.
        let _slower = socket.set_tcp_nodelay(true);
        let _later = socket.set_tcp_keepalive(&keepalive);
        let _later = socket.set_tcp_user_timeout(Some(user_timeout));
        Self {
            tcp,
            read: Chunk::default(),
            read_budget: READ_BUDGET_BYTES,
            status,
        }
    }
}

impl Drop for Transport {
    /// Closes with RST if this end terminates the tunnel, so that the close does not wait for a peer that may be dead.
    fn drop(&mut self) {
        const TERMINATED: [Reason; 3] = [Reason::Stopped, Reason::PingTimeout, Reason::PeerRevoked];
        let error = self.status.error();
        if error.is_some_and(|error| TERMINATED.contains(&error.reason())) {
            // Fails only on a socket that is already closed.
            let _closed = self.tcp.set_zero_linger();
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
            if this.read_budget == 0 {
                this.read_budget = READ_BUDGET_BYTES;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let read = Chunk::poll_read(Pin::new(&mut this.tcp), cx, READ_BUFFER_BYTES);
            this.read = ready!(read)?;
            this.read_budget = this.read_budget.saturating_sub(this.read.remaining());
            this.status.last_received().record(Instant::now());
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
