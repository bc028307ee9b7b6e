//! What an authority may answer, good and bad.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use mesh::certs::istio_ca::proto::{IstioCertificateRequest, IstioCertificateResponse};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams,
    DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType,
};
use tonic::Status;

/// More than any chain that is needed, and than any that is taken.
const OVER_LONG: usize = 12;

/// How long before now certificates begin.
const BACKDATE: Duration = Duration::from_secs(300);

/// An answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// What was asked for.
    Good,
    /// Text that is no certificate.
    Garbage,
    /// A certificate for somebody else.
    AnotherIdentity,
    /// A certificate that has expired.
    Expired,
    /// A good leaf with more intermediates than anybody has.
    OverLong,
    /// A leaf of an authority that is not among the roots.
    Untrusted,
    /// A certificate for another key than the one that was sent.
    AnotherKey,
    /// A refusal.
    Denied,
    /// No answer at all.
    Silence,
}

/// An authority's certificate and key.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(super) certificate: Certificate,
}

impl Authority {
    pub(super) fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let issuer = Issuer::new(params, key);
        Ok(Self {
            issuer,
            certificate,
        })
    }

    /// A certificate with this one name.
    pub(super) fn leaf(
        &self,
        name: SanType,
        key: &impl PublicKeyData,
        not_after: SystemTime,
    ) -> Result<Certificate> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![name];
        params.not_before = (not_after.min(SystemTime::now()) - BACKDATE).into();
        params.not_after = not_after.into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        params.signed_by(key, &self.issuer).context("signature")
    }
}

/// The identity that a request asks for.
pub(super) fn asked(request: &IstioCertificateRequest) -> Option<&str> {
    let fields = &request.metadata.as_ref()?.fields;
    match fields.get("ImpersonatedIdentity")?.kind.as_ref()? {
        prost_types::value::Kind::StringValue(identity) => Some(identity),
        _ => None,
    }
}

impl Answer {
    /// The answer to a request, whose certificate lives for `life`. `None` is silence.
    pub(super) fn to(
        self,
        request: &IstioCertificateRequest,
        authority: &Authority,
        life: Duration,
    ) -> Option<Result<IstioCertificateResponse, Status>> {
        match self {
            Self::Silence => None,
            Self::Denied => Some(Err(Status::permission_denied("not this one"))),
            other => {
                let chain = other.chain(request, authority, life);
                let chain = chain.map_err(|error| Status::internal(format!("{error:#}")));
                Some(chain.map(|cert_chain| IstioCertificateResponse { cert_chain }))
            }
        }
    }

    fn chain(
        self,
        request: &IstioCertificateRequest,
        authority: &Authority,
        life: Duration,
    ) -> Result<Vec<String>> {
        let now = SystemTime::now();
        let identity = asked(request).context("no identity")?;
        let csr = CertificateSigningRequestParams::from_pem(&request.csr).context("CSR")?;
        let name = |identity: &str| Ok::<_, rcgen::Error>(SanType::URI(identity.try_into()?));
        let another = format!("{identity}-of-somebody-else");
        let leaf = match self {
            Self::AnotherIdentity => {
                authority.leaf(name(&another)?, &csr.public_key, now + life)?
            }
            Self::Expired => {
                let ended = now - Duration::from_secs(60);
                authority.leaf(name(identity)?, &csr.public_key, ended)?
            }
            Self::Untrusted => {
                Authority::new()?.leaf(name(identity)?, &csr.public_key, now + life)?
            }
            Self::AnotherKey => {
                authority.leaf(name(identity)?, &KeyPair::generate()?, now + life)?
            }
            _ => authority.leaf(name(identity)?, &csr.public_key, now + life)?,
        };
        let mut chain = vec![leaf.pem()];
        match self {
            Self::Garbage => chain = vec!["-----BEGIN NOTHING-----\nnot a certificate".to_owned()],
            Self::OverLong => {
                let extra = Authority::new()?.leaf(name(identity)?, &csr.public_key, now + life)?;
                chain.extend(std::iter::repeat_n(extra.pem(), OVER_LONG));
            }
            _ => {}
        }
        chain.push(authority.certificate.pem());
        Ok(chain)
    }
}
