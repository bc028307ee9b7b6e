//! A certificate authority in a folder.

mod files;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;
use zeroize::{Zeroize, Zeroizing};

use super::certificate::at;
use super::{Certificate, CertificateSource, IssueError, Issuing};

const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// A leaf is valid this long before it was issued, for peers whose clocks are behind.
const BACKDATE: Duration = Duration::from_secs(120);

/// A root certificate and its key, kept as files of one folder: `root-cert.pem`, and `ca-key.pem`
/// that only its owner may read. If the folder also holds `ca-cert.pem`, that is the certificate
/// of the key, and the root signed it (Istio's layout of a plugged-in CA).
pub struct LocalCa {
    issuer: Issuer<'static, KeyPair>,
    /// What is sent after the leaf; empty when the root itself signs.
    intermediates: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl fmt::Debug for LocalCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCa")
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Why the folder of a [`LocalCa`] cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LocalCaError {
    /// A file cannot be read or written.
    #[error("cannot use the certificate authority's file {file}")]
    File {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// `create` never overwrites: every certificate in use would become worthless.
    #[error("{file} exists already; remove the folder to start a new certificate authority")]
    Exists {
        /// The file that is in the way.
        file: PathBuf,
    },
    /// Others could sign for any workload.
    #[error("{file} may be read by others (mode {mode:o}); chmod 600 it")]
    KeyIsOpen {
        /// The key file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file does not hold what it should.
    #[error("{file}: {message}")]
    Content {
        /// The file.
        file: PathBuf,
        /// For the operator.
        message: String,
    },
}

impl LocalCa {
    /// Makes a root and writes it to the folder, which is made if need be. Refuses to overwrite.
    pub fn create(dir: &Path) -> Result<Self, LocalCaError> {
        let (key_pem, root_pem) = new_root().map_err(|error| LocalCaError::Content {
            file: dir.to_owned(),
            message: format!("a root could not be made: {error}"),
        })?;
        files::write(dir, &key_pem, &root_pem)?;
        Self::open(dir)
    }

    /// Reads the root from the folder.
    pub fn open(dir: &Path) -> Result<Self, LocalCaError> {
        files::read(dir)
    }

    /// Issues a certificate for an identity, for at most as long as the authority itself is valid.
    pub fn issue(&self, identity: &SpiffeId, ttl: Duration) -> Result<Certificate, IssueError> {
        self.issue_at(identity, ttl, SystemTime::now())
    }

    /// The same at another time than now.
    pub fn issue_at(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Certificate, IssueError> {
        let error = |code, message| IssueError {
            identity: identity.clone(),
            code,
            message,
        };
        if self.not_after <= now {
            let message = "the certificate authority has expired".to_owned();
            return Err(error("ca_expired", message));
        }
        let not_after = (now + ttl).min(self.not_after);
        self.sign(identity, now - BACKDATE, not_after)
            .map_err(|m| error("signing_failed", m))
    }

    fn sign(
        &self,
        identity: &SpiffeId,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Certificate, String> {
        let mut key = new_key().map_err(|e| e.to_string())?;
        let params = leaf(identity, not_before, not_after).map_err(|e| e.to_string())?;
        let signed = params.signed_by(&key, &self.issuer);
        let pkcs8 = Zeroizing::new(key.serialize_der());
        key.zeroize();
        let leaf = signed.map_err(|e| e.to_string())?.der().clone();
        let chain = std::iter::once(leaf)
            .chain(self.intermediates.iter().cloned())
            .collect();
        Certificate::new(identity.clone(), chain, self.roots.clone(), pkcs8)
    }
}

impl CertificateSource for LocalCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> Issuing<'a> {
        Box::pin(async move { LocalCa::issue(self, identity, ttl) })
    }
}

fn new_key() -> Result<KeyPair, rcgen::Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
}

/// Only the SPIFFE id speaks: no subject, no other name (X.509-SVID, sections 2 and 3).
fn leaf(
    identity: &SpiffeId,
    not_before: SystemTime,
    not_after: SystemTime,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    params.not_before = OffsetDateTime::from(not_before);
    params.not_after = OffsetDateTime::from(not_after);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ClientAuth,
        ExtendedKeyUsagePurpose::ServerAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Key and self-signed certificate, as PEM.
fn new_root() -> Result<(Zeroizing<String>, String), rcgen::Error> {
    let mut key = new_key()?;
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "Ambit");
    params
        .distinguished_name
        .push(DnType::CommonName, "local certificate authority");
    params.not_before = OffsetDateTime::from(now - BACKDATE);
    params.not_after = OffsetDateTime::from(now + ROOT_TTL);
    // It signs leaves and no other authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&key);
    let key_pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    Ok((key_pem, root?.pem()))
}

#[cfg(test)]
mod tests;
