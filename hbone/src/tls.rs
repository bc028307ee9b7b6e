//! Mutual TLS 1.3 between SPIFFE identities.
//!
//! A configuration is built once per certificate ([`ClientTls`], [`ServerTls`]) and shared by all connections that use
//! it. Which peer certificates they accept is defined in [`verify`].
//!
//! Session resumption is off: tunnels are long-lived, and a resumed session would not verify certificates again.

mod classify;
mod provider;
mod revocation;
mod svid;
mod verify;

use std::fmt;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::SpiffeId;
use zeroize::Zeroize;

pub(crate) use classify::classify_io;
pub use provider::{AeadBackend, aead_backend};
pub(crate) use revocation::PeerCertSerials;
pub use revocation::{CrlError, Revocations};
pub use svid::SvidError;
pub(crate) use verify::{VerifiedPeer, require_alpn};

use svid::spiffe_id;
use verify::{ALPN, SpiffeClientVerifier, SpiffeServerVerifier};

/// A certificate, its key and the trust bundle.
///
/// The key's bytes are zeroized on drop. A configuration keeps the key inside the cryptographic library, which wipes it
/// when the last connection of the configuration is closed.
pub struct Credentials {
    /// Leaf first, then intermediates; DER.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// The trust bundle.
    pub roots: Vec<CertificateDer<'static>>,
    /// Certificates that are rejected although they chain to the bundle.
    pub revocations: Revocations,
}

impl Drop for Credentials {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("chain", &self.chain.len())
            .field("key", &"redacted")
            .field("roots", &self.roots.len())
            .field("revocations", &self.revocations)
            .finish()
    }
}

/// Why a TLS configuration cannot be built from the credentials.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The leaf is not an X.509 SVID.
    #[error("the certificate has no well-formed SPIFFE id")]
    Identity(#[source] SvidError),
    /// One of the roots is not a CA certificate.
    #[error("the trust bundle has an entry that is not a usable CA certificate")]
    Roots(#[source] rustls::Error),
    /// There are no roots.
    #[error("the trust bundle is empty")]
    NoRoots,
    /// The key has an unsupported type, or does not match the certificate.
    #[error("the private key cannot be used with the certificate")]
    Key(#[source] rustls::Error),
    /// The cryptographic provider lacks a feature; cannot happen with the built-in ones.
    #[error("the TLS configuration is inconsistent")]
    Configuration(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// TLS configuration of the client end, for one certificate. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls {
    identity: Arc<SpiffeId>,
    config: Arc<ClientConfig>,
    revocations: Revocations,
}

impl ClientTls {
    /// Checks the credentials and builds the configuration.
    pub fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        let (identity, roots) = check_credentials(credentials)?;
        let provider = provider::provider();
        let revocations = credentials.revocations.clone();
        let algorithms = provider.signature_verification_algorithms;
        let verifier = SpiffeServerVerifier::new(roots, algorithms, revocations.clone());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| TlsError::Configuration(e.into()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(certified_key(credentials)?);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        // The peer is identified by its SPIFFE id, and a name in clear text would disclose it to observers.
        config.enable_sni = false;
        Ok(Self {
            identity: Arc::new(identity),
            config: Arc::new(config),
            revocations,
        })
    }

    /// The identity of the certificate.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    pub(crate) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }

    pub(crate) fn revocations(&self) -> &Revocations {
        &self.revocations
    }
}

/// TLS configuration of the server end, for one certificate. Cheap to clone.
#[derive(Clone)]
pub struct ServerTls {
    identity: Arc<SpiffeId>,
    config: Arc<ServerConfig>,
    revocations: Revocations,
}

impl ServerTls {
    /// Checks the credentials and builds the configuration.
    pub fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        let (identity, roots) = check_credentials(credentials)?;
        let provider = provider::provider();
        let revocations = credentials.revocations.clone();
        let chain = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|e| TlsError::Configuration(e.into()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| TlsError::Configuration(e.into()))?
            .with_client_cert_verifier(Arc::new(SpiffeClientVerifier::new(
                chain,
                revocations.clone(),
            )))
            .with_cert_resolver(certified_key(credentials)?);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self {
            identity: Arc::new(identity),
            config: Arc::new(config),
            revocations,
        })
    }

    /// The identity of the certificate.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    pub(crate) fn revocations(&self) -> &Revocations {
        &self.revocations
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClientTls")
            .field(&format_args!("{}", self.identity))
            .finish()
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServerTls")
            .field(&format_args!("{}", self.identity))
            .finish()
    }
}

/// The chain with its key. The key is parsed in place, because a copy of its bytes would be freed without being wiped.
fn certified_key(credentials: &Credentials) -> Result<Arc<SingleCertAndKey>, TlsError> {
    let key = any_supported_type(&credentials.key).map_err(TlsError::Key)?;
    let certified = CertifiedKey::new(credentials.chain.clone(), key);
    match certified.keys_match() {
        // Unknown: this type of key does not expose its public half. The handshake reveals a mismatch.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {
            Ok(Arc::new(SingleCertAndKey::from(certified)))
        }
        Err(error) => Err(TlsError::Key(error)),
    }
}

fn check_credentials(
    credentials: &Credentials,
) -> Result<(SpiffeId, Arc<RootCertStore>), TlsError> {
    let leaf = credentials
        .chain
        .first()
        .ok_or(TlsError::Identity(SvidError::NoLeaf))?;
    let identity = spiffe_id(leaf).map_err(TlsError::Identity)?;
    let mut roots = RootCertStore::empty();
    for root in &credentials.roots {
        roots.add(root.clone()).map_err(TlsError::Roots)?;
    }
    if roots.is_empty() {
        return Err(TlsError::NoRoots);
    }
    Ok((identity, Arc::new(roots)))
}

#[cfg(test)]
mod tests;
