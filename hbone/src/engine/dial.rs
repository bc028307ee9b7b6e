//! How a tunnel is dialled: TCP, TLS, the peer's identity, and HTTP/2 up to its SETTINGS.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use h2::client::{Connection, SendRequest};
use rustls_pki_types::ServerName;
use spiffe::SpiffeId;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::failure::{ErrorTap, TunnelStatus};
use super::h2_config::{TLS_BUFFER_BYTES, client_builder};
use super::lifetime::Driver;
use super::transport::{ClientIo, Transport};
use super::tunnel::Tunnel;
use crate::config::PoolConfig;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::tls::{ClientTls, VerifiedPeer, classify_io, require_alpn};

/// Creates the sockets of tunnels, in the caller's network namespace and with its socket options.
pub trait SocketFactory {
    /// An unconnected TCP socket of the address family of `to`.
    fn new_tcp(&self, to: SocketAddr) -> io::Result<TcpSocket>;
}

/// One dial of a tunnel.
pub(crate) struct Dial {
    pub(crate) config: Rc<PoolConfig>,
    pub(crate) sockets: Rc<dyn SocketFactory>,
    pub(crate) address: SocketAddr,
    pub(crate) expected: Vec<SpiffeId>,
    pub(crate) tls: ClientTls,
}

impl Dial {
    /// Connects, verifies the peer, and waits for its SETTINGS, each step within its deadline.
    pub(crate) async fn run(self) -> Result<(Rc<Tunnel>, Driver), Error> {
        let config = Rc::clone(&self.config);
        let status = TunnelStatus::new(self.address);
        let handshakes = async {
            let tcp = within(
                config.connect_timeout,
                Reason::ConnectTimeout,
                self.connect(),
            )
            .await?;
            let transport = Transport::new(tcp, config.ping_timeout, status.clone());
            let tls = self.tls_handshake(transport);
            let (stream, peer) =
                within(config.tls_timeout, Reason::TlsHandshakeTimeout, tls).await?;
            let h2 = self.h2_handshake(ErrorTap::new(stream, status.clone()), &status);
            let h2 = within(config.h2_timeout, Reason::H2HandshakeTimeout, h2).await?;
            Ok((peer, h2))
        };
        let (peer, (send, connection)) = handshakes
            .await
            .map_err(|e: Error| e.with_peer(self.address))?;
        let tunnel = Tunnel::new(peer.identity, config, status, send);
        let driver = Driver::new(connection, Rc::clone(&tunnel), peer.serials);
        Ok((tunnel, driver))
    }

    async fn connect(&self) -> Result<TcpStream, Error> {
        let socket = self
            .sockets
            .new_tcp(self.address)
            .map_err(|e| Error::new(Reason::SocketFailed).with_source(e))?;
        socket.connect(self.address).await.map_err(|e| {
            let reason = match e.kind() {
                io::ErrorKind::ConnectionRefused => Reason::ConnectRefused,
                io::ErrorKind::TimedOut => Reason::ConnectTimeout,
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    Reason::HostUnreachable
                }
                _ => Reason::ConnectFailed,
            };
            Error::new(reason).with_source(e)
        })
    }

    /// TLS, and the check of the peer's identity before any byte of HTTP/2 is sent.
    async fn tls_handshake(
        &self,
        io: Transport,
    ) -> Result<(TlsStream<Transport>, VerifiedPeer), Error> {
        let name = ServerName::IpAddress(self.address.ip().into());
        let connector = TlsConnector::from(self.tls.config());
        let stream = connector
            .connect_with(name, io, |tls| {
                tls.set_buffer_limit(Some(TLS_BUFFER_BYTES));
            })
            .await
            .map_err(|e| classify_io(e, Reason::TlsHandshakeFailed))?;
        let (_, tls) = stream.get_ref();
        let peer = VerifiedPeer::new(tls, self.tls.revocations())?;
        peer.require_identity(&self.expected)?;
        require_alpn(tls)?;
        Ok((stream, peer))
    }

    /// HTTP/2 up to the peer's SETTINGS. They contain its stream limit, and prove that it has accepted our certificate,
    /// which a TLS 1.3 client cannot see in the handshake.
    async fn h2_handshake(
        &self,
        io: ClientIo,
        status: &TunnelStatus,
    ) -> Result<(SendRequest<Chunk>, Connection<ClientIo, Chunk>), Error> {
        let failed = |e: h2::Error| status.convert_handshake_error(e);
        let handshake = client_builder(&self.config).handshake(io).await;
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

/// Runs one step, and fails with `reason` when its time is over.
async fn within<T>(
    time: Duration,
    reason: Reason,
    step: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    timeout(time, step)
        .await
        .unwrap_or_else(|_| Err(reason.into()))
}
