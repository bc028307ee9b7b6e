//! Certificates and revocation lists for both ends.

use std::sync::LazyLock;
use std::time::Duration;

use hbone::{ClientTls, Credentials, Revocations, ServerTls};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::SpiffeId;
use time::OffsetDateTime;

pub const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";

pub const SERVER: &str = "spiffe://cluster.local/ns/b/sa/server";

pub fn id(uri: &str) -> SpiffeId {
    SpiffeId::new(uri).unwrap()
}

/// A certificate authority.
pub struct Ca {
    pub root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            root,
            issuer: Issuer::new(params, key),
        }
    }

    pub fn issue(&self, identity: &str) -> Credentials {
        self.issue_with(vec![identity], |_| {})
    }

    pub fn issue_with(
        &self,
        uris: Vec<&str>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Credentials {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = uris
            .into_iter()
            .map(|uri| SanType::URI(uri.try_into().unwrap()))
            .collect();
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Credentials {
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            roots: vec![self.root.clone()],
            revocations: Revocations::none(),
        }
    }

    /// A revocation list with the certificate of these credentials.
    pub fn revoke(&self, credentials: &Credentials) -> Vec<u8> {
        let (_, leaf) = x509_parser::parse_x509_certificate(&credentials.chain[0]).unwrap();
        let now = OffsetDateTime::now_utc();
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from_slice(leaf.raw_serial()),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Duration::from_secs(3600),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

/// The CA of both ends.
pub static CA: LazyLock<Ca> = LazyLock::new(Ca::new);

pub fn client_tls() -> ClientTls {
    ClientTls::new(&CA.issue(CLIENT)).unwrap()
}

pub fn server_tls() -> ServerTls {
    ServerTls::new(&CA.issue(SERVER)).unwrap()
}
