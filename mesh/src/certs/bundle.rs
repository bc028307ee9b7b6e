//! Whom the mesh trusts.

mod file;

use std::path::PathBuf;
use std::time::SystemTime;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, TrustAnchor};

use super::verify::at;

pub use file::BundleFile;
pub(super) use file::LOOK;

/// More roots than any mesh has; a bundle is searched in every handshake.
pub(super) const MAX_ROOTS: usize = 64;

/// Root certificates, each of which was parsed, none twice.
///
/// The only empty bundle is the default one, which says that nothing is known yet. No other can be
/// made: a source that reads an empty file has nothing to replace its good bundle with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    anchors: Vec<TrustAnchor<'static>>,
    ends: Option<SystemTime>,
}

/// Why something is no trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file cannot be read.
    #[error("cannot read the trust bundle {file}")]
    File {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// Nobody would be trusted.
    #[error("the trust bundle holds no certificate")]
    Empty,
    /// It is not PEM.
    #[error("the trust bundle is no PEM")]
    Pem(#[source] rustls_pki_types::pem::Error),
    /// One of the roots is not a usable certificate of an authority.
    #[error("root {index} of the trust bundle is not usable: {message}")]
    Root {
        /// Which, from 0.
        index: usize,
        /// For the operator.
        message: String,
    },
    /// More than anybody needs.
    #[error("the trust bundle holds more than {MAX_ROOTS} roots")]
    TooMany,
}

impl TrustBundle {
    /// A bundle of these roots. All of them are usable, or there is none.
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
            let (anchor, ends) =
                read(&root).map_err(|message| BundleError::Root { index, message })?;
            bundle.ends = Some(bundle.ends.map_or(ends, |earliest| earliest.min(ends)));
            bundle.anchors.push(anchor);
            bundle.roots.push(root);
        }
        if bundle.is_empty() {
            return Err(BundleError::Empty);
        }
        Ok(bundle)
    }

    /// A bundle of all certificates in a PEM text.
    pub fn from_pem(text: &[u8]) -> Result<Self, BundleError> {
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
        Self::new(roots.map_err(BundleError::Pem)?)
    }

    /// The roots.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Nothing is known yet.
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// When the first of the roots expires.
    pub fn earliest_expiry(&self) -> Option<SystemTime> {
        self.ends
    }

    pub(super) fn anchors(&self) -> &[TrustAnchor<'static>] {
        &self.anchors
    }
}

fn read(root: &CertificateDer<'_>) -> Result<(TrustAnchor<'static>, SystemTime), String> {
    let (rest, parsed) =
        x509_parser::parse_x509_certificate(root).map_err(|error| error.to_string())?;
    if !rest.is_empty() {
        return Err("something follows the certificate".to_owned());
    }
    if !parsed.is_ca() {
        return Err("it is no certificate of an authority".to_owned());
    }
    let anchor = webpki::anchor_from_trusted_cert(root).map_err(|error| error.to_string())?;
    let ends = at(parsed.validity().not_after.timestamp());
    Ok((anchor.to_owned(), ends))
}

#[cfg(test)]
mod tests;
