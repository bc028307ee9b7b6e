//! Nothing secret is written down.

use std::fs;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use mesh::certs::CertificateSource;
use tracing_subscriber::fmt::MakeWriter;

use super::bench::*;

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
async fn no_token_no_key_and_no_request_is_ever_in_the_log_at_any_level() {
    let lines = Lines::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(lines.clone())
        .finish();
    // The authority and its callers run on this thread.
    let _logged = tracing::subscriber::set_default(subscriber);
    let mut bench = Bench::start().await;
    let client = bench.client();
    let ttl = std::time::Duration::from_secs(60);
    // What another test logs for the first time at this moment may count as wanted by nobody, and
    // would stay so.
    client.issue(&web(), ttl).await.unwrap();
    tracing::callsite::rebuild_interest_cache();
    let issued = client.issue(&web(), ttl).await.unwrap();
    let (good, request) = (bench.token(), csr(&pair()));
    let bad = good.replace('e', "f");
    for (token, identity) in [
        (&good, WEB),
        (&bad, WEB),
        (&good, "spiffe://cluster.local/ns/bank/sa/vault"),
    ] {
        let ask = Ask {
            token: Some(token),
            identity: Some(identity),
            csr: Some(request.clone()),
            ..Ask::default()
        };
        let _ = bench.ask(ask).await;
    }
    let (dir, config) = (bench.folder.path().to_owned(), bench.config.clone());
    bench.stop().await;

    let log = String::from_utf8_lossy(&lines.0.lock().unwrap()).into_owned();
    for told in [
        "outcome=\"issued\"",
        "outcome=\"refused\"",
        "reason=\"not_allowed\"",
        WEB,
    ] {
        assert!(log.contains(told), "{told} in {log}");
    }
    let base64 = |text: &str| text.lines().nth(1).unwrap().to_owned();
    let file = |path: std::path::PathBuf| fs::read_to_string(path).unwrap();
    let mut secrets = vec![
        good.clone(),
        bad.clone(),
        good.rsplit_once('.').unwrap().1.to_owned(),
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
