//! From a TLS failure to its reason.

use std::io;

use rustls::{AlertDescription, CertificateError, Error as TlsFailure};

use crate::error::Error;
use crate::reason::Reason;

/// The reason in a failed handshake.
fn classify(error: &TlsFailure) -> Reason {
    match error {
        TlsFailure::InvalidCertificate(CertificateError::Revoked) => Reason::PeerRevoked,
        TlsFailure::InvalidCertificate(_) => Reason::PeerUntrusted,
        TlsFailure::NoCertificatesPresented => Reason::PeerWithoutCertificate,
        TlsFailure::AlertReceived(alert) => classify_alert(*alert),
        TlsFailure::InvalidMessage(_)
        | TlsFailure::InappropriateMessage { .. }
        | TlsFailure::InappropriateHandshakeMessage { .. }
        | TlsFailure::PeerIncompatible(_)
        | TlsFailure::NoApplicationProtocol
        | TlsFailure::PeerSentOversizedRecord => Reason::NotHbone,
        _ => Reason::TlsHandshakeFailed,
    }
}

fn classify_alert(alert: AlertDescription) -> Reason {
    match alert {
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateRevoked
        | AlertDescription::CertificateExpired
        | AlertDescription::CertificateUnknown
        | AlertDescription::CertificateRequired
        | AlertDescription::UnknownCA
        | AlertDescription::AccessDenied
        | AlertDescription::DecryptError => Reason::RejectedByPeer,
        AlertDescription::NoApplicationProtocol
        | AlertDescription::ProtocolVersion
        | AlertDescription::HandshakeFailure => Reason::NotHbone,
        _ => Reason::TlsHandshakeFailed,
    }
}

/// An I/O error of a TLS stream, whose cause may be TLS's; `otherwise` if it is not.
pub(crate) fn classify_io(error: io::Error, otherwise: Reason) -> Error {
    let reason = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<TlsFailure>())
        .map_or(otherwise, classify);
    Error::new(reason).caused_by(error)
}
