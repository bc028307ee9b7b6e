//! The responses of the fake certificate authority, valid and invalid.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use mesh::certs::istio_ca::proto::{IstioCertificateRequest, IstioCertificateResponse};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams,
    DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType,
};
use tonic::Status;

/// Longer than any chain that a daemon accepts.
const EXTRA_CERTIFICATES: usize = 12;

/// How long before now certificates become valid.
const BACKDATE: Duration = Duration::from_secs(300);

/// A response to a signing request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaResponse {
    /// The requested certificate.
    Valid,
    /// Text that is not a certificate.
    Garbage,
    /// A certificate for another identity.
    WrongIdentity,
    /// A certificate that has expired.
    Expired,
    /// A valid leaf with more intermediates than a daemon accepts.
    ChainTooLong,
    /// A leaf of an authority that is not among the daemon's roots.
    Untrusted,
    /// A certificate for another key than the request's.
    WrongKey,
    /// PERMISSION_DENIED
    Denied,
    /// No response.
    NoResponse,
}

/// An authority's certificate and key.
pub(super) struct SigningCa {
    issuer: Issuer<'static, KeyPair>,
    pub(super) certificate: Certificate,
}

impl SigningCa {
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

    /// Signs a leaf with one name.
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

/// The identity in a request's metadata.
pub(super) fn requested_identity(request: &IstioCertificateRequest) -> Option<&str> {
    let fields = &request.metadata.as_ref()?.fields;
    match fields.get("ImpersonatedIdentity")?.kind.as_ref()? {
        prost_types::value::Kind::StringValue(identity) => Some(identity),
        _ => None,
    }
}

impl CaResponse {
    /// The response to a request, with a certificate that is valid for `ttl`. `None` means no response.
    pub(super) fn to(
        self,
        request: &IstioCertificateRequest,
        authority: &SigningCa,
        ttl: Duration,
    ) -> Option<Result<IstioCertificateResponse, Status>> {
        match self {
            Self::NoResponse => None,
            Self::Denied => Some(Err(Status::permission_denied("denied by the test"))),
            other => {
                let chain = other.chain(request, authority, ttl);
                let chain = chain.map_err(|error| Status::internal(format!("{error:#}")));
                Some(chain.map(|cert_chain| IstioCertificateResponse { cert_chain }))
            }
        }
    }

    fn chain(
        self,
        request: &IstioCertificateRequest,
        authority: &SigningCa,
        ttl: Duration,
    ) -> Result<Vec<String>> {
        let now = SystemTime::now();
        let identity = requested_identity(request).context("no identity")?;
        let csr = CertificateSigningRequestParams::from_pem(&request.csr).context("CSR")?;
        let name = |identity: &str| Ok::<_, rcgen::Error>(SanType::URI(identity.try_into()?));
        let other_identity = format!("{identity}-other");
        let leaf = match self {
            Self::WrongIdentity => {
                authority.leaf(name(&other_identity)?, &csr.public_key, now + ttl)?
            }
            Self::Expired => {
                let ended = now - Duration::from_secs(60);
                authority.leaf(name(identity)?, &csr.public_key, ended)?
            }
            Self::Untrusted => {
                SigningCa::new()?.leaf(name(identity)?, &csr.public_key, now + ttl)?
            }
            Self::WrongKey => authority.leaf(name(identity)?, &KeyPair::generate()?, now + ttl)?,
            _ => authority.leaf(name(identity)?, &csr.public_key, now + ttl)?,
        };
        let mut chain = vec![leaf.pem()];
        match self {
            Self::Garbage => chain = vec!["-----BEGIN NOTHING-----\nnot a certificate".to_owned()],
            Self::ChainTooLong => {
                let extra = SigningCa::new()?.leaf(name(identity)?, &csr.public_key, now + ttl)?;
                chain.extend(std::iter::repeat_n(extra.pem(), EXTRA_CERTIFICATES));
            }
            _ => {}
        }
        chain.push(authority.certificate.pem());
        Ok(chain)
    }
}
