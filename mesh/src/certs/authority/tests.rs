use std::fs;
use std::os::unix::fs::PermissionsExt;

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;
use crate::certs::verify::{at, chains};

fn ca() -> (tempfile::TempDir, Authority) {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::create(&dir.path().join("ca")).unwrap();
    (dir, ca)
}

fn for_an_hour() -> Validity {
    Validity::new(SystemTime::now(), HOUR)
}

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_leaf_says_who_it_is_and_nothing_else() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), for_an_hour()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&certificate.chain[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(san.critical, "the subject is empty (RFC 5280, 4.2.1.6)");
    let expected = [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")];
    assert_eq!(san.value.general_names, expected);
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(!leaf.is_ca());
    let eku = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(eku.client_auth && eku.server_auth && !eku.any);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let ec = leaf.public_key().parsed().unwrap();
    assert_eq!(ec.key_size(), 256);
    assert_eq!(certificate.chain.len(), 1);
}

#[test]
fn a_leaf_chains_to_the_root_it_comes_with() {
    let (_dir, ca) = ca();
    let issued = ca.issue(&web(), for_an_hour()).unwrap();
    chains(&issued.chain, ca.bundle(), SystemTime::now()).unwrap();
    let (_, root) = X509Certificate::from_der(&ca.bundle().roots()[0]).unwrap();
    let constraints = root.basic_constraints().unwrap().unwrap().value;
    assert!(constraints.ca && constraints.path_len_constraint == Some(0));
}

#[test]
fn a_leaf_is_valid_from_before_now_until_its_ttl() {
    let (_dir, ca) = ca();
    let now = SystemTime::now();
    let issued = ca.issue(&web(), Validity::new(now, HOUR)).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let close = |a: SystemTime, b: SystemTime| {
        let apart = a.duration_since(b).or_else(|_| b.duration_since(a));
        apart.unwrap() <= Duration::from_secs(1)
    };
    assert!(close(
        at(leaf.validity().not_before.timestamp()),
        now - BACKDATE
    ));
    assert!(close(at(leaf.validity().not_after.timestamp()), now + HOUR));
    assert!(
        BACKDATE >= Duration::from_secs(300),
        "for clocks that are behind"
    );
}

#[test]
fn every_leaf_has_its_own_key_and_serial_number() {
    let (_dir, ca) = ca();
    let [a, b] = [(), ()].map(|()| ca.issue(&web(), for_an_hour()).unwrap());
    let serial = |issued: &IssuedCertificate| {
        let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        leaf.raw_serial().to_vec()
    };
    assert_ne!(serial(&a), serial(&b));
    assert_ne!(*a.key, *b.key);
}

#[test]
fn no_leaf_outlives_its_authority() {
    let (_dir, ca) = ca();
    let validity = Validity::new(SystemTime::now(), 100 * ROOT_TTL);
    let issued = ca.issue(&web(), validity).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(at(leaf.validity().not_after.timestamp()), ca.not_after());
}

#[test]
fn a_public_key_is_certified_for_the_identity_that_is_given_and_no_other() {
    let (_dir, ca) = ca();
    let key = new_key().unwrap();
    let chain = ca.sign(&key, &web(), for_an_hour()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    let expected = [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")];
    assert_eq!(names.value.general_names, expected);
}

#[test]
fn a_server_has_the_names_it_is_given_and_is_no_client() {
    let (_dir, ca) = ca();
    let name = SanType::DnsName("ca.example".try_into().unwrap());
    let chain = ca
        .sign_server(&new_key().unwrap(), vec![name], for_an_hour())
        .unwrap();
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(
        names.value.general_names,
        [GeneralName::DNSName("ca.example")]
    );
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && !usage.client_auth);
}

#[test]
fn the_key_is_never_printed() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), for_an_hour()).unwrap();
    let printed = format!("{certificate:?} {ca:?}");
    assert!(printed.contains("redacted"));
    let key = certificate.key();
    let hex: String = key.secret_der()[40..60]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let list = format!("{:?}", &key.secret_der()[40..60]);
    assert!(!printed.contains(&hex) && !printed.contains(list.trim_matches(['[', ']'])));
}

#[test]
fn what_was_created_is_opened_again() {
    let (dir, first) = ca();
    let again = Authority::open(&dir.path().join("ca")).unwrap();
    assert!(first == again);
}

#[test]
fn only_the_owner_may_read_the_key() {
    let (dir, _) = ca();
    let key = dir.path().join("ca/ca-key.pem");
    assert_eq!(
        fs::metadata(&key).unwrap().permissions().mode() & 0o777,
        0o600
    );
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let error = Authority::open(&dir.path().join("ca")).unwrap_err();
    assert!(
        matches!(error, AuthorityError::KeyIsOpen { mode: 0o644, .. }),
        "{error}"
    );
}

#[test]
fn create_never_overwrites() {
    let (dir, first) = ca();
    let dir = dir.path().join("ca");
    for file in ["root-cert.pem", "ca-key.pem"] {
        assert!(
            matches!(Authority::create(&dir), Err(AuthorityError::Exists { .. })),
            "{file}"
        );
        assert!(Authority::open(&dir).unwrap() == first);
    }
    fs::remove_file(dir.join("root-cert.pem")).unwrap();
    assert!(
        matches!(Authority::create(&dir), Err(AuthorityError::Exists { .. })),
        "a key alone"
    );
}

/// A root, and an authority below it, with their keys.
struct Pair {
    root: (rcgen::Certificate, Issuer<'static, KeyPair>),
    below: (rcgen::Certificate, KeyPair),
}

fn pair() -> Pair {
    let (root_key, key) = (new_key().unwrap(), new_key().unwrap());
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    let root = authority("root").self_signed(&root_key).unwrap();
    let issuer = Issuer::new(authority("root"), root_key);
    let below = authority("below").signed_by(&key, &issuer).unwrap();
    Pair {
        root: (root, issuer),
        below: (below, key),
    }
}

fn write_key(dir: &Path, key: &KeyPair) {
    let file = dir.join("ca-key.pem");
    fs::write(&file, key.serialize_pem()).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn an_intermediate_signs_and_is_sent_along() {
    let dir = tempfile::tempdir().unwrap();
    let Pair { root, below } = pair();
    fs::write(dir.path().join("root-cert.pem"), root.0.pem()).unwrap();
    // With the root after it, as some write it: that is not sent.
    let chain = format!("{}{}", below.0.pem(), root.0.pem());
    fs::write(dir.path().join("ca-cert.pem"), chain).unwrap();
    write_key(dir.path(), &below.1);
    let ca = Authority::open(dir.path()).unwrap();
    let issued = ca.issue(&web(), for_an_hour()).unwrap();
    assert_eq!(issued.chain.len(), 2);
    assert_eq!(issued.chain[1], *below.0.der());
    assert_eq!(ca.bundle().roots(), [root.0.der().clone()]);
}

#[test]
fn a_signer_whose_signatures_nobody_would_accept_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (pair(), pair());
    fs::write(dir.path().join("root-cert.pem"), theirs.root.0.pem()).unwrap();
    fs::write(dir.path().join("ca-cert.pem"), ours.below.0.pem()).unwrap();
    write_key(dir.path(), &ours.below.1);
    let error = Authority::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("does not chain to root-cert.pem"), "{error}");
    let both = format!("{}{}", theirs.root.0.pem(), ours.root.0.pem());
    fs::write(dir.path().join("root-cert.pem"), both).unwrap();
    assert_eq!(
        Authority::open(dir.path()).unwrap().bundle().roots().len(),
        2
    );
}

#[test]
fn of_several_roots_the_one_whose_key_there_is_signs() {
    let (dir, first) = ca();
    let (other_dir, _) = ca();
    let (dir, other) = (dir.path().join("ca"), other_dir.path().join("ca"));
    let read = |dir: &Path| fs::read_to_string(dir.join("root-cert.pem")).unwrap();
    fs::write(dir.join("root-cert.pem"), read(&other) + &read(&dir)).unwrap();
    let ca = Authority::open(&dir).unwrap();
    assert_eq!(ca.bundle().roots().len(), 2);
    let issued = ca.issue(&web(), for_an_hour()).unwrap();
    chains(&issued.chain, first.bundle(), SystemTime::now()).unwrap();
}

#[test]
fn files_that_do_not_belong_together_are_refused_by_name() {
    let (dir, _) = ca();
    let (other_dir, _) = ca();
    let dir = dir.path().join("ca");
    let root = dir.join("root-cert.pem");
    for content in [
        "",
        "no PEM",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        fs::write(&root, content).unwrap();
        let error = Authority::open(&dir).unwrap_err().to_string();
        assert!(error.contains("root-cert.pem"), "{error}");
    }
    fs::copy(other_dir.path().join("ca/root-cert.pem"), &root).unwrap();
    let error = Authority::open(&dir).unwrap_err().to_string();
    assert!(error.contains("does not belong to the key"), "{error}");
    fs::remove_file(&root).unwrap();
    assert!(matches!(
        Authority::open(&dir),
        Err(AuthorityError::File { .. })
    ));
}

#[test]
fn a_creation_that_died_on_the_way_is_finished_or_begun_anew() {
    let unfinished = |dir: &Path, names: &[&str]| {
        for name in names {
            let file = dir.join(name);
            fs::rename(&file, dir.join(format!("{name}.new"))).unwrap();
        }
    };
    // Before the key appeared: as if there had been nothing.
    let (dir, first) = ca();
    let dir = dir.path().join("ca");
    unfinished(&dir, &["ca-key.pem", "root-cert.pem"]);
    assert!(Authority::create(&dir).unwrap() != first);

    // Between the two.
    let (dir, first) = ca();
    let dir = dir.path().join("ca");
    unfinished(&dir, &["root-cert.pem"]);
    assert!(Authority::open(&dir).unwrap() == first);
    assert!(!dir.join("root-cert.pem.new").exists());

    // Not for a key of somebody else's.
    let (dir, _) = ca();
    let dir = dir.path().join("ca");
    unfinished(&dir, &["root-cert.pem"]);
    write_key(&dir, &new_key().unwrap());
    assert!(matches!(
        Authority::open(&dir),
        Err(AuthorityError::File { .. })
    ));
    assert!(!dir.join("root-cert.pem").exists());
}

/// An authority below another that is below the root, each valid from and to so many hours from now.
fn below(policy: [i64; 2], signer: [i64; 2]) -> Result<Authority, AuthorityError> {
    let dir = tempfile::tempdir().unwrap();
    let params = |name: &str, hours: [i64; 2]| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let now = OffsetDateTime::now_utc();
        let [from, to] = hours.map(|hours| now + time::Duration::hours(hours));
        (params.not_before, params.not_after) = (from, to);
        params
    };
    let keys = [(); 3].map(|()| new_key().unwrap());
    let [root_key, policy_key, signer_key] = keys;
    let top = params("root", [-1000, 1000]);
    let root = top.self_signed(&root_key).unwrap();
    let root_issuer = Issuer::new(top, root_key);
    let middle = params("policy", policy);
    let policy = middle.signed_by(&policy_key, &root_issuer).unwrap();
    let policy_issuer = Issuer::new(middle, policy_key);
    let signer = params("signer", signer).signed_by(&signer_key, &policy_issuer);
    fs::write(dir.path().join("root-cert.pem"), root.pem()).unwrap();
    let chain = signer.unwrap().pem() + &policy.pem();
    fs::write(dir.path().join("ca-cert.pem"), chain).unwrap();
    write_key(dir.path(), &signer_key);
    Authority::open(dir.path())
}

#[test]
fn an_authority_is_valid_while_all_that_is_between_it_and_the_root_is() {
    let now = SystemTime::now();
    let hours = |hours: u32| HOUR * hours;
    let near = |time: SystemTime, expected: SystemTime| {
        let apart = |a: SystemTime, b: SystemTime| a.duration_since(b).unwrap_or_default();
        apart(time, expected).max(apart(expected, time)) < Duration::from_secs(60)
    };
    let ends = |policy, signer| below(policy, signer).unwrap().not_after();
    assert!(near(ends([-9, 9], [-9, 5]), now + hours(5)));
    assert!(near(ends([-9, 5], [-9, 9]), now + hours(5)));
    // What is above was renewed after the signer was made.
    assert!(near(ends([-1, 9], [-9, 5]), now + hours(5)));
    // Expired: whoever asks is told so.
    assert!(near(ends([-9, -1], [-9, 5]), now - hours(1)));
    assert!(near(ends([-9, 9], [-9, -1]), now - hours(1)));
    for (policy, signer) in [([1, 9], [-9, 5]), ([-9, 9], [1, 5])] {
        let error = below(policy, signer).unwrap_err().to_string();
        assert!(error.contains("is not valid for another"), "{error}");
    }
}
