//! What is one certificate: chain, key and validity, before and after verification?

use std::fmt;
use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::SpiffeId;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// An unverified response of a source: a chain and its private key.
///
/// The key is wiped from memory on drop, and is never printed.
pub struct IssuedCertificate {
    /// Leaf first, then intermediates. Roots may follow; they are not sent to peers.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key, PKCS#8.
    pub key: Zeroizing<Vec<u8>>,
}

impl IssuedCertificate {
    /// A copy of the private key (PKCS#8). The caller must wipe it or pass it on.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.to_vec().into())
    }
}

impl fmt::Debug for IssuedCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedCertificate")
            .field("chain", &self.chain.len())
            .field("key", &"redacted")
            .finish()
    }
}

/// A verified leaf certificate with its chain and its private key.
///
/// The key is wiped from memory on drop, and is never printed.
pub struct Certificate {
    /// The SPIFFE ID of the leaf.
    pub identity: SpiffeId,
    /// Leaf first, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Start of the leaf's validity.
    pub not_before: SystemTime,
    /// End of the leaf's validity.
    pub not_after: SystemTime,
    /// Serial number, lower-case hexadecimal.
    pub serial: String,
    /// End of the leaf's validity on the monotonic clock, computed when it was verified.
    pub(super) expires_at: Instant,
    pub(super) key: Zeroizing<Vec<u8>>,
}

impl Certificate {
    /// A copy of the private key (PKCS#8). The caller must wipe it or pass it on.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.to_vec().into())
    }
}

/// For a source that verifies a response before it returns it.
impl From<Certificate> for IssuedCertificate {
    fn from(certificate: Certificate) -> Self {
        Self {
            chain: certificate.chain,
            key: certificate.key,
        }
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("identity", &self.identity.to_string())
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .field("key", &"redacted")
            .finish_non_exhaustive()
    }
}
