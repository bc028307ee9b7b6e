//! From an inbound socket to an accepted tunnel: TLS, the peer's identity, and HTTP/2.

use std::net::SocketAddr;

use h2::server::{Builder, Connection};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::transport::{Cause, Link, Transport};
use super::{
    MAX_FRAME, RESET_MEMORY, RESETS_REMEMBERED, SEND_BUFFER, SMALL_FRAME_BUDGET, TLS_BUFFER,
    connection_window,
};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::server::{Peer, ServeConfig};
use crate::tls::{ALPN, ServerTls, Shown, classify_io, of_leaf};

pub(super) type Wire = Link<TlsStream<Transport>>;

/// A tunnel whose handshakes are done.
pub(super) struct Opened {
    pub(super) connection: Box<Connection<Wire, Chunk>>,
    pub(super) cause: Cause,
    pub(super) shown: Shown,
}

/// Both handshakes. Sets `peer` as soon as it is verified.
pub(super) async fn accept(
    transport: TcpStream,
    tls: &ServerTls,
    config: &ServeConfig,
    peer: &mut Option<Peer>,
) -> Result<Opened, Error> {
    let address = transport
        .peer_addr()
        .map_err(|e| Error::new(Reason::TunnelClosed).caused_by(e))?;
    let cause = Cause::new(address);
    let transport = Transport::new(transport, config.ping_timeout, cause.clone());
    let handshake = TlsAcceptor::from(tls.config())
        .accept_with(transport, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)));
    let stream = match timeout(config.tls_timeout, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return Err(classify_io(e, Reason::TlsHandshakeFailed).at(address)),
        Err(_) => return Err(Error::new(Reason::TlsHandshakeTimeout).at(address)),
    };
    *peer = Some(verified(&stream, address)?);
    if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(Error::new(Reason::NotHbone).because("no ALPN").at(address));
    }
    let shown = Shown::new(stream.get_ref().1.peer_certificates(), tls.revocations());
    let handshake = builder(config).handshake(Link::new(stream, cause.clone()));
    match timeout(config.h2_timeout, handshake).await {
        Ok(Ok(connection)) => Ok(Opened {
            connection: Box::new(connection),
            cause,
            shown,
        }),
        Ok(Err(e)) => Err(match cause.error() {
            Some(error) if error.reason() != Reason::TunnelClosed => error,
            _ => Error::new(Reason::H2HandshakeFailed)
                .caused_by(e)
                .at(address),
        }),
        Err(_) => Err(Error::new(Reason::H2HandshakeTimeout).at(address)),
    }
}

fn verified(stream: &TlsStream<Transport>, address: SocketAddr) -> Result<Peer, Error> {
    let leaf = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first);
    let leaf = leaf.ok_or_else(|| Error::new(Reason::PeerWithoutCertificate).at(address))?;
    let identity = of_leaf(leaf);
    let untrusted = |e| Error::new(Reason::PeerUntrusted).caused_by(e).at(address);
    Ok(Peer {
        identity: identity.map_err(untrusted)?,
        address,
    })
}

fn builder(config: &ServeConfig) -> Builder {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(config.max_streams)
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(connection_window(config.stream_window, config.max_streams))
        .data_frame_budget(SMALL_FRAME_BUDGET)
        .max_frame_size(MAX_FRAME)
        // h2 answers 431 itself beyond this; up to it the request reaches us, is refused and can be counted.
        .max_header_list_size(config.max_header_bytes.saturating_mul(HEADER_SLACK))
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .max_pending_accept_reset_streams(RESETS_UNSEEN)
        .reset_stream_duration(RESET_MEMORY);
    builder
}

/// Streams that the peer may have opened and reset before we look at them. h2 ends the tunnel beyond it, and all streams
/// with it. A peer that does not wait for our answer before it resets, as Istio's does not, gets there by what a single
/// application of its pod does: 5,000 connections a second times a stall of 200 ms. Memory is bounded by the window.
const RESETS_UNSEEN: usize = 1024;

/// See [`builder`].
const HEADER_SLACK: u32 = 4;
