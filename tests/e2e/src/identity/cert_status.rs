//! The certificate that a daemon holds for an identity, as its configuration dump shows it.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lab::Lab;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;

/// An identity in a node's configuration dump.
#[derive(Debug, Clone)]
pub struct CertStatus {
    /// `Available`, `Initializing` and so on.
    pub state: String,
    /// The whole dump entry.
    pub entry: Value,
    /// The leaf's serial number; empty without a certificate.
    pub serial: String,
    /// The leaf.
    pub leaf: Option<CertificateDer<'static>>,
}

/// The certificate status of an identity on a node; `None` if the dump does not have the identity.
///
/// # Errors
/// The daemon does not respond, or a certificate in the dump is not PEM.
pub fn cert_status(lab: &Lab, node: &str, identity: &str) -> Result<Option<CertStatus>> {
    let dump = lab.config_dump(node)?;
    let all = dump["certificates"].as_array().context("certificates")?;
    let found = all.iter().find(|entry| entry["identity"] == identity);
    found.map(parse).transpose()
}

/// The roots (DER) in the dump entry of an identity.
///
/// # Errors
/// The daemon does not respond, does not have the identity, or a root is not PEM.
pub fn roots(lab: &Lab, node: &str, identity: &str) -> Result<BTreeSet<Vec<u8>>> {
    let status = cert_status(lab, node, identity)?.with_context(|| format!("no {identity}"))?;
    let roots = status.entry["rootCerts"].as_array().context("rootCerts")?;
    let der = |root: &Value| {
        let der = certificate(root["pem"].as_str().unwrap_or_default())?;
        Ok(der.to_vec())
    };
    roots.iter().map(der).collect()
}

fn parse(entry: &Value) -> Result<CertStatus> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let leaf = entry.pointer("/certChain/0/pem").and_then(Value::as_str);
    Ok(CertStatus {
        state: text(&entry["state"]),
        entry: entry.clone(),
        serial: text(
            entry
                .pointer("/certChain/0/serialNumber")
                .unwrap_or(&Value::Null),
        ),
        leaf: leaf.map(certificate).transpose()?,
    })
}

/// Decodes a certificate of the dump, which is PEM in base64 as in Istio's dumps.
fn certificate(text: &str) -> Result<CertificateDer<'static>> {
    let pem = BASE64.decode(text).context("base64")?;
    CertificateDer::from_pem_slice(&pem).context("PEM")
}
