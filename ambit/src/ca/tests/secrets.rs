//! Secrets are never logged.

use std::fs;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use mesh::certs::CertificateSource;
use tracing_subscriber::fmt::MakeWriter;

use super::fixture::*;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn log_contains_no_token_key_or_csr_at_any_level() {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(lines.clone())
        .finish();
    // The authority and its callers run on this thread.
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut fixture = Fixture::start().await;
    let client = fixture.client();
    let ttl = std::time::Duration::from_secs(60);
    // A callsite that another test registers at the same time may be cached as disabled; the rebuild
    // enables it.
    client.issue(&web(), ttl).await.unwrap();
    tracing::callsite::rebuild_interest_cache();
    let issued = client.issue(&web(), ttl).await.unwrap();
    let (valid, request) = (fixture.token(), csr(&key_pair()));
    let invalid = valid.replace('e', "f");
    for (token, identity) in [
        (&valid, WEB),
        (&invalid, WEB),
        (&valid, "spiffe://cluster.local/ns/bank/sa/vault"),
    ] {
        let call = Call {
            token: Some(token),
            identity: Some(identity),
            csr: Some(request.clone()),
            ..Call::default()
        };
        let _ = fixture.call(call).await;
    }
    let (dir, config) = (fixture.folder.path().to_owned(), fixture.config.clone());
    fixture.stop().await;

    let log = String::from_utf8_lossy(&lines.0.lock().unwrap()).into_owned();
    for line in [
        "outcome=\"issued\"",
        "outcome=\"refused\"",
        "reason=\"not_allowed\"",
        WEB,
    ] {
        assert!(log.contains(line), "{line} is not in {log}");
    }
    let base64 = |text: &str| text.lines().nth(1).unwrap().to_owned();
    let file = |path: std::path::PathBuf| fs::read_to_string(path).unwrap();
    let mut secrets = vec![
        valid.clone(),
        invalid.clone(),
        valid.rsplit_once('.').unwrap().1.to_owned(),
        base64(&request),
        base64(&file(config.dir.join("ca-key.pem"))),
        base64(&file(dir.join("token.key"))),
    ];
    let hex: String = issued
        .key
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    secrets.push(hex[hex.len() - 32..].to_owned());
    secrets.push(format!("{:?}", &issued.key[..]));
    let pem = pem::encode(&pem::Pem::new("PRIVATE KEY", issued.key.to_vec()));
    secrets.push(base64(&pem));
    for secret in secrets {
        assert!(!log.contains(&secret), "{secret} is in the log");
    }
    assert!(!log.contains("PRIVATE KEY"));
}
