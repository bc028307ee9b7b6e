use std::time::Duration;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(Authority::create(folder.path()).unwrap())
}

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000)
}

fn roots(rotation: &RootRotation) -> Vec<CertificateDer<'static>> {
    rotation.bundle().unwrap().roots().to_vec()
}

fn root_of(authority: &Authority) -> CertificateDer<'static> {
    authority.bundle().roots()[0].clone()
}

#[test]
fn new_authority_signs_at_once_if_nothing_was_issued() {
    let (old, new) = (authority(), authority());
    let mut rotation = RootRotation::new(old, start());
    assert!(rotation.replace_with(&new, start()));
    assert_eq!(*rotation.signing(), new);
    assert_eq!(roots(&rotation), [root_of(&new)]);
    assert!(!rotation.replace_with(&new, start()));
}

#[test]
fn new_root_is_distributed_first_and_signs_when_earlier_certificates_have_expired() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = RootRotation::new(old.clone(), t);
    rotation.record_issued(t + HOUR * 24);
    assert!(rotation.replace_with(&new, t + HOUR));
    assert_eq!(*rotation.signing(), old);
    assert_eq!(roots(&rotation), [root_of(&old), root_of(&new)]);

    // Certificates that the old authority issues meanwhile come with the new root and do not delay
    // the second step.
    rotation.record_issued(t + HOUR * 40);
    assert!(!rotation.advance(t + HOUR * 24 - Duration::from_secs(1)));
    assert!(rotation.advance(t + HOUR * 24));
    assert_eq!(*rotation.signing(), new);

    // The old root is distributed until the last of them has expired.
    rotation.record_issued(t + HOUR * 48);
    assert_eq!(roots(&rotation), [root_of(&old), root_of(&new)]);
    assert!(!rotation.advance(t + HOUR * 40 - Duration::from_secs(1)));
    assert!(rotation.advance(t + HOUR * 40));
    assert_eq!(roots(&rotation), [root_of(&new)]);
}

#[test]
fn restoring_the_old_files_before_the_new_authority_signs_cancels_the_replacement() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = RootRotation::new(old.clone(), t);
    rotation.record_issued(t + HOUR);
    rotation.replace_with(&new, t);
    assert!(rotation.replace_with(&old, t));
    assert!(rotation.next().is_none());
    rotation.advance(t + HOUR);
    assert_eq!(*rotation.signing(), old);
    assert_eq!(roots(&rotation), [root_of(&old)]);
}

#[test]
fn returning_authority_signs_at_once_only_if_its_root_is_still_distributed() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = RootRotation::new(old.clone(), t);
    rotation.record_issued(t + HOUR);
    rotation.replace_with(&new, t);
    assert!(rotation.advance(t + HOUR));
    rotation.record_issued(t + HOUR * 2);
    assert!(rotation.replace_with(&old, t + HOUR));
    // Its root was withdrawn at the second step, so it has to propagate again.
    assert_eq!(*rotation.signing(), new);

    let mut rotation = RootRotation::new(old.clone(), t);
    rotation.record_issued(t + HOUR);
    rotation.replace_with(&new, t);
    rotation.record_issued(t + HOUR * 3);
    rotation.advance(t + HOUR);
    assert_eq!(*rotation.signing(), new);
    assert!(rotation.replace_with(&old, t + HOUR));
    assert_eq!(*rotation.signing(), old);
    assert_eq!(roots(&rotation), [root_of(&old), root_of(&new)]);
}

#[test]
fn third_authority_signs_when_its_own_root_has_propagated() {
    let (old, new, newest, t) = (authority(), authority(), authority(), start());
    let mut rotation = RootRotation::new(old.clone(), t);
    rotation.record_issued(t + HOUR);
    rotation.replace_with(&new, t);
    rotation.record_issued(t + HOUR * 2);
    rotation.replace_with(&newest, t + HOUR / 2);
    assert_eq!(rotation.next().unwrap().signs_at, t + HOUR * 2);
    assert_eq!(roots(&rotation).len(), 3);
    rotation.advance(t + HOUR);
    assert_eq!(*rotation.signing(), old);
    rotation.advance(t + HOUR * 2);
    assert_eq!(*rotation.signing(), newest);
    assert_eq!(roots(&rotation), [root_of(&newest)]);
}

#[test]
fn restored_rotation_continues_where_it_stopped() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = RootRotation::new(old.clone(), t);
    rotation.record_issued(t + HOUR);
    rotation.replace_with(&new, t);
    let (published, expiry) = (rotation.roots().to_vec(), rotation.latest_expiry());
    drop(rotation);

    let mut rotation = RootRotation::restore(old.clone(), published, expiry);
    assert!(rotation.replace_with(&new, t + HOUR / 2));
    assert_eq!(*rotation.signing(), old);
    assert_eq!(rotation.next().unwrap().signs_at, t + HOUR);
    assert_eq!(roots(&rotation).len(), 2);
    assert!(rotation.advance(t + HOUR));
    assert_eq!(*rotation.signing(), new);
}
