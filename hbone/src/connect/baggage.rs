//! The `baggage` header: which workload sends, parsing and printing.

use std::fmt::{self, Write as _};

/// The sending workload, in Istio's `baggage` header.
///
/// A hint for telemetry only: identity comes from the certificate. Parsing never fails; members that are unknown, too
/// long or malformed are ignored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Baggage {
    /// `k8s.cluster.name`
    pub cluster: Option<String>,
    /// `k8s.namespace.name`
    pub namespace: Option<String>,
    /// The kind in the key `k8s.<kind>.name`: `deployment`, `pod`, `job` or `cronjob`.
    pub workload_type: Option<String>,
    /// The value of `k8s.<kind>.name`.
    pub workload_name: Option<String>,
    /// `service.name`: the canonical name.
    pub service_name: Option<String>,
    /// `service.version`: the canonical revision.
    pub service_version: Option<String>,
    /// `cloud.region`
    pub region: Option<String>,
    /// `cloud.availability_zone`
    pub zone: Option<String>,
}

/// W3C's limit. Istio's eight members fit with the longest names that Kubernetes allows.
const MAX_HEADER_BYTES: usize = 8192;

/// Kubernetes object names have at most 253 bytes, label values 63.
const MAX_VALUE_BYTES: usize = 253;

/// Further members are ignored.
const MAX_MEMBERS: usize = 64;

/// Workload types that have a key of the form `k8s.<kind>.name`.
const KINDS: [&str; 4] = ["deployment", "pod", "job", "cronjob"];

impl Baggage {
    /// Parses a header value, and ignores members that are not usable.
    pub fn parse(s: &str) -> Self {
        let mut baggage = Self::default();
        if s.len() > MAX_HEADER_BYTES {
            return baggage;
        }
        for member in s.split(',').take(MAX_MEMBERS) {
            // Properties of a member, after `;`, are ignored.
            let member = member.split_once(';').map_or(member, |(m, _)| m);
            let Some((key, value)) = member.split_once('=') else {
                continue;
            };
            let Some(value) = decode(value.trim_matches([' ', '\t'])) else {
                continue;
            };
            baggage.set(key.trim_matches([' ', '\t']), value);
        }
        baggage
    }

    /// Sets a field. The first of several members with one key is used.
    fn set(&mut self, key: &str, value: String) {
        let field = match key {
            "k8s.cluster.name" => &mut self.cluster,
            "k8s.namespace.name" => &mut self.namespace,
            "service.name" => &mut self.service_name,
            "service.version" => &mut self.service_version,
            "cloud.region" => &mut self.region,
            "cloud.availability_zone" => &mut self.zone,
            _ => return self.set_workload(key, value),
        };
        field.get_or_insert(value);
    }

    fn set_workload(&mut self, key: &str, value: String) {
        let kind = key
            .strip_prefix("k8s.")
            .and_then(|k| k.strip_suffix(".name"));
        let Some(kind) = kind.filter(|k| KINDS.contains(k)) else {
            return;
        };
        if self.workload_name.is_none() {
            self.workload_type = Some(kind.to_owned());
            self.workload_name = Some(value);
        }
    }

    /// The kind in the workload's key; `pod` for a type without a key of its own.
    fn kind(&self) -> &str {
        let kind = self.workload_type.as_deref().unwrap_or("pod");
        if KINDS.contains(&kind) { kind } else { "pod" }
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut is_first = true;
        let mut member = |key: fmt::Arguments<'_>, value: &Option<String>| {
            let Some(value) = value.as_deref().filter(|v| !v.is_empty()) else {
                return Ok(());
            };
            if !std::mem::take(&mut is_first) {
                f.write_char(',')?;
            }
            write!(f, "{key}=")?;
            encode(f, value)
        };
        member(format_args!("k8s.cluster.name"), &self.cluster)?;
        member(format_args!("k8s.namespace.name"), &self.namespace)?;
        member(
            format_args!("k8s.{}.name", self.kind()),
            &self.workload_name,
        )?;
        member(format_args!("service.name"), &self.service_name)?;
        member(format_args!("service.version"), &self.service_version)?;
        member(format_args!("cloud.region"), &self.region)?;
        member(format_args!("cloud.availability_zone"), &self.zone)
    }
}

/// Whether a byte needs no escape: `baggage-octet` of W3C Baggage, section 3.2.1.3, without `%`.
fn is_plain(b: u8) -> bool {
    b.is_ascii_graphic() && !matches!(b, b'"' | b',' | b';' | b'\\' | b'%')
}

fn encode(f: &mut fmt::Formatter<'_>, value: &str) -> fmt::Result {
    for b in value.bytes().take(MAX_VALUE_BYTES) {
        if is_plain(b) {
            f.write_char(char::from(b))?;
        } else {
            write!(f, "%{b:02X}")?;
        }
    }
    Ok(())
}

fn decode(value: &str) -> Option<String> {
    let mut bytes = value.bytes();
    let mut out = Vec::with_capacity(value.len().min(MAX_VALUE_BYTES));
    while let Some(b) = bytes.next() {
        let b = match b {
            b'%' => hex(bytes.next()?)? << 4 | hex(bytes.next()?)?,
            b if is_plain(b) => b,
            _ => return None,
        };
        if out.len() == MAX_VALUE_BYTES {
            return None;
        }
        out.push(b);
    }
    // Rejects control characters, which would reach log lines.
    let value = String::from_utf8(out).ok()?;
    (!value.is_empty() && !value.chars().any(char::is_control)).then_some(value)
}

fn hex(b: u8) -> Option<u8> {
    match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        b'A'..=b'F' => Some(b - b'A' + 10),
        _ => None,
    }
}
