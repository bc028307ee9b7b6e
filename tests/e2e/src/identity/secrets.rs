//! Checks that no secret appears in logs, metrics and dumps.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lab::{Lab, Location};

use super::fixture::NODES;

/// The CA's metrics address, in the namespace where it runs.
const CA_METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15014);

/// Searches logs, metrics and dumps of the lab's daemons and certificate authority for the authority's key, the token
/// key, the tokens' signatures, and private keys of any kind.
///
/// # Errors
/// A secret was found, or an output could not be read.
pub fn check_no_secrets_exposed(lab: &Lab) -> Result<()> {
    let mut outputs = vec![("the CA's log".to_owned(), lab.ca_log()?)];
    let metrics = lab.http_get(&Location::Fabric, CA_METRICS.into(), "/metrics")?;
    outputs.push(("the CA's metrics".to_owned(), metrics.ok()?));
    for node in NODES {
        outputs.push((format!("the log of {node}"), lab.daemon_log(node)?));
        outputs.push((format!("the metrics of {node}"), lab.metrics(node)?));
        let dump = lab.config_dump(node)?.to_string();
        outputs.push((format!("the dump of {node}"), dump));
    }
    let mut secrets = vec![
        ("a private key".to_owned(), "PRIVATE KEY".to_owned()),
        ("a private key".to_owned(), BASE64.encode("-----BEGIN PRIV")),
    ];
    for node in NODES {
        let token = read(&lab.token_file(node))?;
        let signature = token.rsplit('.').next().unwrap_or_default().to_owned();
        ensure!(signature.len() > 40, "no signed token of node {node}");
        secrets.push((format!("the token of {node}"), signature));
    }
    let tokens = lab.token_file("key.pem");
    for file in [lab.ca_folder().join("ca-key.pem"), tokens] {
        secrets.extend(key_encodings(&file)?);
    }
    for (place, text) in &outputs {
        ensure!(!text.is_empty(), "{place} is empty");
        for (what, secret) in &secrets {
            ensure!(!text.contains(secret.as_str()), "{what} appears in {place}");
        }
    }
    Ok(())
}

/// The forms in which a key could be printed: the lines of its PEM, and its private number in hexadecimal and as a list.
fn key_encodings(file: &Path) -> Result<Vec<(String, String)>> {
    let pem = read(file)?;
    let what = format!("the key {}", file.display());
    let lines: Vec<&str> = pem
        .lines()
        .filter(|line| !line.starts_with("---"))
        .collect();
    ensure!(!lines.is_empty(), "{what} is empty");
    let der = BASE64.decode(lines.concat()).context("base64")?;
    // In both encodings of a key of P-256, SEC 1 and PKCS#8, the number follows the octets 04 20.
    let at = der.windows(2).position(|two| two == [0x04, 0x20]);
    let number = at
        .and_then(|at| der.get(at + 2..at + 34))
        .context("the private number")?;
    let hex: String = number.iter().map(|byte| format!("{byte:02x}")).collect();
    let list = format!("{number:?}");
    let encodings = lines.iter().map(|line| (*line).to_owned());
    let encodings = encodings
        .filter(|line| line.len() > 20)
        .chain([hex.to_uppercase(), hex, list]);
    Ok(encodings.map(|encoding| (what.clone(), encoding)).collect())
}

fn read(file: &Path) -> Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Ok(text.trim().to_owned())
}
