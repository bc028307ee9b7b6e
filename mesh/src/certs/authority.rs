//! How does a certificate authority in a folder sign certificates?

mod error;
mod files;
mod new_files;
mod validity;

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use time::OffsetDateTime;
use zeroize::{Zeroize, Zeroizing};

use super::certificate::IssuedCertificate;
use super::clock::MAX_CLOCK_SKEW;
use super::trust_bundle::TrustBundle;
use super::verify_chain::verify_chain;
use files::{CaFiles, ROOT};

pub use error::AuthorityError;
pub(super) use files::file_stamps;
pub use validity::{BACKDATE, Validity};

const ROOT_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A CA: its certificate and key, and the roots that it chains to.
///
/// Stored in a folder with Istio's file names: `root-cert.pem` with one or more roots, `ca-key.pem`
/// that only its owner may read, and `ca-cert.pem` with the certificate of that key followed by the
/// certificates between it and the root. `ca-cert.pem` is absent if a root signs directly.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Public key of the issuer, which identifies the CA.
    public_key: Vec<u8>,
    /// The certificates that follow the leaf. Empty if a root signs directly.
    intermediates: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
    not_after: SystemTime,
}

impl Authority {
    /// Creates a root and writes it to the folder, which is created if needed.
    ///
    /// # Errors
    /// Fails if the folder already has a CA, or cannot be written.
    pub fn create(dir: &Path) -> Result<Self, AuthorityError> {
        let (key_pem, root_pem) = new_root().map_err(|error| AuthorityError::Content {
            file: dir.to_owned(),
            message: format!("creating a root failed: {error}"),
        })?;
        new_files::write(dir, &key_pem, &root_pem)?;
        Self::open(dir)
    }

    /// Reads the CA from the folder.
    ///
    /// # Errors
    /// Fails unless all files can be read and belong together. While files are replaced one after
    /// the other, this fails until the last one is in place.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        new_files::finish_interrupted(dir)?;
        let CaFiles {
            key,
            bundle,
            signer,
            signer_file,
            intermediates,
        } = files::load(dir)?;
        let in_signer_file = |message: String| AuthorityError::Content {
            file: signer_file.clone(),
            message,
        };
        let public_key = key.public_key_raw().to_vec();
        let issuer = Issuer::from_ca_cert_der(&signer, key)
            .map_err(|error| in_signer_file(error.to_string()))?;
        let now = SystemTime::now();
        let validity = validity::of_path(&signer, &intermediates, now).map_err(in_signer_file)?;
        let authority = Self {
            issuer,
            public_key,
            intermediates,
            bundle,
            not_after: validity.not_after,
        };
        authority
            .test_signature(validity.not_before, now)
            .map_err(in_signer_file)?;
        Ok(authority)
    }

    /// The roots of the folder.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// When the CA's own certificate expires. Nothing that it signs is valid for longer.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The issuing certificate, unless it is a root, and the certificates between it and the root.
    pub fn intermediates(&self) -> &[CertificateDer<'static>] {
        &self.intermediates
    }

    /// Certifies that `identity` has this public key. Names and usages of a certificate signing
    /// request are not used. Returns the leaf, then the intermediates.
    pub fn sign(
        &self,
        key: &impl PublicKeyData,
        identity: &SpiffeId,
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        // The SPIFFE ID is the only name, and the subject is empty (X.509-SVID, sections 2 and 3).
        let name = SanType::URI(identity.to_string().try_into()?);
        let usages = [
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        self.certify(key, vec![name], &usages, validity)
    }

    /// Like [`sign`](Self::sign), for a server with DNS names or IP addresses.
    pub fn sign_server(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<Vec<CertificateDer<'static>>, rcgen::Error> {
        self.certify(key, names, &[ExtendedKeyUsagePurpose::ServerAuth], validity)
    }

    /// Generates a key and certifies it for `identity`.
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

    /// Signs a test leaf and verifies its chain: a key can belong to a certificate whose signatures
    /// peers reject. A CA that has expired is tested at a time when it was valid, because
    /// [`LocalCa`](super::LocalCa) reports the expiry with each request.
    fn test_signature(&self, not_before: SystemTime, now: SystemTime) -> Result<(), String> {
        const SECOND: Duration = Duration::from_secs(1);
        if not_before > now + MAX_CLOCK_SKEW {
            let ahead = not_before.duration_since(now).unwrap_or_default();
            return Err(format!(
                "is not valid for another {ahead:.0?}, or a certificate between it and the root is not"
            ));
        }
        let probe = SpiffeId::new("spiffe://probe.invalid/probe").map_err(|e| e.to_string())?;
        let start = now.min(self.not_after - SECOND * 2).max(not_before);
        let validity = Validity {
            not_before: start,
            not_after: start + SECOND * 2,
        };
        let issued = self
            .issue(&probe, validity)
            .map_err(|error| format!("cannot sign: {error}"))?;
        verify_chain(&issued.chain, &self.bundle, start + SECOND)
            .map_err(|error| format!("does not chain to {ROOT}: {error}"))
    }
}

/// Two CAs are equal if they sign with the same key and chain, and have the same roots.
impl PartialEq for Authority {
    fn eq(&self, other: &Self) -> bool {
        self.public_key == other.public_key
            && self.intermediates == other.intermediates
            && self.bundle == other.bundle
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

/// 126 random bits, positive and of constant length (RFC 5280, section 4.1.2.2). Two certificates
/// for one key have different serial numbers, so they can be revoked separately.
fn serial() -> SerialNumber {
    let mut serial = [0; 16];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    if provider.secure_random.fill(&mut serial).is_err() {
        // Serial numbers have to be unique, not secret.
        fastrand::fill(&mut serial);
    }
    serial[0] = serial[0] & 0x3f | 0x40;
    SerialNumber::from(serial.to_vec())
}

fn new_key() -> Result<KeyPair, rcgen::Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
}

/// A new key and its self-signed certificate, as PEM.
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
    // It signs leaves only, no other CA.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&key);
    let key_pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    Ok((key_pem, root?.pem()))
}

#[cfg(test)]
mod tests;
