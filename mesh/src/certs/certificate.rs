//! One certificate with its key.

use std::fmt;
use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::SpiffeId;
use zeroize::Zeroizing;

/// A leaf certificate, its chain, its key and the roots that its peers are checked against.
///
/// The key is wiped from memory when the certificate is dropped, and never printed.
pub struct Certificate {
    /// Who it speaks for.
    pub identity: SpiffeId,
    /// Leaf first, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Roots that peers must chain to.
    pub roots: Vec<CertificateDer<'static>>,
    /// Start of its validity.
    pub not_before: SystemTime,
    /// End of its validity.
    pub not_after: SystemTime,
    /// Serial number, lower-case hex.
    pub serial: String,
    pub(super) key: Zeroizing<Vec<u8>>,
}

impl Certificate {
    /// The private key (PKCS#8). The copy is the caller's to keep or wipe.
    pub fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.key.to_vec().into())
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
