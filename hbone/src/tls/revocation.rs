//! Which certificates are revoked: certificate revocation lists (RFC 5280, section 5).
//!
//! A process has one [`Revocations`], shared by all TLS configurations. Replacing its content affects the next
//! handshake and every open tunnel, so a revoked certificate stops working within moments on every connection.
//!
//! The signature of a list is not checked. A list comes from a file that only the operator can write, and it can only
//! remove trust.

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

/// The revoked certificates. Clones share the list.
#[derive(Clone)]
pub struct Revocations(Arc<Shared>);

struct Shared {
    list: ArcSwap<List>,
    version: watch::Sender<()>,
}

/// The content is not a revocation list. The previous list stays in force.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a revocation list (PEM or DER of RFC 5280): {0}")]
pub struct CrlError(String);

/// The revoked certificates of all issuers.
#[derive(Debug, Default, PartialEq, Eq)]
struct List(HashSet<Serial>);

/// Identifies a certificate: its issuer, and the issuer's serial number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Serial {
    /// The issuer's name, DER.
    issuer: Box<[u8]>,
    /// Without leading zeros, because encoders differ in how many they write.
    number: Box<[u8]>,
}

impl Revocations {
    /// An empty list: nothing is revoked.
    pub fn none() -> Self {
        Self(Arc::new(Shared {
            list: ArcSwap::default(),
            version: watch::Sender::new(()),
        }))
    }

    /// Replaces the lists: one DER list, or any number of PEM blocks `X509 CRL`.
    ///
    /// # Errors
    /// Fails if any part cannot be parsed; then nothing changes.
    pub fn replace(&self, content: &[u8]) -> Result<(), CrlError> {
        let list = parse(content)?;
        if *self.0.list.load_full() != list {
            self.0.list.store(Arc::new(list));
            self.0.version.send_replace(());
        }
        Ok(())
    }

    /// Number of revoked certificates.
    pub fn len(&self) -> usize {
        self.0.list.load().0.len()
    }

    /// Whether no certificate is revoked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a certificate of this chain is revoked: the leaf or an intermediate.
    pub(super) fn is_revoked<'a>(
        &self,
        chain: impl IntoIterator<Item = &'a CertificateDer<'a>>,
    ) -> bool {
        !self.is_empty() && self.contains_any(chain.into_iter().filter_map(serial))
    }

    fn contains_any(&self, serials: impl IntoIterator<Item = impl Borrow<Serial>>) -> bool {
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

/// Serial numbers of the peer's chain, checked again while a tunnel is open.
pub(crate) struct PeerCertSerials {
    serials: Box<[Serial]>,
    revocations: Revocations,
}

impl PeerCertSerials {
    pub(crate) fn new(chain: &[CertificateDer<'static>], revocations: &Revocations) -> Self {
        Self {
            serials: chain.iter().filter_map(serial).collect(),
            revocations: revocations.clone(),
        }
    }

    /// Resolves when one of the certificates is revoked.
    pub(crate) async fn revoked(&self) {
        // Subscribes before the first check, so that no change is missed between the two.
        let mut changed = self.revocations.0.version.subscribe();
        while !self.revocations.contains_any(&self.serials) {
            if changed.changed().await.is_err() {
                // Unreachable: `self.revocations` holds the sender.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// None for a certificate that cannot be parsed, which does not pass the chain check either.
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
            Err(CrlError("it has no PEM block X509 CRL".into()))
        };
    }
    add(content, &mut list)?;
    Ok(list)
}

fn add(der: &[u8], list: &mut List) -> Result<(), CrlError> {
    let (rest, crl) =
        CertificateRevocationList::from_der(der).map_err(|error| CrlError(error.to_string()))?;
    if !rest.is_empty() {
        return Err(CrlError("there are bytes after the list".into()));
    }
    // A delta CRL, or one with certificates of other issuers, would be misread as a complete list.
    if let Some(unsupported) = crl
        .extensions()
        .iter()
        .find(|extension| !is_supported(extension))
    {
        return Err(CrlError(format!(
            "its critical extension {} is not supported",
            unsupported.oid
        )));
    }
    let issuer = crl.issuer().as_raw();
    let serials = crl
        .iter_revoked_certificates()
        .map(|revoked| Serial::new(issuer, revoked.raw_serial()));
    list.0.extend(serials);
    Ok(())
}

fn is_supported(extension: &X509Extension<'_>) -> bool {
    !extension.critical
        || matches!(
            extension.parsed_extension(),
            ParsedExtension::CRLNumber(_) | ParsedExtension::AuthorityKeyIdentifier(_)
        )
}

#[cfg(test)]
mod tests;
