use std::path::Path;

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
        steady: Instant::now(),
    }
}

/// A root whose key is ours, so that it signs anything.
struct Forge {
    root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Forge {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let params = authority("root");
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            root,
            issuer: Issuer::new(params, key),
        }
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle::new([self.root.clone()]).unwrap()
    }

    /// A leaf that is as it should be, but for what `change` makes of it.
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

    fn answer(
        &self,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<Certificate, IssueError> {
        verify(self.issue(change), &web(), &self.bundle(), now())
    }
}

fn authority(name: &str) -> CertificateParams {
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
fn a_certificate_as_it_should_be_is_taken_with_what_it_says() {
    let certificate = Forge::new().answer(|_| {}).unwrap();
    assert_eq!(certificate.identity, web());
    assert!(certificate.not_before < SystemTime::now());
    assert!(certificate.not_after > SystemTime::now());
    assert!(!certificate.serial.is_empty());
}

#[test]
fn any_name_but_exactly_the_identity_is_refused() {
    let forge = Forge::new();
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
        let shown = format!("{names:?}");
        let outcome = forge.answer(|params| params.subject_alt_names = names);
        assert_eq!(code(outcome), "wrong_identity", "{shown}");
    }
}

#[test]
fn one_that_has_expired_or_begins_far_in_the_future_is_refused() {
    let forge = Forge::new();
    let until = |end: SystemTime| forge.answer(|params| params.not_after = end.into());
    assert_eq!(code(until(SystemTime::now() - HOUR / 2)), "issued_expired");
    let from = |start: SystemTime| forge.answer(|params| params.not_before = start.into());
    assert_eq!(code(from(SystemTime::now() + HOUR / 2)), "issued_in_future");
    // Whoever issued it has a clock that is ahead by less than clocks may be.
    from(SystemTime::now() + SKEW - Duration::from_secs(2)).unwrap();
    let backwards = forge.answer(|params| {
        params.not_before = (SystemTime::now() + SKEW / 2).into();
        params.not_after = (SystemTime::now() + SKEW / 3).into();
    });
    assert_eq!(code(backwards), "issued_expired");
}

#[test]
fn a_key_that_is_not_the_leafs_is_refused() {
    let forge = Forge::new();
    let mut issued = forge.issue(|_| {});
    issued.key = forge.issue(|_| {}).key;
    assert_eq!(
        code(verify(issued, &web(), &forge.bundle(), now())),
        "key_mismatch"
    );
}

#[test]
fn garbage_is_called_that() {
    let forge = Forge::new();
    let with = |change: fn(&mut IssuedCertificate)| {
        let mut issued = forge.issue(|_| {});
        change(&mut issued);
        code(verify(issued, &web(), &forge.bundle(), now()))
    };
    let garbage = "issued_garbage";
    assert_eq!(with(|issued| issued.chain.clear()), garbage);
    assert_eq!(
        with(|issued| issued.chain[0] = b"no DER".to_vec().into()),
        garbage
    );
    assert_eq!(
        with(|issued| issued.chain.push(vec![0x30; 40].into())),
        garbage
    );
    assert_eq!(
        with(|issued| issued.key = Zeroizing::new(vec![1, 2, 3])),
        garbage
    );
    assert_eq!(with(|issued| issued.key = Zeroizing::default()), garbage);
    let trailing = with(|issued| {
        let mut leaf = issued.chain[0].to_vec();
        leaf.push(0);
        issued.chain[0] = leaf.into();
    });
    assert_eq!(trailing, garbage);
    let authority = forge.answer(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(code(authority), garbage);
}

#[test]
fn a_chain_is_refused_for_its_length_before_it_is_looked_at() {
    let forge = Forge::new();
    let mut issued = forge.issue(|_| {});
    issued
        .chain
        .resize(MAX_CHAIN + 1, b"no DER".to_vec().into());
    assert_eq!(
        code(verify(issued, &web(), &forge.bundle(), now())),
        "chain_too_long"
    );
    let mut issued = forge.issue(|_| {});
    issued.chain.push(vec![0; MAX_CHAIN_BYTES].into());
    assert_eq!(
        code(verify(issued, &web(), &forge.bundle(), now())),
        "chain_too_long"
    );
}

#[test]
fn a_chain_to_other_roots_or_with_a_gap_is_refused() {
    let (ours, theirs) = (Forge::new(), Forge::new());
    let untrusted = "chain_untrusted";
    let foreign = verify(theirs.issue(|_| {}), &web(), &ours.bundle(), now());
    assert_eq!(code(foreign), untrusted);
    // Its own root beside it makes it no better.
    let mut issued = theirs.issue(|_| {});
    issued.chain.push(theirs.root.clone());
    assert_eq!(
        code(verify(issued, &web(), &ours.bundle(), now())),
        untrusted
    );
    let unknown = verify(ours.issue(|_| {}), &web(), &TrustBundle::default(), now());
    assert_eq!(code(unknown), untrusted);
    let server = ours.answer(|params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    assert_eq!(code(server), untrusted, "it has to be a client too");
}

#[test]
fn intermediates_are_kept_and_roots_are_not_sent() {
    let forge = Forge::new();
    let key = KeyPair::generate().unwrap();
    let between = authority("between").signed_by(&key, &forge.issuer).unwrap();
    let below = Forge {
        root: forge.root.clone(),
        issuer: Issuer::new(authority("between"), key),
    };
    let mut issued = below.issue(|_| {});
    assert_eq!(
        code(verify(below.issue(|_| {}), &web(), &forge.bundle(), now())),
        "chain_untrusted",
        "with a gap"
    );
    issued
        .chain
        .extend([between.der().clone(), forge.root.clone()]);
    let certificate = verify(issued, &web(), &forge.bundle(), now()).unwrap();
    assert_eq!(certificate.chain.len(), 2);
    assert_eq!(certificate.chain[1], *between.der());
}

#[test]
fn what_our_own_authority_issues_passes_with_clocks_five_minutes_apart() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(Path::new(folder.path())).unwrap();
    let here = now();
    for theirs in [here.wall - SKEW, here.wall, here.wall + SKEW] {
        let issued = authority.issue(&web(), crate::certs::Validity::new(theirs, HOUR));
        verify(issued.unwrap(), &web(), authority.bundle(), here).unwrap();
    }
}

#[test]
fn neither_an_answer_nor_a_certificate_prints_its_key() {
    let forge = Forge::new();
    let issued = forge.issue(|_| {});
    let key = format!("{:?}", &issued.key[40..60]);
    let printed = format!("{issued:?}");
    let certificate = verify(issued, &web(), &forge.bundle(), now()).unwrap();
    let printed = format!("{printed} {certificate:?} {certificate:#?}");
    assert!(printed.contains("redacted") && !printed.contains(key.trim_matches(['[', ']'])));
}

proptest::proptest! {
    /// Whatever is changed in an answer, what comes of it is a refusal, or the same certificate.
    #[test]
    fn an_answer_with_other_bytes_is_never_another_certificate(
        at in proptest::num::usize::ANY,
        with in proptest::num::u8::ANY,
        cut in proptest::num::usize::ANY,
    ) {
        let forge = &*FORGE;
        let mut issued = forge.issue(|_| {});
        let good = issued.chain[0].to_vec();
        let mut bytes = good.clone();
        let at = at % bytes.len();
        bytes[at] = with;
        if cut % 4 == 0 {
            bytes.truncate(cut % bytes.len());
        }
        issued.chain[0] = bytes.into();
        if let Ok(certificate) = verify(issued, &web(), &forge.bundle(), now()) {
            assert_eq!(certificate.chain[0].to_vec(), good);
        }
    }
}

static FORGE: std::sync::LazyLock<Forge> = std::sync::LazyLock::new(Forge::new);
