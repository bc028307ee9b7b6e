use std::fs;
use std::path::Path;
use std::time::Duration;

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
fn every_root_is_in_it_once() {
    let (a, b) = (root(), root());
    let text = format!("{}comments are fine\n{}{}", a.pem(), b.pem(), a.pem());
    let bundle = TrustBundle::from_pem(text.as_bytes()).unwrap();
    assert_eq!(bundle.roots(), [a.der().clone(), b.der().clone()]);
    assert!(bundle.earliest_expiry().is_some());
}

#[test]
fn what_is_not_a_bundle_of_roots_is_none_at_all() {
    let good = root().pem();
    let leaf = certificate(IsCa::NoCa).pem();
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let unfinished = "-----BEGIN CERTIFICATE-----\nAAAA\n";
    for text in [
        String::new(),
        "no PEM".to_owned(),
        leaf.clone(),
        garbage.to_owned(),
        // One bad root among good ones: half a bundle would be another bundle.
        format!("{good}{leaf}"),
        format!("{good}{garbage}"),
        format!("{good}{unfinished}"),
    ] {
        assert!(TrustBundle::from_pem(text.as_bytes()).is_err(), "{text}");
    }
    assert!(matches!(
        TrustBundle::new((0..=MAX_ROOTS).map(|_| root().der().clone())),
        Err(BundleError::TooMany)
    ));
}

/// As an editor or an operator's script does it.
fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, file).unwrap();
}

/// A moment after the file was looked at again.
async fn look() {
    tokio::time::sleep(LOOK * 3 / 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_replaced_is_followed_and_a_broken_one_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root-cert.pem");
    assert!(matches!(
        BundleFile::open(&path),
        Err(BundleError::File { .. })
    ));
    let (a, b) = (root(), root());
    fs::write(&path, a.pem()).unwrap();
    let file = BundleFile::open(&path).unwrap();
    let bundle = file.bundle();
    let scenario = async {
        replace(&path, &format!("{}{}", a.pem(), b.pem()));
        look().await;
        assert_eq!(bundle.borrow().roots().len(), 2);
        for broken in ["", "no PEM", &certificate(IsCa::NoCa).pem()] {
            replace(&path, broken);
            look().await;
            assert_eq!(bundle.borrow().roots().len(), 2, "{broken}");
        }
        fs::remove_file(&path).unwrap();
        look().await;
        assert_eq!(bundle.borrow().roots().len(), 2);
        replace(&path, &b.pem());
        look().await;
        assert_eq!(bundle.borrow().roots(), [b.der().clone()]);
    };
    tokio::select! {
        () = scenario => {}
        () = file.run() => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_mounted_volume_is_followed_through_its_links() {
    let volume = tempfile::tempdir().unwrap();
    let at = |name: &str| volume.path().join(name);
    let (a, b) = (root(), root());
    for (version, root) in [("..1", &a), ("..2", &b)] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("root-cert.pem"), root.pem()).unwrap();
    }
    std::os::unix::fs::symlink("..1", at("..data")).unwrap();
    std::os::unix::fs::symlink("..data/root-cert.pem", at("root-cert.pem")).unwrap();
    let file = BundleFile::open(&at("root-cert.pem")).unwrap();
    let mut bundle = file.bundle();
    let scenario = async {
        std::os::unix::fs::symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        fs::remove_dir_all(at("..1")).unwrap();
        let changed = tokio::time::timeout(Duration::from_secs(3), bundle.changed());
        changed.await.unwrap().unwrap();
        assert_eq!(bundle.borrow().roots(), [b.der().clone()]);
    };
    tokio::select! {
        () = scenario => {}
        () = file.run() => {}
    }
}
