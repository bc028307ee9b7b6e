//! The root is replaced while callers hold certificates under the old one.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh::certs::{Authority, CertificateSource, IstioCa};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::time::{Instant, sleep};

use super::bench::*;
use crate::ca::keeper::Keeper;

const MINUTE: Duration = Duration::from_secs(60);

impl Bench {
    /// As an operator does: one file after the other, from somewhere else.
    fn replace(&self) -> CertificateDer<'static> {
        let other = self.path("other");
        let _ = fs::remove_dir_all(&other);
        let authority = Authority::create(&other).unwrap();
        for name in ["ca-key.pem", "root-cert.pem"] {
            fs::copy(other.join(name), self.config.dir.join(name)).unwrap();
        }
        authority.bundle().roots()[0].clone()
    }

    async fn until(&self, line: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let metrics = self.metrics().await;
            if metrics.lines().any(|found| found == line) {
                return;
            }
            assert!(Instant::now() < deadline, "{line} in {metrics}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Who signed, and which roots came along.
async fn asked(client: &IstioCa) -> (CertificateDer<'static>, BTreeSet<Vec<u8>>) {
    let issued = client.issue(&web(), MINUTE).await.unwrap();
    let bundle = client.bundle().borrow().clone();
    let signer = bundle
        .roots()
        .iter()
        .find(|root| signed(&issued.chain[0], root));
    let all = bundle.roots().iter().map(|root| root.to_vec()).collect();
    (signer.unwrap().clone(), all)
}

fn signed(leaf: &[u8], root: &[u8]) -> bool {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf).unwrap();
    let (_, root) = x509_parser::parse_x509_certificate(root).unwrap();
    leaf.verify_signature(Some(root.public_key())).is_ok()
}

#[tokio::test]
async fn a_new_root_is_handed_out_before_it_signs_and_the_old_one_until_nobody_needs_it() {
    let bench = Bench::start().await;
    let old = CertificateDer::from_pem_file(bench.root_file()).unwrap();
    let client = bench.client();
    assert_eq!(asked(&client).await.0, old);

    let new = bench.replace();
    bench.until("ambit_ca_roots 2").await;
    bench.pass(30);
    let (signer, roots) = asked(&client).await;
    assert_eq!(signer, old);
    assert_eq!(roots, BTreeSet::from([old.to_vec(), new.to_vec()]));

    // The first certificate has expired: whoever held it has the new root by now.
    bench.pass(31);
    bench
        .until("ambit_ca_signing_moves_timestamp_seconds 0")
        .await;
    let (signer, roots) = asked(&client).await;
    assert_eq!(signer, new);
    assert_eq!(roots.len(), 2);
    let bundle = fs::read(bench.config.state_dir.join("root-bundle.pem")).unwrap();
    assert_eq!(CertificateDer::pem_slice_iter(&bundle).count(), 2);

    // And the last one that the old authority signed.
    bench.pass(40);
    bench.until("ambit_ca_roots 1").await;
    let bundle = fs::read(bench.config.state_dir.join("root-bundle.pem")).unwrap();
    assert_eq!(CertificateDer::from_pem_slice(&bundle).unwrap(), new);
}

#[tokio::test]
async fn a_restart_in_between_forgets_nothing() {
    let mut bench = Bench::start().await;
    let old = CertificateDer::from_pem_file(bench.root_file()).unwrap();
    let client = bench.client();
    asked(&client).await;
    let new = bench.replace();
    bench.until("ambit_ca_roots 2").await;
    bench.restart().await;
    bench.pass(30);
    let (signer, roots) = asked(&client).await;
    assert_eq!(signer, old);
    assert_eq!(roots, BTreeSet::from([old.to_vec(), new.to_vec()]));
    bench.pass(31);
    bench
        .until("ambit_ca_signing_moves_timestamp_seconds 0")
        .await;
    assert_eq!(asked(&client).await.0, new);
    bench.restart().await;
    assert_eq!(asked(&client).await.0, new);
    bench.until("ambit_ca_roots 2").await;
}

#[tokio::test]
async fn a_folder_that_was_replaced_while_nobody_ran_is_taken_over_as_slowly() {
    let mut bench = Bench::start().await;
    let old = CertificateDer::from_pem_file(bench.root_file()).unwrap();
    let client = bench.client();
    asked(&client).await;
    bench.stop().await;
    bench.replace();
    bench.start_again().await;
    // Its file of roots holds only the new one; what it learned before lets it go on.
    let (signer, roots) = asked(&client).await;
    assert_eq!(signer, old);
    assert_eq!(roots.len(), 2);
}

#[test]
fn files_that_do_not_fit_together_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ca");
    let clock = Arc::new(SystemTime::now);
    let keeper = Keeper::open(&dir, &folder.path().join("state"), clock).unwrap();
    let before = keeper.signing();
    let key = dir.join("ca-key.pem");
    let good = fs::read(&key).unwrap();
    for content in [b"".as_slice(), b"garbage", &good[..good.len() / 2], &good] {
        fs::write(&key, content).unwrap();
        keeper.look();
        assert!(*keeper.signing() == *before);
        assert_eq!(keeper.standing().roots, 1);
    }
}
