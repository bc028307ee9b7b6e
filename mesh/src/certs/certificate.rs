//! One certificate with its key.

use std::fmt;
use std::time::{Duration, SystemTime};

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
    key: Zeroizing<Vec<u8>>,
}

/// What a leaf says of itself that the mesh relies on.
pub(super) struct Leaf {
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
    pub(super) serial: String,
}

impl Certificate {
    /// Puts a certificate together and reads its validity and serial number from the leaf. Fails
    /// with a sentence for the operator if the leaf does not name exactly this identity.
    pub fn new(
        identity: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        roots: Vec<CertificateDer<'static>>,
        key: Zeroizing<Vec<u8>>,
    ) -> Result<Self, String> {
        let leaf = chain.first().ok_or("the chain is empty")?;
        let Leaf {
            not_before,
            not_after,
            serial,
        } = read_leaf(leaf, &identity)?;
        Ok(Self {
            identity,
            chain,
            roots,
            not_before,
            not_after,
            serial,
            key,
        })
    }

    /// The private key (PKCS#8). The copy is the caller's to hand on or to wipe.
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

fn read_leaf(leaf: &CertificateDer<'_>, identity: &SpiffeId) -> Result<Leaf, String> {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf)
        .map_err(|error| format!("the leaf cannot be read: {error}"))?;
    let names = leaf
        .subject_alternative_name()
        .map_err(|error| format!("the leaf's names cannot be read: {error}"))?;
    let names = names
        .map(|names| names.value.general_names.as_slice())
        .unwrap_or_default();
    let wanted = identity.to_string();
    match names {
        [x509_parser::extensions::GeneralName::URI(uri)] if *uri == wanted => {}
        _ => return Err(format!("the leaf does not name {wanted} alone")),
    }
    Ok(Leaf {
        not_before: at(leaf.validity().not_before.timestamp()),
        not_after: at(leaf.validity().not_after.timestamp()),
        serial: leaf
            .raw_serial()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    })
}

/// Times before 1970 are all the same to the mesh: long past.
pub(super) fn at(timestamp: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or(0))
}
