use std::fs;
use std::os::unix::fs::PermissionsExt;

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;
use crate::certs::clock::from_unix_seconds;

fn ca() -> (tempfile::TempDir, Authority) {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::create(&dir.path().join("ca")).unwrap();
    (dir, ca)
}

fn one_hour() -> Validity {
    Validity::new(SystemTime::now(), HOUR)
}

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_leaf_has_only_the_spiffe_id_and_the_usages_of_a_workload() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), one_hour()).unwrap();
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
fn a_leaf_chains_to_the_root() {
    let (_dir, ca) = ca();
    let issued = ca.issue(&web(), one_hour()).unwrap();
    verify_chain(&issued.chain, ca.bundle(), SystemTime::now()).unwrap();
    let (_, root) = X509Certificate::from_der(&ca.bundle().roots()[0]).unwrap();
    let constraints = root.basic_constraints().unwrap().unwrap().value;
    assert!(constraints.ca && constraints.path_len_constraint == Some(0));
}

#[test]
fn a_leaf_is_valid_from_the_backdate_until_its_ttl() {
    let (_dir, ca) = ca();
    let now = SystemTime::now();
    let issued = ca.issue(&web(), Validity::new(now, HOUR)).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    let is_near = |a: SystemTime, b: SystemTime| {
        let difference = a.duration_since(b).or_else(|_| b.duration_since(a));
        difference.unwrap() <= Duration::from_secs(1)
    };
    assert!(is_near(
        from_unix_seconds(leaf.validity().not_before.timestamp()),
        now - BACKDATE
    ));
    assert!(is_near(
        from_unix_seconds(leaf.validity().not_after.timestamp()),
        now + HOUR
    ));
    assert!(
        BACKDATE >= Duration::from_secs(300),
        "peers with clocks that are behind"
    );
}

#[test]
fn leaves_have_different_keys_and_serial_numbers() {
    let (_dir, ca) = ca();
    let [a, b] = [(), ()].map(|()| ca.issue(&web(), one_hour()).unwrap());
    let serial = |issued: &IssuedCertificate| {
        let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
        leaf.raw_serial().to_vec()
    };
    assert_ne!(serial(&a), serial(&b));
    assert_ne!(*a.key, *b.key);
}

#[test]
fn a_leaf_expires_no_later_than_the_ca() {
    let (_dir, ca) = ca();
    let validity = Validity::new(SystemTime::now(), 100 * ROOT_TTL);
    let issued = ca.issue(&web(), validity).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.chain[0]).unwrap();
    assert_eq!(
        from_unix_seconds(leaf.validity().not_after.timestamp()),
        ca.not_after()
    );
}

#[test]
fn a_public_key_is_certified_for_the_given_identity() {
    let (_dir, ca) = ca();
    let key = new_key().unwrap();
    let chain = ca.sign(&key, &web(), one_hour()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&chain[0]).unwrap();
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    let expected = [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")];
    assert_eq!(names.value.general_names, expected);
}

#[test]
fn a_server_certificate_has_the_given_names_and_no_client_usage() {
    let (_dir, ca) = ca();
    let name = SanType::DnsName("ca.example".try_into().unwrap());
    let chain = ca
        .sign_server(&new_key().unwrap(), vec![name], one_hour())
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
fn debug_output_contains_no_key() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), one_hour()).unwrap();
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
fn a_created_ca_can_be_opened() {
    let (dir, first) = ca();
    let again = Authority::open(&dir.path().join("ca")).unwrap();
    assert!(first == again);
}

#[test]
fn a_key_that_others_can_read_is_refused() {
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
        "only the key exists"
    );
}

/// A root and an intermediate CA, with their keys.
struct Hierarchy {
    root: (rcgen::Certificate, Issuer<'static, KeyPair>),
    intermediate: (rcgen::Certificate, KeyPair),
}

fn hierarchy() -> Hierarchy {
    let (root_key, key) = (new_key().unwrap(), new_key().unwrap());
    let ca_params = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    let root = ca_params("root").self_signed(&root_key).unwrap();
    let issuer = Issuer::new(ca_params("root"), root_key);
    let intermediate = ca_params("intermediate").signed_by(&key, &issuer).unwrap();
    Hierarchy {
        root: (root, issuer),
        intermediate: (intermediate, key),
    }
}

fn write_key(dir: &Path, key: &KeyPair) {
    let file = dir.join("ca-key.pem");
    fs::write(&file, key.serialize_pem()).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn an_intermediate_ca_signs_and_is_part_of_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let Hierarchy { root, intermediate } = hierarchy();
    fs::write(dir.path().join("root-cert.pem"), root.0.pem()).unwrap();
    // Some tools append the root, which is not sent.
    let chain = format!("{}{}", intermediate.0.pem(), root.0.pem());
    fs::write(dir.path().join("ca-cert.pem"), chain).unwrap();
    write_key(dir.path(), &intermediate.1);
    let ca = Authority::open(dir.path()).unwrap();
    let issued = ca.issue(&web(), one_hour()).unwrap();
    assert_eq!(issued.chain.len(), 2);
    assert_eq!(issued.chain[1], *intermediate.0.der());
    assert_eq!(ca.bundle().roots(), [root.0.der().clone()]);
}

#[test]
fn a_signer_that_does_not_chain_to_the_root_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = (hierarchy(), hierarchy());
    fs::write(dir.path().join("root-cert.pem"), other.root.0.pem()).unwrap();
    fs::write(dir.path().join("ca-cert.pem"), own.intermediate.0.pem()).unwrap();
    write_key(dir.path(), &own.intermediate.1);
    let error = Authority::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("does not chain to root-cert.pem"), "{error}");
    let both = format!("{}{}", other.root.0.pem(), own.root.0.pem());
    fs::write(dir.path().join("root-cert.pem"), both).unwrap();
    assert_eq!(
        Authority::open(dir.path()).unwrap().bundle().roots().len(),
        2
    );
}

#[test]
fn of_several_roots_the_one_with_the_key_signs() {
    let (dir, first) = ca();
    let (other_dir, _) = ca();
    let (dir, other) = (dir.path().join("ca"), other_dir.path().join("ca"));
    let read = |dir: &Path| fs::read_to_string(dir.join("root-cert.pem")).unwrap();
    fs::write(dir.join("root-cert.pem"), read(&other) + &read(&dir)).unwrap();
    let ca = Authority::open(&dir).unwrap();
    assert_eq!(ca.bundle().roots().len(), 2);
    let issued = ca.issue(&web(), one_hour()).unwrap();
    verify_chain(&issued.chain, first.bundle(), SystemTime::now()).unwrap();
}

#[test]
fn invalid_or_mismatched_files_are_refused_by_name() {
    let (dir, _) = ca();
    let (other_dir, _) = ca();
    let dir = dir.path().join("ca");
    let root = dir.join("root-cert.pem");
    for content in [
        "",
        "not PEM",
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
fn an_interrupted_creation_is_finished_or_started_again() {
    let undo_rename = |dir: &Path, names: &[&str]| {
        for name in names {
            let file = dir.join(name);
            fs::rename(&file, dir.join(format!("{name}.new"))).unwrap();
        }
    };
    // Interrupted before the first rename: nothing exists yet.
    let (dir, first) = ca();
    let dir = dir.path().join("ca");
    undo_rename(&dir, &["ca-key.pem", "root-cert.pem"]);
    assert!(Authority::create(&dir).unwrap() != first);

    // Interrupted between the two renames.
    let (dir, first) = ca();
    let dir = dir.path().join("ca");
    undo_rename(&dir, &["root-cert.pem"]);
    assert!(Authority::open(&dir).unwrap() == first);
    assert!(!dir.join("root-cert.pem.new").exists());

    // Not finished with another key.
    let (dir, _) = ca();
    let dir = dir.path().join("ca");
    undo_rename(&dir, &["root-cert.pem"]);
    write_key(&dir, &new_key().unwrap());
    assert!(matches!(
        Authority::open(&dir),
        Err(AuthorityError::File { .. })
    ));
    assert!(!dir.join("root-cert.pem").exists());
}

/// A CA below a policy CA below a root. The arguments are the start and end of each validity, in hours
/// from now.
fn ca_with_validity(policy: [i64; 2], signer: [i64; 2]) -> Result<Authority, AuthorityError> {
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
fn a_ca_is_valid_while_its_path_to_the_root_is() {
    let now = SystemTime::now();
    let hours = |hours: u32| HOUR * hours;
    let is_near = |time: SystemTime, expected: SystemTime| {
        let difference = |a: SystemTime, b: SystemTime| a.duration_since(b).unwrap_or_default();
        difference(time, expected).max(difference(expected, time)) < Duration::from_secs(60)
    };
    let not_after = |policy, signer| ca_with_validity(policy, signer).unwrap().not_after();
    assert!(is_near(not_after([-9, 9], [-9, 5]), now + hours(5)));
    assert!(is_near(not_after([-9, 5], [-9, 9]), now + hours(5)));
    // The policy CA was renewed after the signer was issued.
    assert!(is_near(not_after([-1, 9], [-9, 5]), now + hours(5)));
    // An expired CA can be opened. Each request reports the expiry.
    assert!(is_near(not_after([-9, -1], [-9, 5]), now - hours(1)));
    assert!(is_near(not_after([-9, 9], [-9, -1]), now - hours(1)));
    for (policy, signer) in [([1, 9], [-9, 5]), ([-9, 9], [1, 5])] {
        let error = ca_with_validity(policy, signer).unwrap_err().to_string();
        assert!(error.contains("is not valid for another"), "{error}");
    }
}
