use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, PublicKeyData, RsaKeySize,
    SignatureAlgorithm,
};

use super::super::account::{Account, Accounts};
use super::*;

fn request(pair: &KeyPair) -> String {
    let params = CertificateParams::default();
    params.serialize_request(pair).unwrap().pem().unwrap()
}

fn pair(algorithm: &'static SignatureAlgorithm) -> KeyPair {
    KeyPair::generate_for(algorithm).unwrap()
}

fn caller(impersonate: &[&str]) -> Caller {
    Caller {
        account: Account::new("istio-system", "ztunnel").unwrap(),
        may_speak_for: Accounts::parse(impersonate).unwrap(),
    }
}

fn asks(kind: Kind) -> Option<Struct> {
    let value = prost_types::Value { kind: Some(kind) };
    Some(Struct {
        fields: [(IMPERSONATED.to_owned(), value)].into(),
    })
}

fn decided(metadata: Option<&Struct>, impersonate: &[&str]) -> Result<String, &'static str> {
    let domain = TrustDomain::new("cluster.local").unwrap();
    identity(metadata, &caller(impersonate), &domain)
        .map(|identity| identity.to_string())
        .map_err(|refusal| refusal.reason)
}

fn named(text: &str) -> Option<Struct> {
    asks(Kind::StringValue(text.to_owned()))
}

#[test]
fn whoever_names_nobody_gets_its_own_identity() {
    let own = Ok("spiffe://cluster.local/ns/istio-system/sa/ztunnel".to_owned());
    assert_eq!(decided(None, &[]), own);
    assert_eq!(decided(Some(&Struct::default()), &[]), own);
    assert_eq!(decided(named("").as_ref(), &[]), own);
    assert_eq!(decided(asks(Kind::NullValue(0)).as_ref(), &[]), own);
}

#[test]
fn whoever_names_an_identity_gets_it_only_if_it_may() {
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(decided(named(web).as_ref(), &["shop/web"]), Ok(web.into()));
    assert_eq!(decided(named(web).as_ref(), &["*/*"]), Ok(web.into()));
    assert_eq!(decided(named(web).as_ref(), &[]), Err("not_allowed"));
    assert_eq!(
        decided(named(web).as_ref(), &["bank/*"]),
        Err("not_allowed")
    );
}

#[test]
fn what_is_no_identity_of_this_trust_domain_is_refused_whatever_the_caller_may() {
    let foreign = "spiffe://other.example/ns/shop/sa/web";
    let all = ["*/*"];
    assert_eq!(
        decided(named(foreign).as_ref(), &all),
        Err("foreign_trust_domain")
    );
    for malformed in [
        "web",
        "https://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/sa/",
        "spiffe://cluster.local/ns/shop/sa/web/",
        "spiffe://cluster.local/ns/shop/sa/web?x=y",
        "spiffe://cluster.local/ns/../sa/web",
        "spiffe://cluster.local/ns/%2e/sa/web",
        "spiffe://cluster.local/ns/*/sa/*",
        "spiffe://cluster.local/waypoint",
        "spiffe://cluster.local",
    ] {
        let decided = decided(named(malformed).as_ref(), &all);
        assert_eq!(decided, Err("identity_malformed"), "{malformed}");
    }
    let number = asks(Kind::NumberValue(1.0));
    assert_eq!(decided(number.as_ref(), &all), Err("identity_malformed"));
}

#[test]
fn a_life_is_cut_at_the_most_defaulted_when_open_and_refused_below_the_least() {
    let limits = Limits {
        min_ttl: Duration::from_secs(10),
        default_ttl: Duration::from_secs(100),
        max_ttl: Duration::from_secs(1000),
    };
    let seconds = |asked| {
        ttl(asked, &limits)
            .map(|ttl| ttl.as_secs())
            .map_err(|refusal| refusal.reason)
    };
    for (asked, got) in [
        (0, 100),
        (-1, 100),
        (i64::MIN, 100),
        (10, 10),
        (1000, 1000),
        (1001, 1000),
        (i64::MAX, 1000),
    ] {
        assert_eq!(seconds(asked), Ok(got), "{asked}");
    }
    assert_eq!(seconds(9), Err("ttl_too_short"));
}

#[test]
fn the_key_of_a_request_is_taken_and_nothing_else() {
    let p256 = pair(&PKCS_ECDSA_P256_SHA256);
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params
        .distinguished_name
        .push(DnType::CommonName, "evil.example");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let greedy = params.serialize_request(&p256).unwrap().pem().unwrap();
    let taken = key(&greedy).unwrap();
    assert_eq!(taken.der_bytes(), p256.der_bytes());
    for pair in [
        pair(&PKCS_ECDSA_P384_SHA384),
        KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap(),
    ] {
        assert_eq!(key(&request(&pair)).unwrap().der_bytes(), pair.der_bytes());
    }
}

#[test]
fn a_key_of_another_kind_is_refused() {
    let refused = key(&request(&pair(&PKCS_ED25519))).unwrap_err();
    assert_eq!(refused.reason, "csr_key");
}

#[test]
fn a_request_that_is_not_signed_with_its_own_key_is_refused() {
    let pem = request(&pair(&PKCS_ECDSA_P256_SHA256));
    let mut der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .unwrap()
        .to_vec();
    // The signature is what comes last.
    *der.last_mut().unwrap() ^= 1;
    let forged = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
    assert_eq!(key(&forged).unwrap_err().reason, "csr_signature");
}

#[test]
fn garbage_is_refused_whatever_its_size() {
    let good = request(&pair(&PKCS_ECDSA_P256_SHA256));
    for garbage in [
        "",
        "garbage",
        "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        &good.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
        &good[..good.len() / 2],
        &"x".repeat(1 << 20),
    ] {
        assert_eq!(key(garbage).unwrap_err().reason, "csr_malformed");
    }
}
