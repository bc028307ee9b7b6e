use std::fs;

use super::super::tests::pem;
use super::*;
use crate::certs::Authority;

const HOUR: Duration = Duration::from_secs(3600);

fn root() -> CertificateDer<'static> {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(folder.path()).unwrap();
    authority.bundle().roots()[0].clone()
}

fn write(file: &std::path::Path, roots: &[&CertificateDer<'static>]) {
    let text: String = roots.iter().map(|root| pem(root)).collect();
    fs::write(file, text).unwrap();
}

fn add(
    store: &RootStore,
    received: &[CertificateDer<'static>],
    expiry: SystemTime,
    now: SystemTime,
) -> Result<(), BundleError> {
    store
        .prepare(received, expiry, now)
        .map(PendingRoots::commit)
}

fn trusted(store: &RootStore) -> Vec<CertificateDer<'static>> {
    store.bundle().borrow().roots().to_vec()
}

#[test]
fn without_the_file_nothing_is_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let store = RootStore::new(file.clone());
    assert!(store.bundle().borrow().is_empty());
    let error = store.for_connection().unwrap_err().to_string();
    assert!(error.contains("root.pem"), "{error}");
    let root = root();
    write(&file, &[&root]);
    assert_eq!(store.for_connection().unwrap().roots(), [root]);
}

#[test]
fn a_replaced_file_takes_effect_and_an_invalid_one_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (old, new) = (root(), root());
    write(&file, &[&old]);
    let store = RootStore::new(file.clone());
    write(&file, &[&old, &new]);
    store.reload(SystemTime::now()).unwrap();
    assert_eq!(trusted(&store), [old.clone(), new.clone()]);
    for content in [
        "",
        "not PEM",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        fs::write(&file, content).unwrap();
        assert!(store.reload(SystemTime::now()).is_err());
        assert_eq!(trusted(&store), [old.clone(), new.clone()]);
    }
    // No certificate was issued in between, so the old root is not needed.
    write(&file, &[&new]);
    store.reload(SystemTime::now()).unwrap();
    assert_eq!(trusted(&store), [new]);
}

#[test]
fn a_root_stays_until_the_last_certificate_received_with_it_has_expired() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (old, new, now) = (root(), root(), SystemTime::now());
    write(&file, &[&old]);
    let store = RootStore::new(file.clone());
    add(&store, std::slice::from_ref(&old), now + HOUR, now).unwrap();

    // A response with both roots, then a new file, then a response with only the new root.
    add(&store, &[old.clone(), new.clone()], now + HOUR * 2, now).unwrap();
    assert_eq!(trusted(&store), [old.clone(), new.clone()]);
    write(&file, &[&new]);
    store.reload(now).unwrap();
    add(&store, std::slice::from_ref(&new), now + HOUR * 3, now).unwrap();
    assert!(trusted(&store).contains(&old));

    store
        .reload(now + HOUR * 2 - Duration::from_secs(1))
        .unwrap();
    assert!(trusted(&store).contains(&old));
    store.reload(now + HOUR * 2).unwrap();
    assert_eq!(trusted(&store), [new]);
}

#[test]
fn a_response_with_an_invalid_root_adds_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (in_file, now) = (root(), SystemTime::now());
    write(&file, &[&in_file]);
    let store = RootStore::new(file);
    let malformed = CertificateDer::from(vec![1, 2, 3]);
    assert!(add(&store, &[root(), malformed], now + HOUR, now).is_err());
    assert_eq!(trusted(&store), [in_file]);
}

#[test]
fn uncommitted_roots_are_not_added() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (in_file, other, now) = (root(), root(), SystemTime::now());
    write(&file, &[&in_file]);
    let store = RootStore::new(file);
    let pending = store
        .prepare(std::slice::from_ref(&other), now + HOUR, now)
        .unwrap();
    assert_eq!(pending.bundle().roots(), [in_file.clone(), other]);
    drop(pending);
    store.reload(now).unwrap();
    assert_eq!(trusted(&store), [in_file]);
}

#[test]
fn a_response_with_too_many_roots_is_rejected_and_has_no_effect_on_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (in_file, now) = (root(), SystemTime::now());
    write(&file, &[&in_file]);
    let store = RootStore::new(file);
    let many: Vec<_> = (0..MAX_ROOTS).map(|_| root()).collect();
    let error = add(&store, &many, now + HOUR, now).unwrap_err();
    assert!(matches!(error, BundleError::TooMany), "{error}");
    add(&store, std::slice::from_ref(&in_file), now + HOUR, now).unwrap();
    store.reload(now).unwrap();
    assert_eq!(trusted(&store), [in_file]);
}

#[test]
fn of_too_many_roots_those_of_the_file_and_of_the_last_response_stay() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (in_file, now) = (root(), SystemTime::now());
    write(&file, &[&in_file]);
    let store = RootStore::new(file.clone());
    let first = root();
    let many: Vec<_> = (2..MAX_ROOTS).map(|_| root()).collect();
    add(&store, std::slice::from_ref(&first), now + HOUR, now).unwrap();
    add(&store, &many, now + HOUR * 2, now).unwrap();
    assert_eq!(trusted(&store).len(), MAX_ROOTS);

    let last = root();
    add(&store, std::slice::from_ref(&last), now + HOUR, now).unwrap();
    let found = trusted(&store);
    assert_eq!(found.len(), MAX_ROOTS);
    assert!(found.contains(&in_file) && found.contains(&last) && !found.contains(&first));

    // Roots of the file take precedence over received ones.
    let others = [root(), root()];
    write(&file, &[&others[0], &others[1]]);
    store.reload(now).unwrap();
    let found = trusted(&store);
    assert_eq!(found.len(), MAX_ROOTS);
    assert!(others.iter().all(|root| found.contains(root)));
}
