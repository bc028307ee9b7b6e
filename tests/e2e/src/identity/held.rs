//! Which certificates the daemons hold, now and over time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lab::Lab;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;

use crate::metrics;

const EXPIRY: &str = "ambit_certificate_expiry_timestamp_seconds";

/// How often it is noted which certificates are held.
const LOOK: Duration = Duration::from_millis(200);

/// An identity as a node's configuration dump shows it.
#[derive(Debug, Clone)]
pub struct Held {
    /// `Available`, `Initializing` and so on.
    pub state: String,
    /// Everything that is said of it.
    pub entry: Value,
    /// The leaf's serial number; empty without a certificate.
    pub serial: String,
    /// The leaf.
    pub leaf: Option<CertificateDer<'static>>,
}

/// What a node holds for an identity; `None` if it does not know it.
///
/// # Errors
/// The daemon does not answer.
pub fn held(lab: &Lab, node: &str, identity: &str) -> Result<Option<Held>> {
    let dump = lab.config_dump(node)?;
    let all = dump["certificates"].as_array().context("certificates")?;
    let found = all.iter().find(|entry| entry["identity"] == identity);
    found.map(read).transpose()
}

fn read(entry: &Value) -> Result<Held> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let leaf = entry.pointer("/certChain/0/pem").and_then(Value::as_str);
    Ok(Held {
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

/// The roots that a node shows for an identity.
///
/// # Errors
/// The daemon does not answer, or shows no PEM.
pub fn roots(lab: &Lab, node: &str, identity: &str) -> Result<BTreeSet<Vec<u8>>> {
    let held = held(lab, node, identity)?.with_context(|| format!("no {identity}"))?;
    let roots = held.entry["rootCerts"].as_array().context("rootCerts")?;
    let pem = |root: &Value| {
        let der = certificate(root["pem"].as_str().unwrap_or_default())?;
        Ok(der.to_vec())
    };
    roots.iter().map(pem).collect()
}

/// Dumps have PEM in base64, as Istio's have.
fn certificate(text: &str) -> Result<CertificateDer<'static>> {
    let pem = BASE64.decode(text).context("base64")?;
    CertificateDer::from_pem_slice(&pem).context("PEM")
}

/// When which certificate was held.
#[derive(Debug, Default)]
pub struct Timeline(BTreeMap<String, Vec<Sighting>>);

/// One that was not there before.
#[derive(Debug, Clone, Copy)]
struct Sighting {
    seen: f64,
    expires: f64,
}

impl Timeline {
    /// Records the daemons of these nodes until it is asked for.
    pub fn record<'scope>(
        scope: &'scope Scope<'scope, '_>,
        lab: &'scope Lab,
        nodes: &'scope [&'scope str],
    ) -> Recording<'scope> {
        let (stop, stopped) = channel::<()>();
        let run = move || {
            let mut timeline = Self::default();
            loop {
                for node in nodes {
                    // A daemon that does not answer holds nothing new.
                    let scrape = metrics::scrape(lab, node).unwrap_or_default();
                    timeline.note(&scrape, now());
                }
                if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                    return timeline;
                }
            }
        };
        let thread = scope.spawn(run);
        Recording { stop, thread }
    }

    fn note(&mut self, scrape: &[metrics::Sample], seen: f64) {
        for sample in scrape.iter().filter(|sample| sample.name == EXPIRY) {
            let Some(identity) = sample.labels.get("identity") else {
                continue;
            };
            let expires = sample.value;
            let all = self.0.entry(identity.clone()).or_default();
            if all.last().is_none_or(|last| last.expires < expires) {
                all.push(Sighting { seen, expires });
            }
        }
    }

    /// When the identity had no valid certificate although it had had one; the end is when the next
    /// was seen.
    pub fn gaps(&self, identity: &str) -> Vec<Range<f64>> {
        let all = self.0.get(identity).map(Vec::as_slice).unwrap_or_default();
        all.windows(2)
            .filter(|pair| pair[1].seen > pair[0].expires)
            .map(|pair| pair[0].expires..pair[1].seen)
            .collect()
    }

    /// How many certificates of the identity were seen.
    pub fn certificates(&self, identity: &str) -> usize {
        self.0.get(identity).map_or(0, Vec::len)
    }
}

/// A [`Timeline`] that is being recorded.
#[derive(Debug)]
pub struct Recording<'scope> {
    stop: Sender<()>,
    thread: ScopedJoinHandle<'scope, Timeline>,
}

impl Recording<'_> {
    /// What was recorded.
    ///
    /// # Panics
    /// If the recording did.
    pub fn end(self) -> Timeline {
        drop(self.stop);
        match self.thread.join() {
            Ok(timeline) => timeline,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Unix time in seconds.
pub fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_from_an_expiry_to_the_next_certificate() {
        let mut timeline = Timeline::default();
        let scrape =
            |expires: u32| metrics::parse(&format!("{EXPIRY}{{identity=\"i\"}} {expires}"));
        for (seen, expires) in [(0.0, 20), (10.0, 30), (25.0, 30), (34.0, 54), (44.0, 64)] {
            timeline.note(&scrape(expires), seen);
        }
        assert_eq!(timeline.gaps("i"), [30.0..34.0]);
        assert_eq!(timeline.certificates("i"), 4);
        assert!(timeline.gaps("other").is_empty());
    }
}
