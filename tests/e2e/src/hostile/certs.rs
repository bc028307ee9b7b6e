//! Certificates and revocation lists of a test: valid, expired, of an untrusted root, or with wrong names.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// By default a certificate is valid from this long before now until this long after.
const SKEW: Duration = Duration::from_secs(3600);

/// A certificate authority whose key the test holds.
pub struct TestCa {
    issuer: Issuer<'static, KeyPair>,
}

/// A leaf certificate with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The leaf alone: the roots of these tests sign leaves directly.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
}

impl TestCa {
    /// Reads the authority of a running lab, which the lab's daemons trust.
    ///
    /// # Errors
    /// The folder holds no usable authority.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let key = KeyPair::from_pem(&read("ca-key.pem")?).context("the authority's key")?;
        let issuer = Issuer::from_ca_cert_pem(&read("root-cert.pem")?, key)
            .context("the authority's root")?;
        Ok(Self { issuer })
    }

    /// Creates an authority that no daemon trusts. Its name equals the lab's, so only the signature differs.
    ///
    /// # Errors
    /// No key can be generated.
    pub fn untrusted() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Ambit");
        params
            .distinguished_name
            .push(DnType::CommonName, "local certificate authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Ok(Self {
            issuer: Issuer::new(params, KeyPair::generate()?),
        })
    }

    /// Signs a revocation list of these certificates, PEM.
    ///
    /// # Errors
    /// An element is not a certificate.
    pub fn revocation_list(&self, revoked: &[CertificateDer<'_>]) -> Result<String> {
        let now = SystemTime::now();
        let revoked_cert = |der: &CertificateDer<'_>| -> Result<RevokedCertParams> {
            let (_, leaf) = x509_parser::parse_x509_certificate(der).context("certificate")?;
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(leaf.raw_serial()),
                revocation_time: now.into(),
                reason_code: Some(RevocationReason::KeyCompromise),
                invalidity_date: None,
            })
        };
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + SKEW).into(),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(revoked_cert).collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer).context("revocation list")?;
        list.pem().context("PEM")
    }

    /// Signs a leaf that is valid now, with these URIs as its subject alternative names.
    ///
    /// # Errors
    /// A URI is not ASCII.
    pub fn leaf(&self, uris: &[&str]) -> Result<Leaf> {
        let now = SystemTime::now();
        self.leaf_valid(uris, now - SKEW, now + SKEW)
    }

    /// Like [`Self::leaf`], with this validity.
    ///
    /// # Errors
    /// A URI is not ASCII.
    pub fn leaf_valid(
        &self,
        uris: &[&str],
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Leaf> {
        let mut params = CertificateParams::default();
        let names: Result<Vec<_>, _> = uris
            .iter()
            .map(|uri| Ok(SanType::URI((*uri).try_into()?)))
            .collect();
        params.subject_alt_names = names
            .map_err(|error: rcgen::Error| error)
            .context("subject alternative name")?;
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().context("key")?;
        let certificate = params.signed_by(&key, &self.issuer).context("signature")?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(Leaf {
            chain: vec![certificate.der().clone()],
            key,
        })
    }
}
