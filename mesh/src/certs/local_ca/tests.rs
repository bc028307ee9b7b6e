use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::certs::verify_chain::verify_chain;

const HOUR: Duration = Duration::from_secs(3600);

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

/// Two CAs. The source uses the files of the first.
struct Fixture {
    folder: tempfile::TempDir,
    ca: LocalCa,
    roots: [String; 2],
    bundles: [TrustBundle; 2],
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let ca = LocalCa::create(&at("ca")).unwrap();
        let other = Authority::create(&at("other")).unwrap();
        let root = |name: &str| fs::read_to_string(at(name).join("root-cert.pem")).unwrap();
        Self {
            roots: [root("ca"), root("other")],
            bundles: [ca.authority().bundle().clone(), other.bundle().clone()],
            ca,
            folder,
        }
    }

    fn write(&self, file: &str, text: &str) {
        let (new, old) = (self.folder.path().join("new"), self.file(file));
        fs::write(&new, text).unwrap();
        fs::rename(new, old).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("ca").join(name)
    }

    /// Replaces the key by that of the second CA.
    fn replace_key(&self) {
        let key = self.folder.path().join("other/ca-key.pem");
        fs::copy(key, self.file("ca-key.pem")).unwrap();
    }

    /// Index of the CA whose roots accept a new certificate.
    fn signer(&self) -> usize {
        let issued = self.ca.issue(&web(), HOUR).unwrap();
        let is_accepted = |bundle| verify_chain(&issued.chain, bundle, SystemTime::now()).is_ok();
        self.bundles.iter().position(is_accepted).unwrap()
    }

    fn root_count(&self) -> usize {
        self.ca.bundle().borrow().roots().len()
    }

    async fn run_with(&self, scenario: impl Future<Output = ()>) {
        tokio::select! {
            () = scenario => {}
            () = self.ca.run() => {}
        }
    }
}

/// Waits for the next reload.
async fn wait_for_reload() {
    tokio::time::sleep(RELOAD_INTERVAL * 3 / 2).await;
}

#[tokio::test(start_paused = true)]
async fn each_step_of_a_root_rotation_takes_effect() {
    let fixture = Fixture::new();
    let [old, new] = &fixture.roots;
    fixture
        .run_with(async {
            fixture.write("root-cert.pem", &format!("{old}{new}"));
            wait_for_reload().await;
            assert_eq!((fixture.root_count(), fixture.signer()), (2, 0));
            // The key belongs to one of the two roots.
            fixture.replace_key();
            wait_for_reload().await;
            assert_eq!((fixture.root_count(), fixture.signer()), (2, 1));
            fixture.write("root-cert.pem", new);
            wait_for_reload().await;
            assert_eq!((fixture.root_count(), fixture.signer()), (1, 1));
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn mismatched_files_leave_the_previous_ca_in_use() {
    let fixture = Fixture::new();
    fixture
        .run_with(async {
            fixture.replace_key();
            wait_for_reload().await;
            assert_eq!((fixture.root_count(), fixture.signer()), (1, 0));
            for invalid in ["", "not PEM"] {
                fixture.write("root-cert.pem", invalid);
                wait_for_reload().await;
                assert_eq!((fixture.root_count(), fixture.signer()), (1, 0));
            }
            fs::remove_file(fixture.file("root-cert.pem")).unwrap();
            wait_for_reload().await;
            assert_eq!((fixture.root_count(), fixture.signer()), (1, 0));
            fixture.write("root-cert.pem", &fixture.roots[1]);
            wait_for_reload().await;
            assert_eq!((fixture.root_count(), fixture.signer()), (1, 1));
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn an_updated_secret_volume_is_reloaded() {
    let fixture = Fixture::new();
    let volume = tempfile::tempdir().unwrap();
    let at = |name: &str| volume.path().join(name);
    fs::rename(fixture.folder.path().join("ca"), at("..1")).unwrap();
    fs::rename(fixture.folder.path().join("other"), at("..2")).unwrap();
    symlink("..1", at("..data")).unwrap();
    for file in ["root-cert.pem", "ca-key.pem"] {
        symlink(format!("..data/{file}"), at(file)).unwrap();
    }
    let fixture = Fixture {
        ca: LocalCa::open(volume.path()).unwrap(),
        ..fixture
    };
    let mut bundle = fixture.ca.bundle();
    fixture
        .run_with(async {
            symlink("..2", at("..new")).unwrap();
            fs::rename(at("..new"), at("..data")).unwrap();
            fs::remove_dir_all(at("..1")).unwrap();
            let changed = tokio::time::timeout(3 * RELOAD_INTERVAL, bundle.changed());
            changed.await.unwrap().unwrap();
            assert_eq!((fixture.root_count(), fixture.signer()), (1, 1));
        })
        .await;
}

#[test]
fn an_expired_ca_issues_nothing() {
    let fixture = Fixture::new();
    let expiry = fixture.ca.authority().not_after();
    let error = fixture.ca.issue_at(&web(), HOUR, expiry).unwrap_err();
    assert_eq!(error.code, "ca_expired");
}
