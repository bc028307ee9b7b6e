//! One certificate with its key.

use std::fmt;
use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::SpiffeId;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// What a source answers: a chain and a key, of which nothing is known yet.
///
/// The key is wiped from memory when this is dropped, and never printed.
pub struct IssuedCertificate {
    /// Leaf first, then intermediates. Roots may follow; they are not sent to peers.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's private key, PKCS#8.
    pub key: Zeroizing<Vec<u8>>,
}

impl IssuedCertificate {
    /// The private key (PKCS#8). The copy is the caller's to hand on or to wipe.
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

/// A leaf certificate that was verified, its chain and its key.
///
/// The key is wiped from memory when the certificate is dropped, and never printed.
pub struct Certificate {
    /// Who it speaks for.
    pub identity: SpiffeId,
    /// Leaf first, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Start of its validity.
    pub not_before: SystemTime,
    /// End of its validity.
    pub not_after: SystemTime,
    /// Serial number, lower-case hex.
    pub serial: String,
    /// Its end by a clock that nobody sets, reckoned when it was issued.
    pub(super) ends: Instant,
    pub(super) key: Zeroizing<Vec<u8>>,
}

impl Certificate {
    /// The private key (PKCS#8). The copy is the caller's to hand on or to wipe.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.to_vec().into())
    }
}

/// As it came: for a source that has verified what it hands on.
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
