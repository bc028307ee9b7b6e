//! Why a connection failed: what happened, whose fault it is, whether another attempt may help, and
//! a stable reason code.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use component::ErrorChain;
use hbone::{Fault, Reason};
use mesh::{Denial, WorkloadUid};

use crate::identity::IdentityError;
use crate::telemetry::ResponseFlags;

/// Why a connection was not established.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the original destination is unknown: the connection was not redirected to this port")]
    OriginalDestination(#[source] io::Error),
    #[error("pod {0} is not in the model (yet, or any more)")]
    WorkloadUnknown(WorkloadUid),
    #[error("{0} is a port of the data plane itself, which the mesh does not forward to")]
    SelfCall(SocketAddr),
    #[error("the pod has reached its limit of open connections")]
    ConnectionLimit,
    #[error("the handshake was evicted: too many tunnels to the pod are in their handshakes")]
    HandshakeLimit,
    #[error("{destination} has no usable endpoint")]
    NoEndpoint {
        destination: String,
        code: &'static str,
    },
    #[error("the pod has no usable certificate")]
    Identity(#[from] IdentityError),
    #[error("the tunnel failed")]
    Tunnel(#[source] hbone::Error),
    #[error("cannot create a socket in the pod's network namespace")]
    Socket(#[source] io::Error),
    #[error("cannot connect to {to}")]
    Dial {
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("{to} did not respond in time")]
    DialTimeout { to: SocketAddr },
    #[error("{authority} is not an address of this pod")]
    NotThisPod { authority: String },
    #[error("the peer's trust domain {0} is not this mesh's")]
    ForeignTrustDomain(String),
    #[error("denied by {0}")]
    Denied(Denial),
    #[error("{0}")]
    Stopped(&'static str),
}

impl Error {
    /// The reason code in the access log and in the metric. The peer of a refused CONNECT receives
    /// only the status.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::OriginalDestination(_) => "original_destination_unknown",
            Self::WorkloadUnknown(_) => "workload_unknown",
            Self::SelfCall(_) => "self_call",
            Self::ConnectionLimit => "pod_connection_limit",
            Self::HandshakeLimit => "pod_handshake_limit",
            Self::NoEndpoint { code, .. } | Self::Stopped(code) => code,
            Self::Identity(error) => error.code(),
            Self::Tunnel(error) => error.reason().code(),
            Self::Socket(_) => "socket_failed",
            Self::Dial { source, .. } => match source.kind() {
                io::ErrorKind::ConnectionRefused => "connect_refused",
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    "host_unreachable"
                }
                io::ErrorKind::TimedOut => "connect_timeout",
                io::ErrorKind::AddrNotAvailable => "source_ports_exhausted",
                _ => "connect_failed",
            },
            Self::DialTimeout { .. } => "connect_timeout",
            Self::NotThisPod { .. } => "authority_not_this_pod",
            Self::ForeignTrustDomain(_) => "peer_trust_domain",
            Self::Denied(_) => Denial::CODE,
        }
    }

    /// Whose fault it is. Logged at debug level only, because the code implies it.
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::OriginalDestination(_) | Self::SelfCall(_) | Self::NotThisPod { .. } => {
                Fault::Downstream
            }
            Self::ConnectionLimit
            | Self::HandshakeLimit
            | Self::ForeignTrustDomain(_)
            | Self::Denied(_) => Fault::Downstream,
            Self::NoEndpoint { .. } | Self::Dial { .. } | Self::DialTimeout { .. } => {
                Fault::Upstream
            }
            Self::WorkloadUnknown(_) | Self::Identity(_) | Self::Socket(_) | Self::Stopped(_) => {
                Fault::Internal
            }
            Self::Tunnel(error) => error.fault(),
        }
    }

    /// Whether another attempt may succeed. Only failures before the first byte of the application
    /// was forwarded become this type, so a retry never sends a byte twice.
    pub(super) fn is_retryable(&self) -> bool {
        match self {
            Self::Dial { .. } | Self::DialTimeout { .. } => true,
            Self::Tunnel(error) => error.reason().is_retryable_before_send(),
            _ => false,
        }
    }

    /// Istio's `response_flags` of the failure, which its dashboards select on.
    pub(super) fn response_flags(&self) -> ResponseFlags {
        match self {
            Self::Identity(_) => ResponseFlags::IdentityError,
            Self::Tunnel(error) => flags_of(error.reason()),
            Self::ForeignTrustDomain(_) | Self::Denied(_) => ResponseFlags::Deny,
            _ => ResponseFlags::Connect,
        }
    }

    /// The status of a refused CONNECT, as Istio's ztunnel chooses it.
    pub(super) fn connect_status(&self) -> u16 {
        match self {
            Self::SelfCall(_) | Self::NotThisPod { .. } => 400,
            Self::ForeignTrustDomain(_) | Self::Denied(_) => 401,
            _ => 503,
        }
    }

    /// The policy that denied the connection, if one did.
    pub(crate) fn policy(&self) -> Option<&Arc<str>> {
        match self {
            Self::Denied(denial) => Some(&denial.policy),
            _ => None,
        }
    }

    /// The text of the access log: the error with all its causes.
    pub(crate) fn text(&self) -> String {
        let text = ErrorChain(self).to_string();
        match self {
            Self::Tunnel(error) => text + hint(error.reason()),
            _ => text,
        }
    }
}

/// The text of the access log for a tunnel that failed under an open connection.
pub(super) fn text_of(error: &hbone::Error) -> String {
    ErrorChain(error).to_string() + hint(error.reason())
}

/// The peer's daemon does not send the reason of a denial, so this names the place where it is
/// logged.
fn hint(reason: Reason) -> &'static str {
    match reason {
        Reason::ConnectRejected(401 | 403) => {
            "; a policy of the destination denies it, and the log on the destination's node names the policy"
        }
        _ => "",
    }
}

/// Istio's `response_flags` of a failed tunnel.
pub(crate) fn flags_of(reason: Reason) -> ResponseFlags {
    match reason {
        // No response on the tunnel's port, while other ports of the pod may respond, is the
        // symptom of a NetworkPolicy.
        Reason::ConnectTimeout => ResponseFlags::NetworkPolicy,
        Reason::TlsHandshakeTimeout
        | Reason::TlsHandshakeFailed
        | Reason::NotHbone
        | Reason::PeerUntrusted
        | Reason::PeerWithoutCertificate
        | Reason::PeerIdentityMismatch
        | Reason::RejectedByPeer => ResponseFlags::TlsFailure,
        Reason::H2HandshakeTimeout | Reason::H2HandshakeFailed => ResponseFlags::H2HandshakeFailure,
        Reason::PeerRevoked => ResponseFlags::CertRevoked,
        Reason::ConnectRejected(401 | 403) => ResponseFlags::Deny,
        _ => ResponseFlags::Connect,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_that_another_attempt_can_avoid_are_retryable() {
        let to = SocketAddr::from(([10, 0, 0, 1], 80));
        assert!(Error::DialTimeout { to }.is_retryable());
        assert!(
            Error::Dial {
                to,
                source: io::ErrorKind::ConnectionRefused.into()
            }
            .is_retryable()
        );
        assert!(!Error::Socket(io::ErrorKind::OutOfMemory.into()).is_retryable());
        assert!(!Error::Stopped("workload_gone").is_retryable());
        assert!(!Error::ConnectionLimit.is_retryable());
        let tunnel = |reason| Error::Tunnel(hbone::Error::from(reason));
        assert!(tunnel(Reason::TunnelClosed).is_retryable());
        assert!(tunnel(Reason::ConnectResponseTimeout).is_retryable());
        assert!(!tunnel(Reason::ConnectRejected(401)).is_retryable());
    }

    #[test]
    fn wrong_destination_is_refused_with_400_and_a_closed_application_port_with_503() {
        let to = SocketAddr::from(([10, 0, 0, 1], 80));
        assert_eq!(
            Error::NotThisPod {
                authority: "10.0.0.2:80".into()
            }
            .connect_status(),
            400
        );
        assert_eq!(Error::SelfCall(to).connect_status(), 400);
        assert_eq!(
            Error::Dial {
                to,
                source: io::ErrorKind::ConnectionRefused.into()
            }
            .connect_status(),
            503
        );
        assert_eq!(Error::SelfCall(to).fault(), Fault::Downstream);
    }

    #[test]
    fn denial_names_its_policy_and_is_a_downstream_fault() {
        let error = Error::Denied(Denial {
            policy: "AuthorizationPolicy: no ALLOW matched".into(),
        });
        assert_eq!(
            error.text(),
            "denied by AuthorizationPolicy: no ALLOW matched"
        );
        assert_eq!(
            (error.code(), error.connect_status()),
            ("policy_denied", 401)
        );
        assert_eq!(error.response_flags(), ResponseFlags::Deny);
        assert_eq!(error.fault(), Fault::Downstream);
        assert!(!error.is_retryable());
    }

    #[test]
    fn failed_tunnels_have_istios_response_flags() {
        assert_eq!(flags_of(Reason::ConnectRejected(401)), ResponseFlags::Deny);
        assert_eq!(
            flags_of(Reason::ConnectTimeout),
            ResponseFlags::NetworkPolicy
        );
        assert_eq!(
            flags_of(Reason::PeerIdentityMismatch),
            ResponseFlags::TlsFailure
        );
        assert_eq!(flags_of(Reason::ConnectRefused), ResponseFlags::Connect);
    }

    #[test]
    fn denial_by_the_destination_names_the_place_where_its_policy_is_logged() {
        let error = hbone::Error::from(Reason::ConnectRejected(401));
        let text = text_of(&error);
        assert!(
            text.contains("status 401; a policy of the destination denies it"),
            "{text}"
        );
        assert!(Error::Tunnel(error).text().ends_with("names the policy"));
        let down = hbone::Error::from(Reason::ConnectRejected(503));
        assert!(text_of(&down).ends_with("status 503"));
    }

    #[test]
    fn text_names_the_cause_once() {
        let to = SocketAddr::from(([10, 0, 0, 1], 80));
        let error = Error::Dial {
            to,
            source: io::Error::other("no carrier"),
        };
        assert_eq!(error.text(), "cannot connect to 10.0.0.1:80: no carrier");
    }
}
