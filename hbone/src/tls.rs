//! Mutual TLS 1.3 between SPIFFE identities.
//!
//! A configuration is made once per certificate ([`ClientTls`], [`ServerTls`]) and shared by all connections that use
//! it. A server accepts every client whose chain ends in the trust bundle and whose leaf carries exactly one
//! well-formed SPIFFE id: who may do what is the caller's decision, made per request. A client additionally compares
//! the server's id with those that it expects, after the handshake and before it writes a byte of HTTP/2; the
//! configuration therefore does not depend on the destination.
//!
//! There is no resumption: a tunnel lives for long, and a resumed session would not look at certificates again.

mod classify;
mod identity;
mod provider;
mod revocation;
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
pub use identity::SvidError;
pub(crate) use identity::of_leaf;
pub use provider::{AeadBackend, aead_backend};
pub(crate) use revocation::Shown;
pub use revocation::{CrlError, Revocations};

use verify::{SpiffeClient, SpiffeServer};

/// The only protocol inside the tunnel.
pub(crate) const ALPN: &[u8] = b"h2";

/// A certificate with its key, and whom it trusts.
///
/// The key's bytes are wiped when this is dropped. What a configuration keeps of the key is the cryptographic
/// library's, which wipes it when the last connection that was made with the configuration is gone.
pub struct Credentials {
    /// Leaf first, then intermediates; DER.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// The trust bundle.
    pub roots: Vec<CertificateDer<'static>>,
    /// Who is not believed although it chains to the bundle.
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

/// Credentials that no TLS configuration can be made of.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The leaf has no identity.
    #[error("the certificate carries no well-formed SPIFFE id")]
    Identity(#[source] SvidError),
    /// One of the roots is not a certificate.
    #[error("the trust bundle holds something that is not a usable CA certificate")]
    Roots(#[source] rustls::Error),
    /// Nobody would be trusted.
    #[error("the trust bundle is empty")]
    NoRoots,
    /// The key is of an unknown kind, or not the certificate's.
    #[error("the certificate and its key cannot be used")]
    Key(#[source] rustls::Error),
    /// The provider lacks something; cannot happen with the built-in ones.
    #[error("the TLS configuration is inconsistent")]
    Configuration(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The client side's TLS configuration for one certificate. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls {
    identity: Arc<SpiffeId>,
    config: Arc<ClientConfig>,
    revocations: Revocations,
}

impl ClientTls {
    /// Checks the credentials and prepares everything that connections share.
    pub fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        let (identity, roots) = check(credentials)?;
        let provider = provider::provider();
        let revocations = credentials.revocations.clone();
        let algorithms = provider.signature_verification_algorithms;
        let verifier = SpiffeServer::new(roots, algorithms, revocations.clone());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| TlsError::Configuration(e.into()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(certified(credentials)?);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        // The peer is known by its SPIFFE id, and names in clear would tell an observer who talks to whom.
        config.enable_sni = false;
        Ok(Self {
            identity: Arc::new(identity),
            config: Arc::new(config),
            revocations,
        })
    }

    /// The identity that this side presents.
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

/// The server side's TLS configuration for one certificate. Cheap to clone.
#[derive(Clone)]
pub struct ServerTls {
    identity: Arc<SpiffeId>,
    config: Arc<ServerConfig>,
    revocations: Revocations,
}

impl ServerTls {
    /// Checks the credentials and prepares everything that connections share.
    pub fn new(credentials: &Credentials) -> Result<Self, TlsError> {
        let (identity, roots) = check(credentials)?;
        let provider = provider::provider();
        let revocations = credentials.revocations.clone();
        let chain = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|e| TlsError::Configuration(e.into()))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| TlsError::Configuration(e.into()))?
            .with_client_cert_verifier(Arc::new(SpiffeClient::new(chain, revocations.clone())))
            .with_cert_resolver(certified(credentials)?);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self {
            identity: Arc::new(identity),
            config: Arc::new(config),
            revocations,
        })
    }

    /// The identity that this side presents.
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

/// The chain with its key, which is parsed from where it lies: a copy of the bytes that was handed over would be freed
/// and not wiped.
fn certified(credentials: &Credentials) -> Result<Arc<SingleCertAndKey>, TlsError> {
    let key = any_supported_type(&credentials.key).map_err(TlsError::Key)?;
    let certified = CertifiedKey::new(credentials.chain.clone(), key);
    match certified.keys_match() {
        // Unknown: a kind of key that does not say its public half; the handshake will.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {
            Ok(Arc::new(SingleCertAndKey::from(certified)))
        }
        Err(error) => Err(TlsError::Key(error)),
    }
}

fn check(credentials: &Credentials) -> Result<(SpiffeId, Arc<RootCertStore>), TlsError> {
    let leaf = credentials
        .chain
        .first()
        .ok_or(TlsError::Identity(SvidError::NoLeaf))?;
    let identity = of_leaf(leaf).map_err(TlsError::Identity)?;
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
