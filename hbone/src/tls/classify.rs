//! Which reason a TLS failure has.

use std::io;

use rustls::{AlertDescription, CertificateError, Error as TlsFailure};

use crate::error::Error;
use crate::reason::Reason;

/// The reason of a failed handshake.
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

/// Converts an I/O error of a TLS stream. The reason is that of the TLS failure inside, or `default` if there is none.
pub(crate) fn classify_io(error: io::Error, default: Reason) -> Error {
    let reason = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<TlsFailure>())
        .map_or(default, classify);
    Error::new(reason).with_source(error)
}
