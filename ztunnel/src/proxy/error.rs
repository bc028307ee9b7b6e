//! Why a connection failed, in the four answers a proxy needs: what, whose fault, may it be tried
//! again, and a stable code.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use component::ErrorChain;
use hbone::{Fault, Reason};
use mesh::{Denial, WorkloadUid};

use crate::identity::IdentityError;
use crate::telemetry::ResponseFlags;

/// A connection that did not come to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the connection was not redirected here: its original destination is unknown")]
    OriginalDestination(#[source] io::Error),
    #[error("pod {0} is not known (yet, or no longer)")]
    WorkloadUnknown(WorkloadUid),
    #[error("{0} is a port of the mesh itself, and the mesh carries no calls to itself")]
    SelfCall(SocketAddr),
    #[error("the pod has as many open connections as it may have")]
    ConnectionLimit,
    #[error("its handshake was pushed out: too many peers of the pod have not proven who they are")]
    HandshakeLimit,
    #[error("no endpoint can be used for {destination}")]
    NoEndpoint {
        destination: String,
        code: &'static str,
    },
    #[error("the pod cannot prove who it is")]
    Identity(#[from] IdentityError),
    #[error("the tunnel failed")]
    Tunnel(#[source] hbone::Error),
    #[error("cannot make a socket in the pod's network namespace")]
    Socket(#[source] io::Error),
    #[error("cannot connect to {to}")]
    Dial {
        to: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("{to} did not answer in time")]
    DialTimeout { to: SocketAddr },
    #[error("{authority} is not this pod")]
    NotThisPod { authority: String },
    #[error("the peer is of the trust domain {0}, not of this mesh")]
    ForeignTrustDomain(String),
    #[error("denied by {0}")]
    Denied(Denial),
    #[error("{0}")]
    Stopped(&'static str),
}

impl Error {
    /// The code that stands in the access log and in the metric. The peer of a refused CONNECT
    /// learns the status only.
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

    /// Who has to act. Shown to the operator in debug output only; the code already implies it.
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

    /// Whether another endpoint may answer. Only failures before any byte of the application was
    /// forwarded become an error here, so a retry never sends a byte twice.
    pub(crate) fn retryable(&self) -> bool {
        match self {
            Self::Dial { .. } | Self::DialTimeout { .. } => true,
            Self::Tunnel(error) => error.reason().is_retryable_before_send(),
            _ => false,
        }
    }

    /// Istio's coarse class of the failure, which its dashboards select on.
    pub(crate) fn flags(&self) -> ResponseFlags {
        match self {
            Self::Identity(_) => ResponseFlags::IdentityError,
            Self::Tunnel(error) => flags_of(error.reason()),
            Self::ForeignTrustDomain(_) | Self::Denied(_) => ResponseFlags::Deny,
            _ => ResponseFlags::Connect,
        }
    }

    /// The status by which a CONNECT is refused, as the peer chooses it.
    pub(crate) fn status(&self) -> u16 {
        match self {
            Self::SelfCall(_) | Self::NotThisPod { .. } => 400,
            Self::ForeignTrustDomain(_) | Self::Denied(_) => 401,
            _ => 503,
        }
    }

    /// The policy that denied it, if one did.
    pub(crate) fn policy(&self) -> Option<&Arc<str>> {
        match self {
            Self::Denied(denial) => Some(&denial.policy),
            _ => None,
        }
    }

    /// What the operator reads: the error, and everything that caused it.
    pub(crate) fn text(&self) -> String {
        let text = ErrorChain(self).to_string();
        match self {
            Self::Tunnel(error) => text + hint(error.reason()),
            _ => text,
        }
    }
}

/// What the operator reads of a tunnel that failed under an open connection.
pub(super) fn text_of(error: &hbone::Error) -> String {
    ErrorChain(error).to_string() + hint(error.reason())
}

/// Only the daemon that denied knows why, and it does not tell strangers.
fn hint(reason: Reason) -> &'static str {
    match reason {
        Reason::ConnectRejected(401 | 403) => {
            "; it is denied there, and the log of the destination's node names the policy"
        }
        _ => "",
    }
}

/// The class of a failure of the tunnel.
pub(crate) fn flags_of(reason: Reason) -> ResponseFlags {
    match reason {
        // Silence on the tunnel's port, where the pod's other ports may answer, is what a
        // NetworkPolicy does.
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
    fn only_what_another_endpoint_can_mend_is_tried_again() {
        let to = SocketAddr::from(([10, 0, 0, 1], 80));
        assert!(Error::DialTimeout { to }.retryable());
        assert!(
            Error::Dial {
                to,
                source: io::ErrorKind::ConnectionRefused.into()
            }
            .retryable()
        );
        assert!(!Error::Socket(io::ErrorKind::OutOfMemory.into()).retryable());
        assert!(!Error::Stopped("workload_gone").retryable());
        assert!(!Error::ConnectionLimit.retryable());
        let tunnel = |reason| Error::Tunnel(hbone::Error::from(reason));
        assert!(tunnel(Reason::TunnelClosed).retryable());
        assert!(tunnel(Reason::ConnectResponseTimeout).retryable());
        assert!(!tunnel(Reason::ConnectRejected(401)).retryable());
    }

    #[test]
    fn a_request_for_somebody_else_is_the_askers_fault_and_an_application_that_is_down_is_not() {
        let to = SocketAddr::from(([10, 0, 0, 1], 80));
        assert_eq!(
            Error::NotThisPod {
                authority: "10.0.0.2:80".into()
            }
            .status(),
            400
        );
        assert_eq!(Error::SelfCall(to).status(), 400);
        assert_eq!(
            Error::Dial {
                to,
                source: io::ErrorKind::ConnectionRefused.into()
            }
            .status(),
            503
        );
        assert_eq!(Error::SelfCall(to).fault(), Fault::Downstream);
    }

    #[test]
    fn a_denial_names_its_policy_and_is_the_askers_to_mend() {
        let error = Error::Denied(Denial {
            policy: "AuthorizationPolicy: no ALLOW matched".into(),
        });
        assert_eq!(
            error.text(),
            "denied by AuthorizationPolicy: no ALLOW matched"
        );
        assert_eq!((error.code(), error.status()), ("policy_denied", 401));
        assert_eq!(error.flags(), ResponseFlags::Deny);
        assert_eq!(error.fault(), Fault::Downstream);
        assert!(!error.retryable());
    }

    #[test]
    fn failures_have_istios_flags() {
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
    fn a_denial_by_the_other_side_says_where_its_policy_is_named() {
        let error = hbone::Error::from(Reason::ConnectRejected(401));
        let text = text_of(&error);
        assert!(text.contains("status 401; it is denied there"), "{text}");
        assert!(Error::Tunnel(error).text().ends_with("names the policy"));
        let down = hbone::Error::from(Reason::ConnectRejected(503));
        assert!(text_of(&down).ends_with("status 503"));
    }

    #[test]
    fn the_text_names_the_cause_once() {
        let to = SocketAddr::from(([10, 0, 0, 1], 80));
        let error = Error::Dial {
            to,
            source: io::Error::other("the cable is out"),
        };
        assert_eq!(
            error.text(),
            "cannot connect to 10.0.0.1:80: the cable is out"
        );
    }
}
