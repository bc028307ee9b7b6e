//! Which SPIFFE id a certificate has, and why a certificate is not an X.509 SVID.

use rustls_pki_types::CertificateDer;
use spiffe::{SpiffeId, SpiffeIdError};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// SPIFFE ID standard, section 2.3: implementations must support this length, and should not issue longer ids.
const MAX_ID_BYTES: usize = 2048;

/// Why a certificate is not an X.509 SVID.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SvidError {
    /// The chain is empty.
    #[error("the chain has no leaf certificate")]
    NoLeaf,
    /// The leaf is not X.509.
    #[error("the leaf is not a well-formed X.509 certificate")]
    NotX509,
    /// SPIFFE X509-SVID, section 2: exactly one URI SAN.
    #[error("the leaf has {0} URI names instead of exactly one")]
    UriCount(usize),
    /// SPIFFE X509-SVID, section 4.1: a leaf is not a CA.
    #[error("the leaf is a CA certificate")]
    IsCa,
    /// SPIFFE X509-SVID, section 4.3: a leaf signs neither certificates nor revocation lists.
    #[error("the leaf's key may sign certificates or revocation lists")]
    SigningKey,
    /// The URI is not a SPIFFE id.
    #[error("the leaf's URI name is not a well-formed SPIFFE id")]
    InvalidId(#[source] SpiffeIdError),
    /// The id is longer than the standard requires, or names a whole trust domain.
    #[error("the leaf's SPIFFE id does not name a workload")]
    NotWorkload,
}

/// The SPIFFE id of a leaf certificate.
pub(crate) fn spiffe_id(leaf: &CertificateDer<'_>) -> Result<SpiffeId, SvidError> {
    let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|_| SvidError::NotX509)?;
    if !rest.is_empty() {
        return Err(SvidError::NotX509);
    }
    if certificate.is_ca() {
        return Err(SvidError::IsCa);
    }
    let usage = certificate.key_usage().map_err(|_| SvidError::NotX509)?;
    if usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign()) {
        return Err(SvidError::SigningKey);
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| SvidError::NotX509)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let [uri] = uris.as_slice() else {
        return Err(SvidError::UriCount(uris.len()));
    };
    if uri.len() > MAX_ID_BYTES {
        return Err(SvidError::NotWorkload);
    }
    let id = SpiffeId::new(uri).map_err(SvidError::InvalidId)?;
    if id.path().is_empty() {
        Err(SvidError::NotWorkload)
    } else {
        Ok(id)
    }
}
