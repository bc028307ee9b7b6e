use std::fs;

use super::*;

struct Folders(tempfile::TempDir);

impl Folders {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn dir(&self) -> PathBuf {
        self.0.path().join("ca")
    }

    fn state(&self) -> PathBuf {
        self.dir().join("state")
    }

    fn open(&self) -> Result<Keeper, FolderError> {
        Keeper::open(&self.dir(), &self.state(), Arc::new(SystemTime::now))
    }

    fn root(&self) -> Vec<u8> {
        fs::read(self.dir().join("root-cert.pem")).unwrap()
    }

    fn remove(&self, names: &[&str]) {
        for name in names {
            fs::remove_file(self.dir().join(name)).unwrap();
        }
    }

    /// Another authority, somewhere else.
    fn other(&self) -> PathBuf {
        let other = self.0.path().join("other");
        Authority::create(&other).unwrap();
        other
    }
}

fn bundle(keeper: &Keeper) -> Vec<CertificateDer<'static>> {
    let roots = keeper.kept().rotation.roots().to_vec();
    roots.into_iter().map(|published| published.root).collect()
}

#[test]
fn the_first_start_makes_an_authority_and_others_go_on_with_it() {
    let folders = Folders::new();
    let first = folders.open().unwrap().signing();
    let root = folders.root();
    assert_eq!(folders.open().unwrap().signing(), first);
    assert_eq!(folders.root(), root);
}

#[test]
fn an_authority_that_is_gone_is_never_replaced_by_a_new_root() {
    let folders = Folders::new();
    let first = folders.open().unwrap().signing();
    folders.remove(&["ca-key.pem", "root-cert.pem"]);
    let error = folders.open().err().unwrap();
    assert!(matches!(error, FolderError::Missing { .. }), "{error}");
    assert!(error.to_string().contains("put its files back"), "{error}");
    // Nor where only the copies are left of the state.
    fs::remove_file(folders.state().join("state.json")).unwrap();
    let error = folders.open().err().unwrap();
    assert!(matches!(error, FolderError::Missing { .. }), "{error}");
    assert!(folder::is_empty(&folders.dir()));

    // It is put back as the message says.
    for name in ["ca-key.pem", "root-cert.pem"] {
        let copy = folders.state().join("authority-1").join(name);
        fs::copy(copy, folders.dir().join(name)).unwrap();
    }
    assert_eq!(folders.open().unwrap().signing(), first);
}

#[test]
fn without_a_state_an_authority_in_pieces_is_an_error() {
    let folders = Folders::new();
    folders.open().unwrap();
    fs::remove_dir_all(folders.state()).unwrap();
    let key = fs::read(folders.dir().join("ca-key.pem")).unwrap();
    folders.remove(&["root-cert.pem"]);
    let error = folders.open().err().unwrap();
    let text = ErrorChain(&error).to_string();
    assert!(text.contains("root-cert.pem"), "{text}");
    assert!(!folders.dir().join("root-cert.pem").exists());
    assert_eq!(fs::read(folders.dir().join("ca-key.pem")).unwrap(), key);
}

#[test]
fn a_start_amid_a_replacement_goes_on_as_it_was_and_takes_over_what_fits_together() {
    let folders = Folders::new();
    let first = folders.open().unwrap();
    // Somebody has a certificate.
    let hour = Duration::from_secs(3600);
    first.kept().note(first.now() + hour, hour);
    let first = first.signing();
    let other = folders.other();
    let replace = |name: &str| fs::copy(other.join(name), folders.dir().join(name)).unwrap();
    replace("ca-key.pem");
    let keeper = folders.open().unwrap();
    assert_eq!(keeper.signing(), first);
    assert_eq!(bundle(&keeper), first.bundle().roots());
    assert!(keeper.kept().complaint.is_some());

    replace("root-cert.pem");
    keeper.look();
    let second = Authority::open(&other).unwrap();
    let both = [first.bundle().roots(), second.bundle().roots()].concat();
    let found = bundle(&keeper);
    assert!(both.iter().all(|root| found.contains(root)), "{found:?}");
    assert!(keeper.kept().complaint.is_none());
}
