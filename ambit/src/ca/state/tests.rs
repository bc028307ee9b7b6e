use std::fs;

use super::*;

struct Fixture(tempfile::TempDir);

impl Fixture {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("ca")
    }

    fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    fn open(&self) -> Result<CaState, FolderError> {
        CaState::open(&self.dir(), &self.state_dir(), Arc::new(SystemTime::now))
    }

    fn root_file(&self) -> Vec<u8> {
        fs::read(self.dir().join("root-cert.pem")).unwrap()
    }

    fn remove(&self, names: &[&str]) {
        for name in names {
            fs::remove_file(self.dir().join(name)).unwrap();
        }
    }

    /// The folder of a second authority.
    fn create_other(&self) -> PathBuf {
        let other = self.0.path().join("other");
        Authority::create(&other).unwrap();
        other
    }
}

fn published_roots(state: &CaState) -> Vec<CertificateDer<'static>> {
    let roots = state.lock().rotation.roots().to_vec();
    roots.into_iter().map(|published| published.root).collect()
}

#[test]
fn first_start_creates_an_authority_and_later_starts_keep_it() {
    let fixture = Fixture::new();
    let first = fixture.open().unwrap().signing_authority();
    let root = fixture.root_file();
    assert_eq!(fixture.open().unwrap().signing_authority(), first);
    assert_eq!(fixture.root_file(), root);
}

#[test]
fn missing_authority_is_an_error_and_never_replaced_by_a_new_root() {
    let fixture = Fixture::new();
    let first = fixture.open().unwrap().signing_authority();
    fixture.remove(&["ca-key.pem", "root-cert.pem"]);
    let error = fixture.open().err().unwrap();
    assert!(matches!(error, FolderError::Missing { .. }), "{error}");
    assert!(error.to_string().contains("put its files back"), "{error}");
    // The same holds if only the copies are left of the state.
    fs::remove_file(fixture.state_dir().join("state.json")).unwrap();
    let error = fixture.open().err().unwrap();
    assert!(matches!(error, FolderError::Missing { .. }), "{error}");
    assert!(folder::is_empty(&fixture.dir()));

    // The remedy in the message works.
    for name in ["ca-key.pem", "root-cert.pem"] {
        let copy = fixture.state_dir().join("authority-1").join(name);
        fs::copy(copy, fixture.dir().join(name)).unwrap();
    }
    assert_eq!(fixture.open().unwrap().signing_authority(), first);
}

#[test]
fn incomplete_authority_without_a_state_is_an_error() {
    let fixture = Fixture::new();
    fixture.open().unwrap();
    fs::remove_dir_all(fixture.state_dir()).unwrap();
    let key = fs::read(fixture.dir().join("ca-key.pem")).unwrap();
    fixture.remove(&["root-cert.pem"]);
    let error = fixture.open().err().unwrap();
    let text = ErrorChain(&error).to_string();
    assert!(text.contains("root-cert.pem"), "{text}");
    assert!(!fixture.dir().join("root-cert.pem").exists());
    assert_eq!(fs::read(fixture.dir().join("ca-key.pem")).unwrap(), key);
}

#[test]
fn start_during_a_replacement_keeps_the_authority_until_the_new_files_are_complete() {
    let fixture = Fixture::new();
    let state = fixture.open().unwrap();
    let hour = Duration::from_secs(3600);
    state.lock().record_issued(state.now() + hour, hour);
    let first = state.signing_authority();
    let other = fixture.create_other();
    let replace = |name: &str| fs::copy(other.join(name), fixture.dir().join(name)).unwrap();
    replace("ca-key.pem");
    let state = fixture.open().unwrap();
    assert_eq!(state.signing_authority(), first);
    assert_eq!(published_roots(&state), first.bundle().roots());
    assert!(state.lock().last_error.get().is_some());

    replace("root-cert.pem");
    state.reload();
    let second = Authority::open(&other).unwrap();
    let both = [first.bundle().roots(), second.bundle().roots()].concat();
    let published = published_roots(&state);
    assert!(
        both.iter().all(|root| published.contains(root)),
        "{published:?}"
    );
    assert!(state.lock().last_error.get().is_none());
}
