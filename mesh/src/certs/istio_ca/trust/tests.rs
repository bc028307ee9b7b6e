use std::fs;

use super::super::super::Authority;
use super::super::tests::pem;
use super::*;

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

fn learn(
    trust: &Trust,
    came: &[CertificateDer<'static>],
    end: SystemTime,
    now: SystemTime,
) -> Result<(), BundleError> {
    trust.lesson(came, end, now).map(Lesson::take)
}

fn trusted(trust: &Trust) -> Vec<CertificateDer<'static>> {
    trust.bundle().borrow().roots().to_vec()
}

#[test]
fn nothing_is_trusted_before_the_file_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let trust = Trust::new(file.clone());
    assert!(trust.bundle().borrow().is_empty());
    let error = trust.to_connect().unwrap_err().to_string();
    assert!(error.contains("root.pem"), "{error}");
    let root = root();
    write(&file, &[&root]);
    assert_eq!(trust.to_connect().unwrap().roots(), [root]);
}

#[test]
fn a_file_that_is_replaced_counts_at_once_and_one_that_breaks_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (old, new) = (root(), root());
    write(&file, &[&old]);
    let trust = Trust::new(file.clone());
    write(&file, &[&old, &new]);
    trust.look(SystemTime::now()).unwrap();
    assert_eq!(trusted(&trust), [old.clone(), new.clone()]);
    for content in [
        "",
        "garbage",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        fs::write(&file, content).unwrap();
        assert!(trust.look(SystemTime::now()).is_err());
        assert_eq!(trusted(&trust), [old.clone(), new.clone()]);
    }
    // No certificate was issued meanwhile, so nobody needs the old one.
    write(&file, &[&new]);
    trust.look(SystemTime::now()).unwrap();
    assert_eq!(trusted(&trust), [new]);
}

#[test]
fn a_root_stays_until_the_last_certificate_of_its_time_has_expired() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (old, new, now) = (root(), root(), SystemTime::now());
    write(&file, &[&old]);
    let trust = Trust::new(file.clone());
    learn(&trust, std::slice::from_ref(&old), now + HOUR, now).unwrap();

    // Both come along, then the file changes, then the authority hands out the new one alone.
    learn(&trust, &[old.clone(), new.clone()], now + HOUR * 2, now).unwrap();
    assert_eq!(trusted(&trust), [old.clone(), new.clone()]);
    write(&file, &[&new]);
    trust.look(now).unwrap();
    learn(&trust, std::slice::from_ref(&new), now + HOUR * 3, now).unwrap();
    assert!(trusted(&trust).contains(&old));

    trust.look(now + HOUR * 2 - Duration::from_secs(1)).unwrap();
    assert!(trusted(&trust).contains(&old));
    trust.look(now + HOUR * 2).unwrap();
    assert_eq!(trusted(&trust), [new]);
}

#[test]
fn an_answer_with_a_root_that_is_none_teaches_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (good, now) = (root(), SystemTime::now());
    write(&file, &[&good]);
    let trust = Trust::new(file);
    let garbage = CertificateDer::from(vec![1, 2, 3]);
    assert!(learn(&trust, &[root(), garbage], now + HOUR, now).is_err());
    assert_eq!(trusted(&trust), [good]);
}

#[test]
fn what_is_not_taken_teaches_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (good, other, now) = (root(), root(), SystemTime::now());
    write(&file, &[&good]);
    let trust = Trust::new(file);
    let lesson = trust
        .lesson(std::slice::from_ref(&other), now + HOUR, now)
        .unwrap();
    assert_eq!(lesson.bundle().roots(), [good.clone(), other]);
    drop(lesson);
    trust.look(now).unwrap();
    assert_eq!(trusted(&trust), [good]);
}

#[test]
fn an_answer_with_too_many_roots_is_refused_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (good, now) = (root(), SystemTime::now());
    write(&file, &[&good]);
    let trust = Trust::new(file);
    let many: Vec<_> = (0..MAX_ROOTS).map(|_| root()).collect();
    let error = learn(&trust, &many, now + HOUR, now).unwrap_err();
    assert!(matches!(error, BundleError::TooMany), "{error}");
    // The next answer is judged by itself.
    learn(&trust, std::slice::from_ref(&good), now + HOUR, now).unwrap();
    trust.look(now).unwrap();
    assert_eq!(trusted(&trust), [good]);
}

#[test]
fn of_too_many_roots_those_stay_that_are_in_the_file_or_came_last() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("root.pem");
    let (good, now) = (root(), SystemTime::now());
    write(&file, &[&good]);
    let trust = Trust::new(file.clone());
    let first = root();
    let many: Vec<_> = (2..MAX_ROOTS).map(|_| root()).collect();
    learn(&trust, std::slice::from_ref(&first), now + HOUR, now).unwrap();
    learn(&trust, &many, now + HOUR * 2, now).unwrap();
    assert_eq!(trusted(&trust).len(), MAX_ROOTS);

    let last = root();
    learn(&trust, std::slice::from_ref(&last), now + HOUR, now).unwrap();
    let found = trusted(&trust);
    assert_eq!(found.len(), MAX_ROOTS);
    assert!(found.contains(&good) && found.contains(&last) && !found.contains(&first));

    // The operator's word counts for more than anything learned.
    let others = [root(), root()];
    write(&file, &[&others[0], &others[1]]);
    trust.look(now).unwrap();
    let found = trusted(&trust);
    assert_eq!(found.len(), MAX_ROOTS);
    assert!(others.iter().all(|root| found.contains(root)));
}
