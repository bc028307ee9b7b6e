//! Which certificates does the authority issue, and for how long?

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use mesh::certs::CertificateSource;
use rcgen::{BasicConstraints, DnType, IsCa, KeyUsagePurpose, PublicKeyData, SanType};
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::super::folder::to_pem;
use super::fixture::*;

fn der(text: &str) -> rustls_pki_types::CertificateDer<'static> {
    rustls_pki_types::CertificateDer::from_pem_slice(text.as_bytes()).unwrap()
}

fn parsed(der: &[u8]) -> X509Certificate<'_> {
    x509_parser::parse_x509_certificate(der).unwrap().1
}

#[tokio::test]
async fn issued_certificate_is_accepted_by_openssl() {
    let mut fixture = Fixture::start().await;
    let client = fixture.client();
    let ttl = std::time::Duration::from_secs(100);
    let issued = client.issue(&web(), ttl).await.unwrap();
    assert_eq!(issued.chain.len(), 1);
    assert_eq!(client.bundle().borrow().roots().len(), 1);

    let leaf = fixture.path("leaf.pem");
    fs::write(&leaf, to_pem(&issued.chain[0])).unwrap();
    let mut openssl = Command::new("openssl");
    let verified = openssl
        .args(["verify", "-x509_strict", "-purpose", "sslserver", "-CAfile"])
        .arg(fixture.root_file())
        .arg(&leaf);
    assert!(stdout_of(verified).contains("OK"));
    let text = stdout_of(
        Command::new("openssl")
            .args(["x509", "-noout", "-text", "-in"])
            .arg(&leaf),
    );
    for line in [
        "CA:FALSE",
        WEB,
        "TLS Web Client Authentication",
        "prime256v1",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
    assert!(
        text.contains("X509v3 Subject Alternative Name: critical"),
        "{text}"
    );
    fixture.stop().await;
}

#[tokio::test]
async fn only_the_key_of_a_csr_is_used() {
    let fixture = Fixture::start().await;
    let (token, pair) = (fixture.token(), key_pair());
    let mut params = rcgen::CertificateParams::new(vec!["kubernetes.default".to_owned()]).unwrap();
    let bank = "spiffe://cluster.local/ns/bank/sa/vault";
    params
        .subject_alt_names
        .push(SanType::URI(bank.try_into().unwrap()));
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let csr = params.serialize_request(&pair).unwrap().pem().unwrap();
    let chain = fixture
        .call(Call {
            token: Some(&token),
            identity: Some(WEB),
            csr: Some(csr),
            ..Call::default()
        })
        .await
        .unwrap();
    let leaf = der(&chain[0]);
    let leaf = parsed(&leaf);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI(WEB)]);
    assert!(!leaf.is_ca());
    assert_eq!(leaf.subject().to_string(), "");
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    assert_eq!(
        leaf.public_key().subject_public_key.data.as_ref(),
        pair.der_bytes()
    );
}

#[tokio::test]
async fn lifetime_is_within_the_limits_and_that_of_the_authority() {
    let fixture = Fixture::start().await;
    let token = fixture.token();
    for (requested, granted) in [(30, 30), (0, 60), (-5, 60), (100_000, 120), (i64::MAX, 120)] {
        let call = Call {
            token: Some(&token),
            identity: Some(WEB),
            seconds: requested,
            ..Call::default()
        };
        let chain = fixture.call(call).await.unwrap();
        let leaf = der(&chain[0]);
        let end = parsed(&leaf).validity().not_after.timestamp();
        let left = end - time::OffsetDateTime::now_utc().unix_timestamp();
        assert!(
            (granted - 3..=granted + 1).contains(&left),
            "{requested}: {left}"
        );
        assert!(parsed(&leaf).serial.bits() > 60);
    }
    // One minute before the authority's own certificate expires.
    fixture.advance_clock(10 * 365 * 24 * 3600 - 60);
    let call = Call {
        token: Some(&token),
        identity: Some(WEB),
        seconds: 120,
        ..Call::default()
    };
    let chain = create_certificate(fixture.channel(), call).await;
    let leaf = der(&chain.unwrap()[0]);
    let root = der(&fs::read_to_string(fixture.root_file()).unwrap());
    assert_eq!(
        parsed(&leaf).validity().not_after,
        parsed(&root).validity().not_after
    );
}

#[tokio::test]
async fn certificates_for_the_same_key_have_different_serial_numbers() {
    let fixture = Fixture::start().await;
    let (token, request) = (fixture.token(), csr(&key_pair()));
    let mut serials = Vec::new();
    for _ in 0..2 {
        let call = Call {
            token: Some(&token),
            csr: Some(request.clone()),
            ..Call::default()
        };
        let leaf = der(&fixture.call(call).await.unwrap()[0]);
        serials.push(parsed(&leaf).raw_serial_as_string());
    }
    assert_ne!(serials[0], serials[1]);
}

#[tokio::test]
async fn response_ends_with_the_root_and_has_the_callers_identity_by_default() {
    let fixture = Fixture::start().await;
    let token = fixture.token();
    let call = Call {
        token: Some(&token),
        ..Call::default()
    };
    let chain = fixture.call(call).await.unwrap();
    assert_eq!(chain.len(), 2);
    let root = fs::read_to_string(fixture.root_file()).unwrap();
    assert_eq!(der(&chain[1]), der(&root));
    let leaf = der(&chain[0]);
    let leaf = parsed(&leaf);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    let own = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
    assert_eq!(names.value.general_names, [GeneralName::URI(own)]);
}

#[tokio::test]
async fn created_files_are_private_and_survive_a_restart() {
    let mut fixture = Fixture::start().await;
    let key = fixture.config.dir.join("ca-key.pem");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&key), 0o600);
    let copies: Vec<_> = walk(&fixture.config.state_dir);
    assert!(copies.iter().any(|path| path.ends_with("ca-key.pem")));
    for path in copies {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    let (before, root) = (
        fs::read(&key).unwrap(),
        fs::read(fixture.root_file()).unwrap(),
    );
    fixture.restart().await;
    assert_eq!(fs::read(&key).unwrap(), before);
    assert_eq!(fs::read(fixture.root_file()).unwrap(), root);
}

fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path.is_dir() {
            true => walk(&path),
            false => vec![path],
        })
        .collect()
}

#[tokio::test]
async fn metrics_count_requests_and_readiness_is_served() {
    let fixture = Fixture::start().await;
    let token = fixture.token();
    let good = Call {
        token: Some(&token),
        ..Call::default()
    };
    fixture.call(good).await.unwrap();
    fixture.call(Call::default()).await.unwrap_err();
    let metrics = fixture.metrics().await;
    for line in [
        "ambit_ca_issued_total 1",
        "ambit_ca_refused_total{reason=\"no_token\"} 1",
        "ambit_ca_roots 1",
        "ambit_ca_request_duration_seconds_count 2",
        "ambit_ca_signing_moves_timestamp_seconds 0",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line} is not in {metrics}"
        );
    }
    let ready = page(fixture.running().readiness, "/healthz/ready").await;
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
}

/// Creates the files of `cacerts` as Istio's documentation does, with one more intermediate.
const CACERTS: &str = r#"
set -eu
ca() { printf 'basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n' > ca.ext; }
ca
openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /O=Istio/CN=Root \
    -keyout root.key -out root-cert.pem -addext keyUsage=critical,keyCertSign,cRLSign
openssl req -newkey rsa:2048 -nodes -subj /O=Istio/CN=Policy -keyout policy.key -out policy.csr
openssl x509 -req -in policy.csr -CA root-cert.pem -CAkey root.key -days 1000 -extfile ca.ext -out policy.pem
openssl ecparam -name prime256v1 -genkey -noout -out ca-key.pem
openssl req -new -key ca-key.pem -subj /O=Istio/CN=Issuing -out ca.csr
openssl x509 -req -in ca.csr -CA policy.pem -CAkey policy.key -days 100 -extfile ca.ext -out ca-cert.pem
cat ca-cert.pem policy.pem root-cert.pem > cert-chain.pem
rm -f root.key policy.key policy.csr ca.csr ca.ext
chmod 600 ca-key.pem
"#;

#[tokio::test]
async fn istio_cacerts_are_used_unchanged_and_the_whole_chain_is_sent() {
    let mut fixture = Fixture::start().await;
    fixture.stop().await;
    let dir = fixture.path("cacerts");
    fs::create_dir(&dir).unwrap();
    let created = Command::new("bash")
        .args(["-c", CACERTS])
        .current_dir(&dir)
        .output();
    let created = created.unwrap();
    assert!(
        created.status.success(),
        "{}",
        String::from_utf8_lossy(&created.stderr)
    );
    (fixture.config.dir, fixture.config.state_dir) = (dir.clone(), fixture.path("other-state"));
    fixture.start_process().await;

    let client = fixture.client();
    let minute = std::time::Duration::from_secs(60);
    let issued = client.issue(&web(), minute).await.unwrap();
    assert_eq!(issued.chain.len(), 3);
    assert_eq!(client.bundle().borrow().roots().len(), 1);
    let texts: Vec<String> = issued.chain.iter().map(to_pem).collect();
    fs::write(dir.join("leaf"), &texts[0]).unwrap();
    fs::write(dir.join("intermediates"), texts[1..].concat()).unwrap();
    let mut openssl = Command::new("openssl");
    let verify = openssl
        .current_dir(&dir)
        .args(["verify", "-purpose", "sslclient"]);
    let verify = verify.args([
        "-CAfile",
        "root-cert.pem",
        "-untrusted",
        "intermediates",
        "leaf",
    ]);
    assert!(stdout_of(verify).contains("OK"));
}
