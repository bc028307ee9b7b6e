//! What no program may ever say.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lab::{Lab, Location};

use super::scene::NODES;

/// The CA's metrics, in the namespace it runs in.
const CA_METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15014);

/// Searches all that the lab's daemons and its certificate authority have said (logs, metrics,
/// dumps) for the authority's keys, the tokens' key, the tokens, and for private keys of any kind.
///
/// # Errors
/// Something secret was said, or something could not be searched.
pub fn appear_nowhere(lab: &Lab) -> Result<()> {
    let mut said = vec![("the authority's log".to_owned(), lab.ca_log()?)];
    let metrics = lab.http_get(&Location::Fabric, CA_METRICS.into(), "/metrics")?;
    said.push(("the authority's metrics".to_owned(), metrics.ok()?));
    for node in NODES {
        said.push((format!("the log of {node}"), lab.daemon_log(node)?));
        said.push((format!("the metrics of {node}"), lab.metrics(node)?));
        let dump = lab.config_dump(node)?.to_string();
        said.push((format!("the dump of {node}"), dump));
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
        secrets.extend(forms_of_key(&file)?);
    }
    for (place, text) in &said {
        ensure!(!text.is_empty(), "{place} is empty");
        for (what, secret) in &secrets {
            ensure!(!text.contains(secret.as_str()), "{what} appears in {place}");
        }
    }
    Ok(())
}

/// A key as one might print it: the lines of its PEM, its secret number in hexadecimal.
fn forms_of_key(file: &Path) -> Result<Vec<(String, String)>> {
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
        .context("the secret number")?;
    let hex: String = number.iter().map(|byte| format!("{byte:02x}")).collect();
    let list = format!("{number:?}");
    let forms = lines.iter().map(|line| (*line).to_owned());
    let forms = forms
        .filter(|line| line.len() > 20)
        .chain([hex.to_uppercase(), hex, list]);
    Ok(forms.map(|form| (what.clone(), form)).collect())
}

fn read(file: &Path) -> Result<String> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    Ok(text.trim().to_owned())
}
