//! Which peer certificates are accepted. All rules for both ends of a tunnel are in this module.
//!
//! 1. The chain ends in the trust bundle, and every certificate of it is valid now.
//! 2. No certificate of the chain is revoked, see [`Revocations`].
//! 3. The leaf is an X.509 SVID: it has exactly one well-formed SPIFFE id, see [`spiffe_id`].
//! 4. Client end only: the SPIFFE id is one of those that the caller expects, see [`VerifiedPeer::require_identity`].
//!
//! Rules 1 to 3 are checked inside the handshake, by [`SpiffeServerVerifier`] and [`SpiffeClientVerifier`]. They do not
//! depend on the destination, so all connections with one certificate share one TLS configuration. Rule 4 is checked
//! after the handshake, before the client sends a byte of HTTP/2. The server end has no rule 4: which client may open
//! which connection is the caller's decision, made per request.
//!
//! Rule 2 is checked again whenever the lists change while a tunnel is open, see [`PeerCertSerials::revoked`].

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use spiffe::SpiffeId;

use super::revocation::{PeerCertSerials, Revocations};
use super::svid::spiffe_id;
use crate::error::Error;
use crate::reason::Reason;

/// The only protocol inside the tunnel.
pub(super) const ALPN: &[u8] = b"h2";

/// The peer of a connection whose TLS handshake is done.
pub(crate) struct VerifiedPeer {
    pub(crate) identity: SpiffeId,
    pub(crate) serials: PeerCertSerials,
}

impl VerifiedPeer {
    /// Reads the peer's identity from a connection whose certificates passed the handshake.
    pub(crate) fn new(tls: &CommonState, revocations: &Revocations) -> Result<Self, Error> {
        let chain = tls.peer_certificates().unwrap_or_default();
        let leaf = chain.first().ok_or(Reason::PeerWithoutCertificate)?;
        let untrusted = |e| Error::new(Reason::PeerUntrusted).with_source(e);
        Ok(Self {
            identity: spiffe_id(leaf).map_err(untrusted)?,
            serials: PeerCertSerials::new(chain, revocations),
        })
    }

    /// Fails unless the peer is one of the expected identities.
    pub(crate) fn require_identity(&self, expected: &[SpiffeId]) -> Result<(), Error> {
        if expected.contains(&self.identity) {
            return Ok(());
        }
        let detail = format!("it is {}", self.identity);
        Err(Error::new(Reason::PeerIdentityMismatch).with_detail(detail))
    }
}

/// Fails unless the peers have agreed on ALPN `h2`. A peer that offers no ALPN at all passes the handshake.
pub(crate) fn require_alpn(tls: &CommonState) -> Result<(), Error> {
    if tls.alpn_protocol() == Some(ALPN) {
        Ok(())
    } else {
        Err(Error::new(Reason::NotHbone).with_detail("no ALPN"))
    }
}

/// Verifies the certificates of servers by rules 1 to 3.
#[derive(Debug)]
pub(super) struct SpiffeServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    revocations: Revocations,
}

impl SpiffeServerVerifier {
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        algorithms: WebPkiSupportedAlgorithms,
        revocations: Revocations,
    ) -> Self {
        Self {
            roots,
            algorithms,
            revocations,
        }
    }
}

impl ServerCertVerifier for SpiffeServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        check_revoked(leaf, intermediates, &self.revocations)?;
        check_svid(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies the certificates of clients by rules 1 to 3.
#[derive(Debug)]
pub(super) struct SpiffeClientVerifier {
    /// webpki's verifier, for rule 1.
    chain: Arc<dyn ClientCertVerifier>,
    revocations: Revocations,
}

impl SpiffeClientVerifier {
    pub(super) fn new(chain: Arc<dyn ClientCertVerifier>, revocations: Revocations) -> Self {
        Self { chain, revocations }
    }
}

impl ClientCertVerifier for SpiffeClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has one certificate and cannot choose; the list would only disclose our CA to unknown clients.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        check_revoked(leaf, intermediates, &self.revocations)?;
        check_svid(leaf)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Runs after the chain check, so that an untrusted certificate is reported as untrusted even if it is also revoked.
fn check_revoked(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    revocations: &Revocations,
) -> Result<(), rustls::Error> {
    match revocations.is_revoked(std::iter::once(leaf).chain(intermediates)) {
        true => Err(CertificateError::Revoked.into()),
        false => Ok(()),
    }
}

fn check_svid(leaf: &CertificateDer<'_>) -> Result<(), rustls::Error> {
    match spiffe_id(leaf) {
        Ok(_) => Ok(()),
        Err(e) => Err(CertificateError::Other(OtherError(Arc::new(e))).into()),
    }
}
