//! Which roots does the mesh trust?

use std::time::SystemTime;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};

use super::clock::from_unix_seconds;

/// More roots than any mesh has. Every handshake searches the bundle.
pub(super) const MAX_ROOTS: usize = 64;

/// Root certificates: all of them parsed, without duplicates.
///
/// The only empty bundle is the default one, which means that the roots are not known yet. The
/// constructors refuse an empty list, so an empty file cannot replace a good bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    earliest_expiry: Option<SystemTime>,
}

/// Why a list of certificates is not a trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It has no root.
    #[error("the trust bundle has no certificate")]
    Empty,
    /// It is not PEM.
    #[error("the trust bundle is not valid PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// One of the roots is not a usable CA certificate.
    #[error("root {index} of the trust bundle is not usable: {message}")]
    Root {
        /// Position of the root, from 0.
        index: usize,
        /// Message for the operator.
        message: String,
    },
    /// It has too many roots.
    #[error("the trust bundle has more than {MAX_ROOTS} roots")]
    TooMany,
}

impl TrustBundle {
    /// A bundle of these roots.
    ///
    /// # Errors
    /// Fails if one root is not usable: a bundle is complete or it is an error.
    pub fn new(
        roots: impl IntoIterator<Item = CertificateDer<'static>>,
    ) -> Result<Self, BundleError> {
        let mut bundle = Self::default();
        for (index, root) in roots.into_iter().enumerate() {
            if bundle.roots.contains(&root) {
                continue;
            }
            if bundle.roots.len() == MAX_ROOTS {
                return Err(BundleError::TooMany);
            }
            let (anchor, expiry) =
                parse_root(&root).map_err(|message| BundleError::Root { index, message })?;
            let earliest = bundle.earliest_expiry.map_or(expiry, |e| e.min(expiry));
            bundle.earliest_expiry = Some(earliest);
            bundle.anchors.push(anchor);
            bundle.roots.push(root);
        }
        if bundle.is_empty() {
            return Err(BundleError::Empty);
        }
        Ok(bundle)
    }

    /// A bundle of all certificates of a PEM text.
    ///
    /// # Errors
    /// Fails if the text is not PEM, and as [`new`](Self::new).
    pub fn from_pem(text: &[u8]) -> Result<Self, BundleError> {
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
        Self::new(roots.map_err(BundleError::Pem)?)
    }

    /// The roots.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whether the roots are not known yet.
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// When the first of the roots expires.
    pub fn earliest_expiry(&self) -> Option<SystemTime> {
        self.earliest_expiry
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

fn parse_root(root: &CertificateDer<'_>) -> Result<(TrustAnchor<'static>, SystemTime), String> {
    let (rest, parsed) =
        x509_parser::parse_x509_certificate(root).map_err(|error| error.to_string())?;
    if !rest.is_empty() {
        return Err("extra bytes follow the certificate".to_owned());
    }
    if !parsed.is_ca() {
        return Err("it is not a CA certificate".to_owned());
    }
    let anchor = webpki::anchor_from_trusted_cert(root).map_err(|error| error.to_string())?;
    let expiry = from_unix_seconds(parsed.validity().not_after.timestamp());
    Ok((anchor.to_owned(), expiry))
}

#[cfg(test)]
mod tests;
