//! Chain to the trust bundle, no revocation, and a SPIFFE id: both sides' verification of the other.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::identity::of_leaf;
use super::revocation::Revocations;

/// Verifies servers. Any identity of the trust bundle passes here: see the module.
#[derive(Debug)]
pub(super) struct SpiffeServer {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    revocations: Revocations,
}

impl SpiffeServer {
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

impl ServerCertVerifier for SpiffeServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        require_standing(leaf, intermediates, &self.revocations)?;
        require_identity(leaf)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies clients: webpki's chain check, then the identity.
#[derive(Debug)]
pub(super) struct SpiffeClient {
    chain: Arc<dyn ClientCertVerifier>,
    revocations: Revocations,
}

impl SpiffeClient {
    pub(super) fn new(chain: Arc<dyn ClientCertVerifier>, revocations: Revocations) -> Self {
        Self { chain, revocations }
    }
}

impl ClientCertVerifier for SpiffeClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has one certificate and cannot choose; the list would only tell strangers about our CA.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        require_standing(leaf, intermediates, &self.revocations)?;
        require_identity(leaf)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// After the chain: a stranger's certificate is a stranger's, revoked or not.
fn require_standing(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    revocations: &Revocations,
) -> Result<(), Error> {
    match revocations.revoke(std::iter::once(leaf).chain(intermediates)) {
        true => Err(CertificateError::Revoked.into()),
        false => Ok(()),
    }
}

fn require_identity(leaf: &CertificateDer<'_>) -> Result<(), Error> {
    match of_leaf(leaf) {
        Ok(_) => Ok(()),
        Err(e) => Err(CertificateError::Other(OtherError(Arc::new(e))).into()),
    }
}
