use std::fs;
use std::os::unix::fs::PermissionsExt;

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::*;

fn ca() -> (tempfile::TempDir, LocalCa) {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::create(&dir.path().join("ca")).unwrap();
    (dir, ca)
}

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_leaf_says_who_it_is_and_nothing_else() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), HOUR).unwrap();
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
    let certificate = ca.issue(&web(), HOUR).unwrap();
    let (_, leaf) = X509Certificate::from_der(&certificate.chain[0]).unwrap();
    let (_, root) = X509Certificate::from_der(&certificate.roots[0]).unwrap();
    assert_eq!(leaf.issuer(), root.subject());
    assert!(root.is_ca());
    assert_eq!(
        root.basic_constraints()
            .unwrap()
            .unwrap()
            .value
            .path_len_constraint,
        Some(0)
    );
}

#[test]
fn a_leaf_is_valid_from_a_little_before_now_until_its_ttl() {
    let (_dir, ca) = ca();
    let now = SystemTime::now();
    let certificate = ca.issue_at(&web(), HOUR, now).unwrap();
    let close = |a: SystemTime, b: SystemTime| {
        a.duration_since(b)
            .or_else(|_| b.duration_since(a))
            .unwrap()
            <= Duration::from_secs(1)
    };
    assert!(close(certificate.not_before, now - BACKDATE));
    assert!(close(certificate.not_after, now + HOUR));
}

#[test]
fn every_leaf_has_its_own_key_and_serial_number() {
    let (_dir, ca) = ca();
    let (a, b) = (
        ca.issue(&web(), HOUR).unwrap(),
        ca.issue(&web(), HOUR).unwrap(),
    );
    assert_ne!(a.serial, b.serial);
    assert_ne!(a.key().secret_der(), b.key().secret_der());
}

#[test]
fn no_leaf_outlives_its_authority() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), 100 * ROOT_TTL).unwrap();
    assert_eq!(certificate.not_after, ca.not_after);
    let error = ca.issue_at(&web(), HOUR, ca.not_after).unwrap_err();
    assert_eq!(error.code, "ca_expired");
}

#[test]
fn the_key_is_never_printed() {
    let (_dir, ca) = ca();
    let certificate = ca.issue(&web(), HOUR).unwrap();
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
    let again = LocalCa::open(&dir.path().join("ca")).unwrap();
    assert_eq!(first.roots, again.roots);
    assert_eq!(
        first.issue(&web(), HOUR).unwrap().roots,
        again.issue(&web(), HOUR).unwrap().roots
    );
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
    let error = LocalCa::open(&dir.path().join("ca")).unwrap_err();
    assert!(
        matches!(error, LocalCaError::KeyIsOpen { mode: 0o644, .. }),
        "{error}"
    );
}

#[test]
fn create_never_overwrites() {
    let (dir, first) = ca();
    let dir = dir.path().join("ca");
    for file in ["root-cert.pem", "ca-key.pem"] {
        assert!(
            matches!(LocalCa::create(&dir), Err(LocalCaError::Exists { .. })),
            "{file}"
        );
        assert_eq!(LocalCa::open(&dir).unwrap().roots, first.roots);
    }
    fs::remove_file(dir.join("root-cert.pem")).unwrap();
    assert!(
        matches!(LocalCa::create(&dir), Err(LocalCaError::Exists { .. })),
        "a key alone"
    );
}

#[test]
fn an_intermediate_signs_and_is_sent_along() {
    let dir = tempfile::tempdir().unwrap();
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
    let intermediate = authority("intermediate").signed_by(&key, &issuer).unwrap();
    fs::write(dir.path().join("root-cert.pem"), root.pem()).unwrap();
    fs::write(dir.path().join("ca-cert.pem"), intermediate.pem()).unwrap();
    let key_file = dir.path().join("ca-key.pem");
    fs::write(&key_file, key.serialize_pem()).unwrap();
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
    let certificate = LocalCa::open(dir.path())
        .unwrap()
        .issue(&web(), HOUR)
        .unwrap();
    assert_eq!(certificate.chain.len(), 2);
    assert_eq!(certificate.chain[1], *intermediate.der());
    assert_eq!(certificate.roots, [root.der().clone()]);
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
        let error = LocalCa::open(&dir).unwrap_err().to_string();
        assert!(error.contains("root-cert.pem"), "{error}");
    }
    fs::copy(other_dir.path().join("ca/root-cert.pem"), &root).unwrap();
    let error = LocalCa::open(&dir).unwrap_err().to_string();
    assert!(error.contains("does not belong to the key"), "{error}");
    fs::remove_file(&root).unwrap();
    assert!(matches!(
        LocalCa::open(&dir),
        Err(LocalCaError::File { .. })
    ));
}
