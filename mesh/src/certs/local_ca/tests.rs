use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::certs::verify::chains;

const HOUR: Duration = Duration::from_secs(3600);

fn web() -> SpiffeId {
    "spiffe://cluster.local/ns/shop/sa/web".parse().unwrap()
}

/// Two authorities, of which the first is in use.
struct Bench {
    folder: tempfile::TempDir,
    ca: LocalCa,
    roots: [String; 2],
    bundles: [TrustBundle; 2],
}

impl Bench {
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

    /// The key of the second one, with its permissions.
    fn take_the_other_key(&self) {
        let key = self.folder.path().join("other/ca-key.pem");
        fs::copy(key, self.file("ca-key.pem")).unwrap();
    }

    /// Which of the two would accept what is issued now.
    fn signer(&self) -> usize {
        let issued = self.ca.issue(&web(), HOUR).unwrap();
        let accepts = |bundle| chains(&issued.chain, bundle, SystemTime::now()).is_ok();
        self.bundles.iter().position(accepts).unwrap()
    }

    fn trusted(&self) -> usize {
        self.ca.bundle().borrow().roots().len()
    }

    async fn while_it_runs(&self, scenario: impl Future<Output = ()>) {
        tokio::select! {
            () = scenario => {}
            () = self.ca.run() => {}
        }
    }
}

/// A moment after the files were looked at again.
async fn look() {
    tokio::time::sleep(LOOK * 3 / 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_root_is_replaced_in_steps_and_at_each_of_them_the_files_fit_together_or_change_nothing()
{
    let bench = Bench::new();
    let [old, new] = &bench.roots;
    bench
        .while_it_runs(async {
            bench.write("root-cert.pem", &format!("{old}{new}"));
            look().await;
            assert_eq!((bench.trusted(), bench.signer()), (2, 0));
            // The key fits one of the two roots.
            bench.take_the_other_key();
            look().await;
            assert_eq!((bench.trusted(), bench.signer()), (2, 1));
            bench.write("root-cert.pem", new);
            look().await;
            assert_eq!((bench.trusted(), bench.signer()), (1, 1));
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn files_that_do_not_fit_together_yet_leave_the_last_good_ones_in_force() {
    let bench = Bench::new();
    bench
        .while_it_runs(async {
            bench.take_the_other_key();
            look().await;
            assert_eq!((bench.trusted(), bench.signer()), (1, 0));
            for broken in ["", "no PEM"] {
                bench.write("root-cert.pem", broken);
                look().await;
                assert_eq!((bench.trusted(), bench.signer()), (1, 0));
            }
            fs::remove_file(bench.file("root-cert.pem")).unwrap();
            look().await;
            assert_eq!((bench.trusted(), bench.signer()), (1, 0));
            bench.write("root-cert.pem", &bench.roots[1]);
            look().await;
            assert_eq!((bench.trusted(), bench.signer()), (1, 1));
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_mounted_secret_is_followed_through_its_links() {
    let bench = Bench::new();
    let volume = tempfile::tempdir().unwrap();
    let at = |name: &str| volume.path().join(name);
    fs::rename(bench.folder.path().join("ca"), at("..1")).unwrap();
    fs::rename(bench.folder.path().join("other"), at("..2")).unwrap();
    symlink("..1", at("..data")).unwrap();
    for file in ["root-cert.pem", "ca-key.pem"] {
        symlink(format!("..data/{file}"), at(file)).unwrap();
    }
    let bench = Bench {
        ca: LocalCa::open(volume.path()).unwrap(),
        ..bench
    };
    let mut bundle = bench.ca.bundle();
    bench
        .while_it_runs(async {
            symlink("..2", at("..new")).unwrap();
            fs::rename(at("..new"), at("..data")).unwrap();
            fs::remove_dir_all(at("..1")).unwrap();
            let changed = tokio::time::timeout(3 * LOOK, bundle.changed());
            changed.await.unwrap().unwrap();
            assert_eq!((bench.trusted(), bench.signer()), (1, 1));
        })
        .await;
}

#[test]
fn an_authority_that_has_expired_issues_nothing() {
    let bench = Bench::new();
    let end = bench.ca.authority().not_after();
    let error = bench.ca.issue_at(&web(), HOUR, end).unwrap_err();
    assert_eq!(error.code, "ca_expired");
}
