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

fn roots(rotation: &Rotation) -> Vec<CertificateDer<'static>> {
    rotation.bundle().unwrap().roots().to_vec()
}

fn own(authority: &Authority) -> CertificateDer<'static> {
    authority.bundle().roots()[0].clone()
}

#[test]
fn before_anything_was_signed_another_authority_signs_at_once() {
    let (old, new) = (authority(), authority());
    let mut rotation = Rotation::new(old, start());
    assert!(rotation.found(&new, start()));
    assert_eq!(*rotation.signing(), new);
    assert_eq!(roots(&rotation), [own(&new)]);
    assert!(!rotation.found(&new, start()));
}

#[test]
fn a_new_root_is_handed_out_first_and_signs_when_all_that_was_signed_before_has_ended() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = Rotation::new(old.clone(), t);
    rotation.note(t + HOUR * 24);
    assert!(rotation.found(&new, t + HOUR));
    assert_eq!(*rotation.signing(), old);
    assert_eq!(roots(&rotation), [own(&old), own(&new)]);

    // What the old one signs meanwhile comes with the new root, and need not be waited for.
    rotation.note(t + HOUR * 40);
    assert!(!rotation.advance(t + HOUR * 24 - Duration::from_secs(1)));
    assert!(rotation.advance(t + HOUR * 24));
    assert_eq!(*rotation.signing(), new);

    // But its root is handed out until the last of them has ended.
    rotation.note(t + HOUR * 48);
    assert_eq!(roots(&rotation), [own(&old), own(&new)]);
    assert!(!rotation.advance(t + HOUR * 40 - Duration::from_secs(1)));
    assert!(rotation.advance(t + HOUR * 40));
    assert_eq!(roots(&rotation), [own(&new)]);
}

#[test]
fn whoever_puts_the_old_files_back_in_time_changes_nothing_but_the_roots() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = Rotation::new(old.clone(), t);
    rotation.note(t + HOUR);
    rotation.found(&new, t);
    assert!(rotation.found(&old, t));
    assert!(rotation.next().is_none());
    rotation.advance(t + HOUR);
    assert_eq!(*rotation.signing(), old);
    assert_eq!(roots(&rotation), [own(&old)]);
}

#[test]
fn a_root_that_comes_back_while_it_is_still_known_signs_at_once() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = Rotation::new(old.clone(), t);
    rotation.note(t + HOUR);
    rotation.found(&new, t);
    assert!(rotation.advance(t + HOUR));
    rotation.note(t + HOUR * 2);
    assert!(rotation.found(&old, t + HOUR));
    // Gone from the list an hour ago: known again only when the last certificate has ended.
    assert_eq!(*rotation.signing(), new);

    let mut rotation = Rotation::new(old.clone(), t);
    rotation.note(t + HOUR);
    rotation.found(&new, t);
    rotation.note(t + HOUR * 3);
    rotation.advance(t + HOUR);
    assert_eq!(*rotation.signing(), new);
    assert!(rotation.found(&old, t + HOUR));
    assert_eq!(*rotation.signing(), old);
    assert_eq!(roots(&rotation), [own(&old), own(&new)]);
}

#[test]
fn a_third_authority_waits_for_its_own_root_to_be_known() {
    let (old, new, newest, t) = (authority(), authority(), authority(), start());
    let mut rotation = Rotation::new(old.clone(), t);
    rotation.note(t + HOUR);
    rotation.found(&new, t);
    rotation.note(t + HOUR * 2);
    rotation.found(&newest, t + HOUR / 2);
    assert_eq!(rotation.next().unwrap().1, t + HOUR * 2);
    assert_eq!(roots(&rotation).len(), 3);
    rotation.advance(t + HOUR);
    assert_eq!(*rotation.signing(), old);
    rotation.advance(t + HOUR * 2);
    assert_eq!(*rotation.signing(), newest);
    assert_eq!(roots(&rotation), [own(&newest)]);
}

#[test]
fn what_is_restored_goes_on_where_it_was_left() {
    let (old, new, t) = (authority(), authority(), start());
    let mut rotation = Rotation::new(old.clone(), t);
    rotation.note(t + HOUR);
    rotation.found(&new, t);
    let (published, end) = (rotation.roots().to_vec(), rotation.last_end());
    drop(rotation);

    let mut rotation = Rotation::restored(old.clone(), published, end);
    assert!(rotation.found(&new, t + HOUR / 2));
    assert_eq!(*rotation.signing(), old);
    assert_eq!(rotation.next().unwrap().1, t + HOUR);
    assert_eq!(roots(&rotation).len(), 2);
    assert!(rotation.advance(t + HOUR));
    assert_eq!(*rotation.signing(), new);
}
