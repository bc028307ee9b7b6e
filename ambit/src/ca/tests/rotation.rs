//! The root is replaced while certificates under the old one are valid.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh::certs::{Authority, CertificateSource, IstioCa};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::time::{Instant, sleep};

use super::fixture::*;
use crate::ca::state::CaState;

const MINUTE: Duration = Duration::from_secs(60);

impl Fixture {
    /// Replaces the files one after the other, as an operator does.
    fn replace_authority(&self) -> CertificateDer<'static> {
        let other = self.path("other");
        let _ = fs::remove_dir_all(&other);
        let authority = Authority::create(&other).unwrap();
        for name in ["ca-key.pem", "root-cert.pem"] {
            fs::copy(other.join(name), self.config.dir.join(name)).unwrap();
        }
        authority.bundle().roots()[0].clone()
    }

    async fn wait_for_metric(&self, line: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let metrics = self.metrics().await;
            if metrics.lines().any(|found| found == line) {
                return;
            }
            assert!(Instant::now() < deadline, "{line} is not in {metrics}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Issues a certificate. Returns the root that it verifies under, and all distributed roots.
async fn issue(client: &IstioCa) -> (CertificateDer<'static>, BTreeSet<Vec<u8>>) {
    let issued = client.issue(&web(), MINUTE).await.unwrap();
    let bundle = client.bundle().borrow().clone();
    let signer = bundle
        .roots()
        .iter()
        .find(|root| is_signed_by(&issued.chain[0], root));
    let roots = bundle.roots().iter().map(|root| root.to_vec()).collect();
    (signer.unwrap().clone(), roots)
}

fn is_signed_by(leaf: &[u8], root: &[u8]) -> bool {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf).unwrap();
    let (_, root) = x509_parser::parse_x509_certificate(root).unwrap();
    leaf.verify_signature(Some(root.public_key())).is_ok()
}

#[tokio::test]
async fn new_root_is_distributed_before_it_signs_and_the_old_one_until_its_certificates_expire() {
    let fixture = Fixture::start().await;
    let old = CertificateDer::from_pem_file(fixture.root_file()).unwrap();
    let client = fixture.client();
    assert_eq!(issue(&client).await.0, old);

    let new = fixture.replace_authority();
    fixture.wait_for_metric("ambit_ca_roots 2").await;
    fixture.advance_clock(30);
    let (signer, roots) = issue(&client).await;
    assert_eq!(signer, old);
    assert_eq!(roots, BTreeSet::from([old.to_vec(), new.to_vec()]));

    // The first certificate has expired, so every holder of a certificate has the new root.
    fixture.advance_clock(31);
    fixture
        .wait_for_metric("ambit_ca_signing_moves_timestamp_seconds 0")
        .await;
    let (signer, roots) = issue(&client).await;
    assert_eq!(signer, new);
    assert_eq!(roots.len(), 2);
    let bundle = fs::read(fixture.config.state_dir.join("root-bundle.pem")).unwrap();
    assert_eq!(CertificateDer::pem_slice_iter(&bundle).count(), 2);

    // The last certificate of the old authority has expired.
    fixture.advance_clock(40);
    fixture.wait_for_metric("ambit_ca_roots 1").await;
    let bundle = fs::read(fixture.config.state_dir.join("root-bundle.pem")).unwrap();
    assert_eq!(CertificateDer::from_pem_slice(&bundle).unwrap(), new);
}

#[tokio::test]
async fn restart_during_a_replacement_continues_it() {
    let mut fixture = Fixture::start().await;
    let old = CertificateDer::from_pem_file(fixture.root_file()).unwrap();
    let client = fixture.client();
    issue(&client).await;
    let new = fixture.replace_authority();
    fixture.wait_for_metric("ambit_ca_roots 2").await;
    fixture.restart().await;
    fixture.advance_clock(30);
    let (signer, roots) = issue(&client).await;
    assert_eq!(signer, old);
    assert_eq!(roots, BTreeSet::from([old.to_vec(), new.to_vec()]));
    fixture.advance_clock(31);
    fixture
        .wait_for_metric("ambit_ca_signing_moves_timestamp_seconds 0")
        .await;
    assert_eq!(issue(&client).await.0, new);
    fixture.restart().await;
    assert_eq!(issue(&client).await.0, new);
    fixture.wait_for_metric("ambit_ca_roots 2").await;
}

#[tokio::test]
async fn replacement_during_downtime_also_waits_for_earlier_certificates() {
    let mut fixture = Fixture::start().await;
    let old = CertificateDer::from_pem_file(fixture.root_file()).unwrap();
    let client = fixture.client();
    issue(&client).await;
    fixture.stop().await;
    fixture.replace_authority();
    fixture.start_process().await;
    // The root file has only the new root; the client still trusts the roots of earlier responses.
    let (signer, roots) = issue(&client).await;
    assert_eq!(signer, old);
    assert_eq!(roots.len(), 2);
}

#[test]
fn inconsistent_files_keep_the_current_authority() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ca");
    let clock = Arc::new(SystemTime::now);
    let state = CaState::open(&dir, &folder.path().join("state"), clock).unwrap();
    let before = state.signing_authority();
    let key = dir.join("ca-key.pem");
    let valid = fs::read(&key).unwrap();
    for content in [
        b"".as_slice(),
        b"garbage",
        &valid[..valid.len() / 2],
        &valid,
    ] {
        fs::write(&key, content).unwrap();
        state.reload();
        assert!(*state.signing_authority() == *before);
        assert_eq!(state.status().root_count, 1);
    }
}
