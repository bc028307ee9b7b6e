//! Certificates that a mesh must judge: its own, strangers', expired and misshapen ones.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// How long before now a certificate starts, so that it is valid at once.
const SKEW: Duration = Duration::from_secs(3600);

/// A certificate authority of which we hold the key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// A leaf certificate with its key.
#[derive(Debug)]
pub struct Leaf {
    /// The certificate alone; the roots of these tests sign directly.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl Authority {
    /// The authority of a running lab, whose daemons trust what it signs.
    ///
    /// # Errors
    /// The folder holds no usable authority.
    pub fn of(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).with_context(|| path.display().to_string())
        };
        let key = KeyPair::from_pem(&read("ca-key.pem")?).context("the authority's key")?;
        let issuer = Issuer::from_ca_cert_pem(&read("root-cert.pem")?, key)
            .context("the authority's root")?;
        Ok(Self { issuer })
    }

    /// An authority that nobody trusts. Its name is that of the lab's, so that only the signature tells them apart.
    ///
    /// # Errors
    /// No key could be made.
    pub fn foreign() -> Result<Self> {
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

    /// A list of these certificates as revoked, PEM.
    ///
    /// # Errors
    /// One of them is no certificate.
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

    /// A leaf, valid now, with these URIs as its subject alternative names.
    ///
    /// # Errors
    /// A URI is not ASCII.
    pub fn leaf(&self, uris: &[&str]) -> Result<Leaf> {
        let now = SystemTime::now();
        self.leaf_valid(uris, now - SKEW, now + SKEW)
    }

    /// A leaf with these limits of its validity.
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
