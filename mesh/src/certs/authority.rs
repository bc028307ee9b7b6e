//! A certificate authority: a key that signs, and files to keep it in.

pub(super) mod files;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;
use zeroize::{Zeroize, Zeroizing};

use super::{IssuedCertificate, TrustBundle};

/// A certificate is valid this long before it was issued: five minutes for peers whose clocks are
/// behind, and as much again for an authority whose own clock is ahead.
pub const BACKDATE: Duration = Duration::from_secs(600);

const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A certificate of an authority and its key, and the roots that it chains to.
///
/// As files of one folder, in Istio's layout: `root-cert.pem` with one root or several, `ca-key.pem`
/// that only its owner may read, and `ca-cert.pem` with the certificate of that key (and what is
/// between it and the root), which is left out where a root itself signs.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Of the issuer's key; what tells one authority from another.
    public_key: Vec<u8>,
    /// What is sent after the leaf; empty when a root signs.
    intermediates: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
    not_after: SystemTime,
}

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Its start.
    pub not_before: SystemTime,
    /// Its end.
    pub not_after: SystemTime,
}

impl Validity {
    /// From [`BACKDATE`] ago for `ttl` from now.
    pub fn new(now: SystemTime, ttl: Duration) -> Self {
        Self {
            not_before: now - BACKDATE,
            not_after: now + ttl,
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("not_after", &self.not_after)
            .field("roots", &self.bundle.roots().len())
            .finish_non_exhaustive()
    }
}

/// Why the folder of an [`Authority`] cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
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

impl Authority {
    /// Makes a root and writes it to the folder, which is made if need be. Refuses to overwrite.
    pub fn create(dir: &Path) -> Result<Self, AuthorityError> {
        let (key_pem, root_pem) = new_root().map_err(|error| AuthorityError::Content {
            file: dir.to_owned(),
            message: format!("a root could not be made: {error}"),
        })?;
        files::write(dir, &key_pem, &root_pem)?;
        Self::open(dir)
    }

    /// Reads the authority from the folder.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        files::read(dir)
    }

    /// The roots that come with it.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// When its own certificate expires; nothing that it signs is valid for longer.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The issuing certificate, if it is not a root, and what is between it and the root.
    pub fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    /// Certifies that `identity` holds this public key, and nothing else: whatever a request said of
    /// names and usages is not looked at. The leaf comes first, then the intermediates.
    pub fn sign(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        // Only the SPIFFE id speaks: no subject, no other name (X.509-SVID, sections 2 and 3).
        let name = SanType::URI(identity.to_string().try_into()?);
        let usages = [
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        self.certify(key, vec![name], &usages, validity)
    }

    /// The same for a server that is known by DNS names or addresses.
    pub fn sign_server(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        self.certify(key, names, &[ExtendedKeyUsagePurpose::ServerAuth], validity)
    }

    /// A new key and its certificate.
    pub fn issue(
        &self,
        identity: &SpiffeId,
        validity: Validity,
    ) -> Result<IssuedCertificate, rcgen::Error> {
        let mut pair = new_key()?;
        let chain = self.sign(&pair, identity, validity);
        let key = Zeroizing::new(pair.serialize_der());
        pair.zeroize();
        Ok(IssuedCertificate { chain: chain?, key })
    }

    fn certify(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: &[ExtendedKeyUsagePurpose],
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.not_before = OffsetDateTime::from(validity.not_before);
        params.not_after = OffsetDateTime::from(validity.not_after.min(self.not_after));
        params.serial_number = Some(serial());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &self.issuer)?.der().clone();
        Ok(std::iter::once(leaf)
            .chain(self.intermediates.iter().cloned())
            .collect())
    }
}

/// Two that sign and trust alike.
impl PartialEq for Authority {
    fn eq(&self, other: &Self) -> bool {
        self.public_key == other.public_key
            && self.intermediates == other.intermediates
            && self.bundle == other.bundle
    }
}

/// 126 random bits, positive and of one length (RFC 5280, section 4.1.2.2): whoever asks twice for one
/// key gets two certificates that can be told apart, and revoked apart.
fn serial() -> SerialNumber {
    let mut serial = [0; 16];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    if provider.secure_random.fill(&mut serial).is_err() {
        // Numbers need to differ, and no more than that.
        fastrand::fill(&mut serial);
    }
    serial[0] = serial[0] & 0x3f | 0x40;
    SerialNumber::from(serial.to_vec())
}

fn new_key() -> Result<KeyPair, rcgen::Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
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
