use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};

use super::*;

fn certificate(is_ca: IsCa) -> rcgen::Certificate {
    let mut params = CertificateParams::default();
    params.is_ca = is_ca;
    params.self_signed(&KeyPair::generate().unwrap()).unwrap()
}

fn root() -> rcgen::Certificate {
    certificate(IsCa::Ca(BasicConstraints::Unconstrained))
}

#[test]
fn duplicate_roots_are_removed() {
    let (a, b) = (root(), root());
    let text = format!("{}a comment\n{}{}", a.pem(), b.pem(), a.pem());
    let bundle = TrustBundle::from_pem(text.as_bytes()).unwrap();
    assert_eq!(bundle.roots(), [a.der().clone(), b.der().clone()]);
    assert!(bundle.earliest_expiry().is_some());
}

#[test]
fn one_unusable_root_makes_the_bundle_an_error() {
    let good = root().pem();
    let leaf = certificate(IsCa::NoCa).pem();
    let malformed = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let truncated = "-----BEGIN CERTIFICATE-----\nAAAA\n";
    for text in [
        String::new(),
        "not PEM".to_owned(),
        leaf.clone(),
        malformed.to_owned(),
        // A bundle without one of its roots would reject trusted peers.
        format!("{good}{leaf}"),
        format!("{good}{malformed}"),
        format!("{good}{truncated}"),
    ] {
        assert!(TrustBundle::from_pem(text.as_bytes()).is_err(), "{text}");
    }
    assert!(matches!(
        TrustBundle::new((0..=MAX_ROOTS).map(|_| root().der().clone())),
        Err(BundleError::TooMany)
    ));
}
