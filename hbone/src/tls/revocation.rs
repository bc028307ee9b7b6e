//! Certificates that are not to be believed any more although they are valid: revocation lists (RFC 5280, section 5).
//!
//! The list of a process is one [`Revocations`], shared by all configurations that were made with it. Replacing its
//! content counts for the next handshake and for every open tunnel, so that a certificate that was taken back is worth
//! nothing within moments, wherever it was shown.
//!
//! A list is believed because of where it lies, not because of its signature: it comes from a file that only the
//! operator can write, and all that it can do is take trust away.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::watch;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate, X509Extension};

/// The certificates that this process does not believe. Clones share the list.
#[derive(Clone)]
pub struct Revocations(Arc<Shared>);

struct Shared {
    list: ArcSwap<List>,
    version: watch::Sender<()>,
}

/// Content that is no revocation list. The list that was in force stays in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a revocation list (PEM or DER of RFC 5280): {0}")]
pub struct CrlError(String);

/// Serial numbers, by who gave them out.
#[derive(Debug, Default, PartialEq, Eq)]
struct List(HashSet<Serial>);

/// A certificate as its issuer numbered it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Serial {
    /// The issuer's name, DER.
    issuer: Box<[u8]>,
    /// Without leading zeros: writers differ in how many they put.
    number: Box<[u8]>,
}

impl Revocations {
    /// Nothing is revoked.
    pub fn none() -> Self {
        Self(Arc::new(Shared {
            list: ArcSwap::default(),
            version: watch::Sender::new(()),
        }))
    }

    /// Puts these lists in force instead of those before: one DER list, or any number of PEM blocks `X509 CRL`.
    ///
    /// # Errors
    /// Fails if any part cannot be read; then nothing has changed.
    pub fn replace(&self, content: &[u8]) -> Result<(), CrlError> {
        let list = parse(content)?;
        if *self.0.list.load_full() != list {
            self.0.list.store(Arc::new(list));
            self.0.version.send_replace(());
        }
        Ok(())
    }

    /// Number of certificates on the lists.
    pub fn len(&self) -> usize {
        self.0.list.load().0.len()
    }

    /// Nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a certificate of this chain, the leaf or one between it and the root, is revoked.
    pub(super) fn revoke<'a>(
        &self,
        chain: impl IntoIterator<Item = &'a CertificateDer<'a>>,
    ) -> bool {
        !self.is_empty() && self.hold(chain.into_iter().filter_map(serial))
    }

    fn hold(&self, serials: impl IntoIterator<Item = impl Borrow<Serial>>) -> bool {
        let list = self.0.list.load();
        serials
            .into_iter()
            .any(|serial| list.0.contains(serial.borrow()))
    }
}

impl Default for Revocations {
    fn default() -> Self {
        Self::none()
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revocations")
            .field("certificates", &self.len())
            .finish()
    }
}

/// What an open tunnel remembers of its peer's certificates, to be looked up again when the lists change.
pub(crate) struct Shown {
    serials: Box<[Serial]>,
    revocations: Revocations,
}

impl Shown {
    pub(crate) fn new(
        chain: Option<&[CertificateDer<'static>]>,
        revocations: &Revocations,
    ) -> Self {
        Self {
            serials: chain
                .unwrap_or_default()
                .iter()
                .filter_map(serial)
                .collect(),
            revocations: revocations.clone(),
        }
    }

    /// Resolves when one of the certificates is revoked.
    pub(crate) async fn revoked(&self) {
        // Before the first look, so that no change falls between the two.
        let mut changed = self.revocations.0.version.subscribe();
        while !self.revocations.hold(&self.serials) {
            if changed.changed().await.is_err() {
                // Cannot be: the sender is ours too.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// A certificate that cannot be read has no serial number, and no chain to a root either.
fn serial(der: &CertificateDer<'_>) -> Option<Serial> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(Serial::new(
        certificate.issuer().as_raw(),
        certificate.raw_serial(),
    ))
}

impl Serial {
    fn new(issuer: &[u8], number: &[u8]) -> Self {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        Self {
            issuer: issuer.into(),
            number: number[zeros..].into(),
        }
    }
}

fn parse(content: &[u8]) -> Result<List, CrlError> {
    let mut list = List::default();
    if !content.starts_with(b"\x30") {
        let mut found = false;
        for block in rustls_pki_types::CertificateRevocationListDer::pem_slice_iter(content) {
            let block = block.map_err(|error| CrlError(error.to_string()))?;
            add(&block, &mut list)?;
            found = true;
        }
        return if found {
            Ok(list)
        } else {
            Err(CrlError("it holds no PEM block X509 CRL".into()))
        };
    }
    add(content, &mut list)?;
    Ok(list)
}

fn add(der: &[u8], list: &mut List) -> Result<(), CrlError> {
    let (rest, crl) =
        CertificateRevocationList::from_der(der).map_err(|error| CrlError(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CrlError("bytes follow the list".into()));
    }
    // A list of changes, or of other issuers' certificates, says less than it seems to if it is read as a whole one.
    if let Some(unknown) = crl
        .extensions()
        .iter()
        .find(|extension| !understood(extension))
    {
        return Err(CrlError(format!(
            "its critical extension {} is not supported",
            unknown.oid
        )));
    }
    let issuer = crl.issuer().as_raw();
    let serials = crl
        .iter_revoked_certificates()
        .map(|revoked| Serial::new(issuer, revoked.raw_serial()));
    list.0.extend(serials);
    Ok(())
}

fn understood(extension: &X509Extension<'_>) -> bool {
    !extension.critical
        || matches!(
            extension.parsed_extension(),
            ParsedExtension::CRLNumber(_) | ParsedExtension::AuthorityKeyIdentifier(_)
        )
}

#[cfg(test)]
mod tests;
