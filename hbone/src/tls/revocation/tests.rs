use super::*;
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer,
    KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
};
use time::OffsetDateTime;
use time::ext::NumericalDuration;

struct Ca(Issuer<'static, KeyPair>);

impl Ca {
    fn with_name(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::CrlSign];
        Self(Issuer::new(params, KeyPair::generate().unwrap()))
    }

    fn leaf(&self, serial: &[u8]) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.serial_number = Some(SerialNumber::from_slice(serial));
        let key = KeyPair::generate().unwrap();
        params.signed_by(&key, &self.0).unwrap().der().clone()
    }

    fn list(&self, serials: &[&[u8]]) -> rcgen::CertificateRevocationList {
        let now = OffsetDateTime::now_utc();
        let revoked = |serial: &&[u8]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now + 1.days(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap()
    }
}

#[test]
fn certificate_is_revoked_only_by_the_list_of_its_issuer() {
    let (ca, other) = (Ca::with_name("one"), Ca::with_name("two"));
    let revocations = Revocations::none();
    revocations.replace(ca.list(&[&[7]]).der()).unwrap();
    assert!(revocations.is_revoked([&ca.leaf(&[7])]));
    assert!(!revocations.is_revoked([&ca.leaf(&[8])]));
    assert!(!revocations.is_revoked([&other.leaf(&[7])]));
    // At any position of the chain.
    assert!(revocations.is_revoked([&other.leaf(&[1]), &ca.leaf(&[7])]));
}

#[test]
fn lists_of_one_pem_file_are_merged() {
    let (ca, other) = (Ca::with_name("one"), Ca::with_name("two"));
    let pem = ca.list(&[&[7], &[8]]).pem().unwrap() + &other.list(&[&[9]]).pem().unwrap();
    let revocations = Revocations::none();
    revocations.replace(pem.as_bytes()).unwrap();
    assert_eq!(revocations.len(), 3);
    assert!(revocations.is_revoked([&other.leaf(&[9])]));
}

#[test]
fn unreadable_content_keeps_the_previous_list() {
    let ca = Ca::with_name("one");
    let revocations = Revocations::none();
    let good = ca.list(&[&[7]]);
    revocations.replace(good.der()).unwrap();
    let half = &good.der()[..good.der().len() / 2];
    for content in [
        &b""[..],
        b"garbage",
        half,
        b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    ] {
        assert!(revocations.replace(content).is_err());
        assert!(revocations.is_revoked([&ca.leaf(&[7])]));
    }
    revocations.replace(ca.list(&[]).der()).unwrap();
    assert!(!revocations.is_revoked([&ca.leaf(&[7])]));
}

#[tokio::test]
async fn revoked_resolves_for_the_own_serial_only() {
    let ca = Ca::with_name("one");
    let revocations = Revocations::none();
    let serials = PeerCertSerials::new(&[ca.leaf(&[7])], &revocations);
    let mut revoked = std::pin::pin!(serials.revoked());
    assert!(futures_util::poll!(&mut revoked).is_pending());
    revocations.replace(ca.list(&[&[8]]).der()).unwrap();
    assert!(futures_util::poll!(&mut revoked).is_pending());
    revocations.replace(ca.list(&[&[7]]).der()).unwrap();
    revoked.await;
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(content in prop::collection::vec(any::<u8>(), 0..300)) {
        let revocations = Revocations::none();
        let _ = revocations.replace(&content);
        let der = [&[0x30, 0x82][..], &content].concat();
        let _ = revocations.replace(&der);
        revocations.is_revoked([&CertificateDer::from(content)]);
    }
}
