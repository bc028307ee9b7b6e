//! How an inbound connection becomes a tunnel: TLS, the peer's identity, and HTTP/2.

use h2::server::Connection;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::failure::{ErrorTap, TunnelStatus};
use super::h2_config::{TLS_BUFFER_BYTES, server_builder};
use super::transport::{ServerIo, Transport};
use crate::config::ServeConfig;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::server::Peer;
use crate::tls::{PeerCertSerials, ServerTls, VerifiedPeer, classify_io, require_alpn};

/// An accepted tunnel, whose handshakes are done.
pub(super) struct AcceptedTunnel {
    pub(super) connection: Box<Connection<ServerIo, Chunk>>,
    pub(super) status: TunnelStatus,
    pub(super) peer_serials: PeerCertSerials,
}

/// Runs both handshakes. Sets `peer` as soon as it is verified.
pub(super) async fn accept(
    tcp: TcpStream,
    tls: &ServerTls,
    config: &ServeConfig,
    peer: &mut Option<Peer>,
) -> Result<AcceptedTunnel, Error> {
    let address = tcp
        .peer_addr()
        .map_err(|e| Error::new(Reason::TunnelClosed).with_source(e))?;
    let at_peer = |e: Error| e.with_peer(address);
    let status = TunnelStatus::new(address);
    let transport = Transport::new(tcp, config.ping_timeout, status.clone());
    let handshake = TlsAcceptor::from(tls.config()).accept_with(transport, |tls| {
        tls.set_buffer_limit(Some(TLS_BUFFER_BYTES));
    });
    let stream = match timeout(config.tls_timeout, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return Err(at_peer(classify_io(e, Reason::TlsHandshakeFailed))),
        Err(_) => return Err(at_peer(Reason::TlsHandshakeTimeout.into())),
    };
    let connection = stream.get_ref().1;
    let verified = VerifiedPeer::new(connection, tls.revocations()).map_err(at_peer)?;
    *peer = Some(Peer {
        identity: verified.identity,
        address,
    });
    require_alpn(connection).map_err(at_peer)?;
    let handshake = server_builder(config).handshake(ErrorTap::new(stream, status.clone()));
    match timeout(config.h2_timeout, handshake).await {
        Ok(Ok(connection)) => Ok(AcceptedTunnel {
            connection: Box::new(connection),
            status,
            peer_serials: verified.serials,
        }),
        Ok(Err(e)) => Err(status.convert_handshake_error(e)),
        Err(_) => Err(at_peer(Reason::H2HandshakeTimeout.into())),
    }
}
