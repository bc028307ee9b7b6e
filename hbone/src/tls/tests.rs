use super::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};

fn authority() -> (CertificateDer<'static>, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap().der().clone();
    (root, Issuer::new(params, key))
}

fn leaf_with(names: Vec<SanType>, ca: IsCa) -> Credentials {
    leaf_for(names, ca, &[])
}

fn leaf_for(names: Vec<SanType>, ca: IsCa, usages: &[KeyUsagePurpose]) -> Credentials {
    let (root, issuer) = authority();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.subject_alt_names = names;
    params.is_ca = ca;
    params.key_usages = usages.to_vec();
    let leaf = params.signed_by(&key, &issuer).unwrap();
    Credentials {
        chain: vec![leaf.der().clone()],
        key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        roots: vec![root],
        revocations: Revocations::none(),
    }
}

fn uri(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

#[test]
fn certificate_with_one_spiffe_id_has_that_identity() {
    let credentials = leaf_with(vec![uri("spiffe://td/ns/a/sa/b")], IsCa::NoCa);
    let expected = SpiffeId::new("spiffe://td/ns/a/sa/b").unwrap();
    assert_eq!(ClientTls::new(&credentials).unwrap().identity(), &expected);
    assert_eq!(ServerTls::new(&credentials).unwrap().identity(), &expected);
}

#[test]
fn leaf_with_signing_key_usage_is_rejected() {
    let leaf = |usages: &[KeyUsagePurpose]| {
        let name = vec![uri("spiffe://td/ns/a/sa/b")];
        let credentials = leaf_for(name, IsCa::NoCa, usages);
        svid::spiffe_id(&credentials.chain[0])
    };
    let with = |usage| leaf(&[KeyUsagePurpose::DigitalSignature, usage]);
    assert!(leaf(&[KeyUsagePurpose::DigitalSignature]).is_ok());
    assert!(with(KeyUsagePurpose::KeyEncipherment).is_ok());
    assert_eq!(
        with(KeyUsagePurpose::KeyCertSign),
        Err(SvidError::SigningKey)
    );
    assert_eq!(with(KeyUsagePurpose::CrlSign), Err(SvidError::SigningKey));
}

#[test]
fn certificate_that_is_not_an_svid_is_rejected() {
    let dns = SanType::DnsName("a.example".try_into().unwrap());
    let two = vec![uri("spiffe://td/a"), uri("spiffe://td/b")];
    let long = format!("spiffe://td/{}", "a".repeat(2048));
    for names in [
        vec![],
        vec![dns],
        two,
        vec![uri("https://td/a")],
        vec![uri("spiffe://td")],
        vec![uri("spiffe://td/a/")],
        vec![uri("spiffe://td/a?b")],
        vec![uri(&long)],
    ] {
        let credentials = leaf_with(names.clone(), IsCa::NoCa);
        assert!(
            matches!(ClientTls::new(&credentials), Err(TlsError::Identity(_))),
            "{names:?}"
        );
    }
    let authority = leaf_with(
        vec![uri("spiffe://td/a")],
        IsCa::Ca(BasicConstraints::Unconstrained),
    );
    assert!(matches!(
        ServerTls::new(&authority),
        Err(TlsError::Identity(_))
    ));
}

#[test]
fn inconsistent_credentials_are_rejected() {
    let mut credentials = leaf_with(vec![uri("spiffe://td/a")], IsCa::NoCa);
    let other = leaf_with(vec![uri("spiffe://td/a")], IsCa::NoCa);
    credentials.key = other.key.clone_key();
    assert!(matches!(
        ClientTls::new(&credentials),
        Err(TlsError::Key(_))
    ));
    credentials.roots.clear();
    assert!(matches!(
        ServerTls::new(&credentials),
        Err(TlsError::NoRoots)
    ));
    credentials.chain.clear();
    assert!(matches!(
        ServerTls::new(&credentials),
        Err(TlsError::Identity(_))
    ));
}

#[test]
fn debug_output_omits_the_key() {
    let credentials = leaf_with(vec![uri("spiffe://td/a")], IsCa::NoCa);
    assert_eq!(
        format!("{credentials:?}"),
        "Credentials { chain: 1, key: \"redacted\", roots: 1, revocations: Revocations { certificates: 0 } }"
    );
    let tls = ClientTls::new(&credentials).unwrap();
    assert_eq!(format!("{tls:?}"), "ClientTls(spiffe://td/a)");
}

#[test]
fn configurations_are_send_and_sync() {
    fn assert_shared<T: Send + Sync + Clone>() {}
    assert_shared::<ClientTls>();
    assert_shared::<ServerTls>();
}
