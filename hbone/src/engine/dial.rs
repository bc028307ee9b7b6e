//! From an address to an open tunnel: TCP, TLS, the peer's identity, and HTTP/2 up to its SETTINGS.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use h2::client::{Builder, Connection, SendRequest};
use rustls_pki_types::ServerName;
use spiffe::SpiffeId;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::transport::{Cause, Link, Transport};
use super::tunnel::{self, Driver, Proven, Tunnel, Wire};
use super::{
    MAX_FRAME, RESET_MEMORY, RESETS_REMEMBERED, SEND_BUFFER, SMALL_FRAME_BUDGET, TLS_BUFFER,
    connection_window,
};
use crate::error::Error;
use crate::pool::{PoolConfig, SocketFactory};
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::tls::{ALPN, ClientTls, Shown, classify_io, of_leaf};

/// A response has fewer headers than a request, and this peer is less trusted than our own configuration.
const MAX_RESPONSE_HEADERS: u32 = 16 * 1024;

/// What it takes to open a tunnel.
pub(crate) struct Dial {
    pub(crate) config: Rc<PoolConfig>,
    pub(crate) sockets: Rc<dyn SocketFactory>,
    pub(crate) address: SocketAddr,
    pub(crate) expect: Vec<SpiffeId>,
    pub(crate) tls: ClientTls,
}

impl Dial {
    /// Connects, verifies the peer, and waits for its SETTINGS, each step within its deadline.
    pub(crate) async fn run(self) -> Result<(Rc<Tunnel>, Driver), Error> {
        let config = Rc::clone(&self.config);
        let cause = Cause::new(self.address);
        let steps = async {
            let tcp = within(
                config.connect_timeout,
                Reason::ConnectTimeout,
                self.connect(),
            )
            .await?;
            let transport = Transport::new(tcp, config.ping_timeout, cause.clone());
            let tls = self.handshake(transport);
            let (stream, peer) =
                within(config.tls_timeout, Reason::TlsHandshakeTimeout, tls).await?;
            let chain = stream.get_ref().1.peer_certificates();
            let shown = Shown::new(chain, self.tls.revocations());
            let link = Link::new(stream, cause.clone());
            let h2 = self.settings(link, &cause);
            let h2 = within(config.h2_timeout, Reason::H2HandshakeTimeout, h2).await?;
            Ok((Proven { peer, shown }, h2))
        };
        let (proven, (send, connection)) = steps.await.map_err(|e: Error| e.at(self.address))?;
        Ok(tunnel::open(proven, config, cause, send, connection))
    }

    async fn connect(&self) -> Result<TcpStream, Error> {
        let socket = self
            .sockets
            .new_tcp(self.address)
            .map_err(|e| Error::new(Reason::SocketFailed).caused_by(e))?;
        socket.connect(self.address).await.map_err(|e| {
            let reason = match e.kind() {
                std::io::ErrorKind::ConnectionRefused => Reason::ConnectRefused,
                std::io::ErrorKind::TimedOut => Reason::ConnectTimeout,
                std::io::ErrorKind::HostUnreachable | std::io::ErrorKind::NetworkUnreachable => {
                    Reason::HostUnreachable
                }
                _ => Reason::ConnectFailed,
            };
            Error::new(reason).caused_by(e)
        })
    }

    /// TLS, and the check that the peer is one of those expected: before any byte of HTTP/2 is written.
    async fn handshake(&self, io: Transport) -> Result<(TlsStream<Transport>, SpiffeId), Error> {
        let name = ServerName::IpAddress(self.address.ip().into());
        let connector = TlsConnector::from(self.tls.config());
        let stream = connector
            .connect_with(name, io, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)))
            .await
            .map_err(|e| classify_io(e, Reason::TlsHandshakeFailed))?;
        let (_, tls) = stream.get_ref();
        let leaf = tls.peer_certificates().and_then(<[_]>::first);
        let leaf = leaf.ok_or(Reason::PeerWithoutCertificate)?;
        let peer = of_leaf(leaf).map_err(|e| Error::new(Reason::PeerUntrusted).caused_by(e))?;
        if !self.expect.contains(&peer) {
            return Err(Error::new(Reason::PeerIdentityMismatch).because(format!("it is {peer}")));
        }
        if tls.alpn_protocol() != Some(ALPN) {
            return Err(Error::new(Reason::NotHbone).because("no ALPN"));
        }
        Ok((stream, peer))
    }

    /// HTTP/2 up to the peer's SETTINGS: only then is its stream limit known, and that it has accepted our certificate,
    /// which TLS 1.3 does not tell the client.
    async fn settings(
        &self,
        link: Wire,
        cause: &Cause,
    ) -> Result<(SendRequest<Chunk>, Connection<Wire, Chunk>), Error> {
        let failed = |e: h2::Error| match cause.error() {
            Some(error) if error.reason() != Reason::TunnelClosed => error,
            _ => Error::new(Reason::H2HandshakeFailed).caused_by(e),
        };
        let handshake = builder(&self.config).handshake(link).await;
        let (send, mut connection) = handshake.map_err(failed)?;
        poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(failed(e))),
            Poll::Ready(Ok(())) => Poll::Ready(Err(Reason::H2HandshakeFailed.into())),
            Poll::Pending if connection.max_concurrent_send_streams() > 0 => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        })
        .await?;
        Ok((send, connection))
    }
}

async fn within<T>(
    time: Duration,
    late: Reason,
    step: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    timeout(time, step)
        .await
        .unwrap_or_else(|_| Err(late.into()))
}

fn builder(config: &PoolConfig) -> Builder {
    let streams = u32::try_from(config.streams_per_tunnel).unwrap_or(u32::MAX);
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        // None before the peer's SETTINGS have come, see `settings`.
        .initial_max_send_streams(0)
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(connection_window(config.stream_window, streams))
        .data_frame_budget(SMALL_FRAME_BUDGET)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_RESPONSE_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .reset_stream_duration(RESET_MEMORY);
    builder
}
