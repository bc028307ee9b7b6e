mod properties;

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, SanType,
};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::*;
use crate::certs::Authority;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const HOUR: Duration = Duration::from_secs(3600);

fn web() -> SpiffeId {
    WEB.parse().unwrap()
}

fn now() -> Now {
    Now {
        wall: SystemTime::now(),
        monotonic: Instant::now(),
    }
}

/// A root with its key, which signs any leaf.
struct TestCa {
    root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let params = ca_params("root");
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            root,
            issuer: Issuer::new(params, key),
        }
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle::new([self.root.clone()]).unwrap()
    }

    /// A valid leaf, modified by `change`.
    fn issue(&self, change: impl FnOnce(&mut CertificateParams)) -> IssuedCertificate {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![uri(WEB)];
        params.not_before = (SystemTime::now() - HOUR).into();
        params.not_after = (SystemTime::now() + HOUR).into();
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        IssuedCertificate {
            chain: vec![leaf.der().clone()],
            key: Zeroizing::new(key.serialize_der()),
        }
    }

    fn verify_leaf(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<Certificate, IssueError> {
        verify_response(self.issue(change), &web(), &self.bundle(), now())
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn code(outcome: Result<Certificate, IssueError>) -> &'static str {
    outcome.unwrap_err().code
}

#[test]
fn a_valid_response_is_accepted() {
    let certificate = TestCa::new().verify_leaf(|_| {}).unwrap();
    assert_eq!(certificate.identity, web());
    assert!(certificate.not_before < SystemTime::now());
    assert!(certificate.not_after > SystemTime::now());
    assert!(!certificate.serial.is_empty());
}

#[test]
fn any_name_other_than_the_identity_is_rejected() {
    let ca = TestCa::new();
    let other = "spiffe://cluster.local/ns/shop/sa/db";
    let dns = || SanType::DnsName("web.shop.svc".try_into().unwrap());
    for names in [
        vec![],
        vec![dns()],
        vec![uri(other)],
        vec![uri(WEB), uri(other)],
        vec![uri(WEB), uri(WEB)],
        vec![uri(WEB), dns()],
        vec![uri(&format!("{WEB}/"))],
        vec![uri("spiffe://CLUSTER.local/ns/shop/sa/web")],
    ] {
        let text = format!("{names:?}");
        let outcome = ca.verify_leaf(|params| params.subject_alt_names = names);
        assert_eq!(code(outcome), "wrong_identity", "{text}");
    }
}

#[test]
fn an_expired_or_future_leaf_is_rejected() {
    let ca = TestCa::new();
    let until = |end: SystemTime| ca.verify_leaf(|params| params.not_after = end.into());
    assert_eq!(code(until(SystemTime::now() - HOUR / 2)), "issued_expired");
    let from = |start: SystemTime| ca.verify_leaf(|params| params.not_before = start.into());
    assert_eq!(code(from(SystemTime::now() + HOUR / 2)), "issued_in_future");
    // The clock of the CA may be ahead by up to MAX_CLOCK_SKEW.
    from(SystemTime::now() + MAX_CLOCK_SKEW - Duration::from_secs(2)).unwrap();
    let backwards = ca.verify_leaf(|params| {
        params.not_before = (SystemTime::now() + MAX_CLOCK_SKEW / 2).into();
        params.not_after = (SystemTime::now() + MAX_CLOCK_SKEW / 3).into();
    });
    assert_eq!(code(backwards), "issued_expired");
}

#[test]
fn a_key_of_another_leaf_is_rejected() {
    let ca = TestCa::new();
    let mut issued = ca.issue(|_| {});
    issued.key = ca.issue(|_| {}).key;
    assert_eq!(
        code(verify_response(issued, &web(), &ca.bundle(), now())),
        "key_mismatch"
    );
}

#[test]
fn malformed_responses_are_rejected() {
    let ca = TestCa::new();
    let with = |change: fn(&mut IssuedCertificate)| {
        let mut issued = ca.issue(|_| {});
        change(&mut issued);
        code(verify_response(issued, &web(), &ca.bundle(), now()))
    };
    let malformed = "issued_garbage";
    assert_eq!(with(|issued| issued.chain.clear()), malformed);
    assert_eq!(
        with(|issued| issued.chain[0] = b"not DER".to_vec().into()),
        malformed
    );
    assert_eq!(
        with(|issued| issued.chain.push(vec![0x30; 40].into())),
        malformed
    );
    assert_eq!(
        with(|issued| issued.key = Zeroizing::new(vec![1, 2, 3])),
        malformed
    );
    assert_eq!(with(|issued| issued.key = Zeroizing::default()), malformed);
    let trailing = with(|issued| {
        let mut leaf = issued.chain[0].to_vec();
        leaf.push(0);
        issued.chain[0] = leaf.into();
    });
    assert_eq!(trailing, malformed);
    let authority =
        ca.verify_leaf(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(code(authority), malformed);
}

#[test]
fn an_oversized_chain_is_rejected_before_parsing() {
    let ca = TestCa::new();
    let mut issued = ca.issue(|_| {});
    issued
        .chain
        .resize(MAX_CHAIN_CERTIFICATES + 1, b"not DER".to_vec().into());
    assert_eq!(
        code(verify_response(issued, &web(), &ca.bundle(), now())),
        "chain_too_long"
    );
    let mut issued = ca.issue(|_| {});
    issued.chain.push(vec![0; MAX_CHAIN_BYTES].into());
    assert_eq!(
        code(verify_response(issued, &web(), &ca.bundle(), now())),
        "chain_too_long"
    );
}

#[test]
fn a_chain_to_other_roots_is_rejected() {
    let (own, other) = (TestCa::new(), TestCa::new());
    let untrusted = "chain_untrusted";
    let foreign = verify_response(other.issue(|_| {}), &web(), &own.bundle(), now());
    assert_eq!(code(foreign), untrusted);
    // The root at the end of the chain is not trusted.
    let mut issued = other.issue(|_| {});
    issued.chain.push(other.root.clone());
    assert_eq!(
        code(verify_response(issued, &web(), &own.bundle(), now())),
        untrusted
    );
    let unknown = verify_response(own.issue(|_| {}), &web(), &TrustBundle::default(), now());
    assert_eq!(code(unknown), untrusted);
    let server = own.verify_leaf(|params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    assert_eq!(
        code(server),
        untrusted,
        "client authentication is required too"
    );
}

#[test]
fn intermediates_are_kept_and_roots_are_removed() {
    let ca = TestCa::new();
    let key = KeyPair::generate().unwrap();
    let intermediate = ca_params("intermediate")
        .signed_by(&key, &ca.issuer)
        .unwrap();
    let intermediate_ca = TestCa {
        root: ca.root.clone(),
        issuer: Issuer::new(ca_params("intermediate"), key),
    };
    let mut issued = intermediate_ca.issue(|_| {});
    assert_eq!(
        code(verify_response(
            intermediate_ca.issue(|_| {}),
            &web(),
            &ca.bundle(),
            now()
        )),
        "chain_untrusted",
        "without the intermediate"
    );
    issued
        .chain
        .extend([intermediate.der().clone(), ca.root.clone()]);
    let certificate = verify_response(issued, &web(), &ca.bundle(), now()).unwrap();
    assert_eq!(certificate.chain.len(), 2);
    assert_eq!(certificate.chain[1], *intermediate.der());
}

#[test]
fn certificates_of_the_local_ca_pass_with_clocks_five_minutes_apart() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(folder.path()).unwrap();
    let local = now();
    for ca_time in [
        local.wall - MAX_CLOCK_SKEW,
        local.wall,
        local.wall + MAX_CLOCK_SKEW,
    ] {
        let issued = authority.issue(&web(), crate::certs::Validity::new(ca_time, HOUR));
        verify_response(issued.unwrap(), &web(), authority.bundle(), local).unwrap();
    }
}

#[test]
fn debug_output_contains_no_key() {
    let ca = TestCa::new();
    let issued = ca.issue(|_| {});
    let key = format!("{:?}", &issued.key[40..60]);
    let printed = format!("{issued:?}");
    let certificate = verify_response(issued, &web(), &ca.bundle(), now()).unwrap();
    let printed = format!("{printed} {certificate:?} {certificate:#?}");
    assert!(printed.contains("redacted") && !printed.contains(key.trim_matches(['[', ']'])));
}
