//! Why a connection failed: one stable code per cause, the side at fault, and whether a retry may succeed.

use std::fmt;

/// The side that caused a failure, seen from this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The side that connected to us: the application outbound, the peer's proxy inbound.
    Downstream,
    /// The side that we connect to, or the network path to it.
    Upstream,
    /// This process: out of file descriptors, shutting down, stopped by policy.
    Internal,
}

/// The cause of a failure.
///
/// [`Reason::code`] is part of the product's interface: log, metric and admin dump show the same code, so a code is
/// never renamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The socket could not be created or bound on this node.
    SocketFailed,
    /// The TCP connect was not answered within its deadline.
    ConnectTimeout,
    /// The peer's HBONE port answered with RST: no process listens there.
    ConnectRefused,
    /// The network has no route to the peer's address.
    HostUnreachable,
    /// The TCP connect failed in another way.
    ConnectFailed,
    /// The TLS handshake did not finish within its deadline.
    TlsHandshakeTimeout,
    /// The TLS handshake failed in a way that no other reason names.
    TlsHandshakeFailed,
    /// The peer does not support TLS 1.3 with ALPN `h2`.
    NotHbone,
    /// The peer's certificate does not chain to the trust bundle, has expired, or has no well-formed SPIFFE id.
    PeerUntrusted,
    /// A certificate of the peer's chain is on a revocation list.
    PeerRevoked,
    /// The peer sent no certificate.
    PeerWithoutCertificate,
    /// The peer's certificate is trusted, but is not for any of the expected identities.
    PeerIdentityMismatch,
    /// The peer refused our certificate.
    RejectedByPeer,
    /// The HTTP/2 preface and SETTINGS did not arrive within their deadline.
    H2HandshakeTimeout,
    /// The peer did not send HTTP/2 after the TLS handshake.
    H2HandshakeFailed,
    /// The peer did not answer the CONNECT within its deadline.
    ConnectResponseTimeout,
    /// The peer answered the CONNECT with this HTTP status instead of 200.
    ConnectRejected(u16),
    /// The request is not a well-formed CONNECT.
    ConnectMalformed,
    /// The tunnel's connection broke.
    TunnelClosed,
    /// The tunnel's peer sent nothing within the timeout of a ping.
    PingTimeout,
    /// The peer sent GOAWAY: it accepts no new streams on this tunnel.
    GoAway,
    /// The peer violated HTTP/2, or reported a violation by us.
    ProtocolError,
    /// The peer refused the stream before it processed it.
    StreamRefused,
    /// The peer reset the stream.
    StreamReset,
    /// All tunnels that the configuration allows to this peer are full.
    TooManyStreams,
    /// This pool or server is shutting down.
    Draining,
    /// Stopped from this side, by a [`StopToken`](crate::StopToken) or an abort.
    Stopped,
    /// A bug in this program: the certificate does not belong to the pool key, or an impossible state.
    Internal,
}

impl Reason {
    /// The stable snake_case code for logs, metrics and dumps.
    pub const fn code(self) -> &'static str {
        match self {
            Self::SocketFailed => "socket_failed",
            Self::ConnectTimeout => "hbone_connect_timeout",
            Self::ConnectRefused => "hbone_port_unreachable",
            Self::HostUnreachable => "hbone_host_unreachable",
            Self::ConnectFailed => "hbone_connect_failed",
            Self::TlsHandshakeTimeout => "tls_handshake_timeout",
            Self::TlsHandshakeFailed => "tls_handshake_failed",
            Self::NotHbone => "peer_not_hbone",
            Self::PeerUntrusted => "peer_untrusted",
            Self::PeerRevoked => "peer_certificate_revoked",
            Self::PeerWithoutCertificate => "peer_without_certificate",
            Self::PeerIdentityMismatch => "peer_identity_mismatch",
            Self::RejectedByPeer => "certificate_rejected_by_peer",
            Self::H2HandshakeTimeout => "h2_handshake_timeout",
            Self::H2HandshakeFailed => "h2_handshake_failed",
            Self::ConnectResponseTimeout => "connect_response_timeout",
            Self::ConnectRejected(_) => "connect_rejected",
            Self::ConnectMalformed => "connect_malformed",
            Self::TunnelClosed => "tunnel_closed",
            Self::PingTimeout => "tunnel_ping_timeout",
            Self::GoAway => "tunnel_goaway",
            Self::ProtocolError => "h2_protocol_error",
            Self::StreamRefused => "stream_refused",
            Self::StreamReset => "stream_reset",
            Self::TooManyStreams => "too_many_streams",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Internal => "internal",
        }
    }

    /// The side at fault, from the view of the client end of a tunnel. At the server end the peer is the downstream,
    /// and [`Fault::Upstream`] represents it.
    pub const fn fault(self) -> Fault {
        match self {
            Self::SocketFailed
            | Self::TooManyStreams
            | Self::Draining
            | Self::Stopped
            | Self::Internal => Fault::Internal,
            Self::ConnectMalformed => Fault::Downstream,
            _ => Fault::Upstream,
        }
    }

    /// Whether another endpoint, or the same one later, may succeed. True only for failures at which the application
    /// behind the peer has not seen the connection.
    pub const fn is_retryable(self) -> bool {
        match self {
            Self::ConnectTimeout
            | Self::ConnectRefused
            | Self::HostUnreachable
            | Self::ConnectFailed
            | Self::TlsHandshakeTimeout
            | Self::TlsHandshakeFailed
            | Self::NotHbone
            | Self::PeerUntrusted
            | Self::PeerRevoked
            | Self::PeerWithoutCertificate
            | Self::PeerIdentityMismatch
            | Self::RejectedByPeer
            | Self::H2HandshakeTimeout
            | Self::H2HandshakeFailed
            | Self::GoAway
            | Self::StreamRefused
            | Self::TooManyStreams => true,
            // 503: the peer's proxy could not reach its application. All other statuses are decisions of the peer.
            Self::ConnectRejected(status) => status == 503,
            Self::SocketFailed
            | Self::ConnectResponseTimeout
            | Self::ConnectMalformed
            | Self::TunnelClosed
            | Self::PingTimeout
            | Self::ProtocolError
            | Self::StreamReset
            | Self::Draining
            | Self::Stopped
            | Self::Internal => false,
        }
    }

    /// Like [`Reason::is_retryable`], for a connection that has sent no byte yet: then a broken or silent tunnel is also
    /// retryable. At worst the application behind the peer has seen a connection without a byte. A decision of the peer
    /// is never retried elsewhere.
    pub const fn is_retryable_before_send(self) -> bool {
        self.is_retryable()
            || matches!(
                self,
                Self::ConnectResponseTimeout
                    | Self::TunnelClosed
                    | Self::PingTimeout
                    | Self::ProtocolError
                    | Self::StreamReset
            )
    }

    /// Text for operators, with the likely cause where there is one.
    const fn message(self) -> &'static str {
        match self {
            Self::SocketFailed => "cannot create a socket for the tunnel",
            Self::ConnectTimeout => {
                "no answer to the TCP connect; a NetworkPolicy or firewall may block port 15008"
            }
            Self::ConnectRefused => {
                "connection refused; no HBONE listener for this pod, is it enrolled in the mesh?"
            }
            Self::HostUnreachable => "no route to the peer's address; was the pod deleted?",
            Self::ConnectFailed => "TCP connect failed",
            Self::TlsHandshakeTimeout => "the TLS handshake timed out",
            Self::TlsHandshakeFailed => "the TLS handshake failed",
            Self::NotHbone => "the peer does not support HBONE (TLS 1.3 with ALPN h2)",
            Self::PeerUntrusted => {
                "the peer's certificate is not trusted; it has another root, has expired, or has no SPIFFE id"
            }
            Self::PeerRevoked => "the peer's certificate is revoked",
            Self::PeerWithoutCertificate => "the peer sent no certificate",
            Self::PeerIdentityMismatch => {
                "the peer's identity is not one of the expected identities"
            }
            Self::RejectedByPeer => {
                "the peer rejected our certificate; check that it trusts our root and that the clocks agree"
            }
            Self::H2HandshakeTimeout => "timed out waiting for the peer's HTTP/2 SETTINGS",
            Self::H2HandshakeFailed => "the peer did not send HTTP/2 after the TLS handshake",
            Self::ConnectResponseTimeout => "timed out waiting for the response to the CONNECT",
            Self::ConnectRejected(_) => "the peer rejected the CONNECT",
            Self::ConnectMalformed => "the request is not a well-formed CONNECT",
            Self::TunnelClosed => "the tunnel's connection failed",
            Self::PingTimeout => "the tunnel's peer did not answer a ping",
            Self::GoAway => "the peer sent GOAWAY",
            Self::ProtocolError => "HTTP/2 protocol error on the tunnel",
            Self::StreamRefused => "the peer refused the stream",
            Self::StreamReset => "the peer reset the stream",
            Self::TooManyStreams => "all tunnels to this peer are full",
            Self::Draining => "shutting down, new streams are not accepted",
            Self::Stopped => "stopped",
            Self::Internal => "internal error",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())?;
        if let Self::ConnectRejected(status) = self {
            write!(f, " with status {status}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_before_the_application_is_reached_are_retryable() {
        assert!(Reason::ConnectRefused.is_retryable());
        assert!(Reason::GoAway.is_retryable());
        assert!(Reason::ConnectRejected(503).is_retryable());
        assert!(!Reason::ConnectRejected(401).is_retryable());
        assert!(!Reason::StreamReset.is_retryable());
        assert!(!Reason::ConnectResponseTimeout.is_retryable());
    }

    #[test]
    fn tunnel_failure_before_send_is_retryable_and_a_decision_is_not() {
        for reason in [
            Reason::ConnectResponseTimeout,
            Reason::TunnelClosed,
            Reason::PingTimeout,
            Reason::StreamReset,
            Reason::ConnectRefused,
        ] {
            assert!(reason.is_retryable_before_send(), "{reason:?}");
        }
        for reason in [
            Reason::ConnectRejected(401),
            Reason::Stopped,
            Reason::Draining,
        ] {
            assert!(!reason.is_retryable_before_send(), "{reason:?}");
        }
    }

    #[test]
    fn rejection_status_is_in_the_message_and_not_in_the_code() {
        let reason = Reason::ConnectRejected(401);
        assert_eq!(reason.code(), "connect_rejected");
        assert_eq!(
            reason.to_string(),
            "the peer rejected the CONNECT with status 401"
        );
    }
}
