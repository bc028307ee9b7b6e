//! Which attributes the fields and conditions of a rule match, and how their values are parsed.

use super::matching::{ServiceAccount, Values};
use crate::names;
use crate::policy::cidr::Cidr;
use crate::policy::pattern::Pattern;
use crate::policy::trust_domains::TrustDomains;

/// An attribute of a connection that a rule can match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attribute {
    Principals,
    Namespaces,
    ServiceAccounts,
    TrustDomains,
    SourceIps,
    DestinationIps,
    DestinationPorts,
}

/// The fields of `from.source` that apply to connections: positive name, negative name, attribute.
pub(super) const SOURCE: [(&str, &str, Attribute); 5] = [
    ("principals", "notPrincipals", Attribute::Principals),
    ("namespaces", "notNamespaces", Attribute::Namespaces),
    (
        "serviceAccounts",
        "notServiceAccounts",
        Attribute::ServiceAccounts,
    ),
    ("trustDomains", "notTrustDomains", Attribute::TrustDomains),
    ("ipBlocks", "notIpBlocks", Attribute::SourceIps),
];

/// The fields of `from.source` that apply to requests only.
pub(super) const HTTP_SOURCE: [&str; 4] = [
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
];

/// The fields of `to.operation` that apply to connections.
pub(super) const OPERATION: [(&str, &str, Attribute); 1] =
    [("ports", "notPorts", Attribute::DestinationPorts)];

/// The fields of `to.operation` that apply to requests only.
pub(super) const HTTP_OPERATION: [&str; 6] = [
    "hosts",
    "notHosts",
    "methods",
    "notMethods",
    "paths",
    "notPaths",
];

/// The meaning of the `key` of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Known(Attribute),
    Http,
    Unknown,
}

/// The keys of `when` (Istio's "authorization policy conditions").
pub(super) fn key(key: &str) -> Key {
    match key {
        "source.ip" => Key::Known(Attribute::SourceIps),
        "source.namespace" => Key::Known(Attribute::Namespaces),
        "source.serviceAccount" => Key::Known(Attribute::ServiceAccounts),
        "source.trustDomain" => Key::Known(Attribute::TrustDomains),
        "source.principal" => Key::Known(Attribute::Principals),
        "destination.ip" => Key::Known(Attribute::DestinationIps),
        "destination.port" => Key::Known(Attribute::DestinationPorts),
        "remote.ip"
        | "connection.sni"
        | "request.auth.principal"
        | "request.auth.audiences"
        | "request.auth.presenter" => Key::Http,
        _ => {
            let maps = ["request.headers[", "request.auth.claims[", "experimental."];
            match maps.iter().any(|map| key.starts_with(map)) {
                true => Key::Http,
                false => Key::Unknown,
            }
        }
    }
}

impl Attribute {
    /// An empty list of values.
    pub(super) fn no_values(self) -> Values {
        match self {
            Attribute::Principals => Values::Principals(Vec::new()),
            Attribute::Namespaces => Values::Namespaces(Vec::new()),
            Attribute::ServiceAccounts => Values::ServiceAccounts(Vec::new()),
            Attribute::TrustDomains => Values::TrustDomains(Vec::new()),
            Attribute::SourceIps => Values::SourceIps(Vec::new()),
            Attribute::DestinationIps => Values::DestinationIps(Vec::new()),
            Attribute::DestinationPorts => Values::DestinationPorts(Vec::new()),
        }
    }
}

impl Values {
    /// Parses one value of a policy in this namespace and adds it.
    ///
    /// # Errors
    ///
    /// The value is invalid, or can never match.
    pub(super) fn add(
        &mut self,
        text: &str,
        namespace: &str,
        trust_domains: &TrustDomains,
    ) -> Result<(), String> {
        match self {
            Values::Principals(patterns) => patterns.extend(principals(text, trust_domains)?),
            Values::Namespaces(patterns) => {
                let pattern = pattern(text, "a namespace", is_of_label)?;
                match is_part_of_name(&pattern, names::is_namespace) {
                    true => patterns.push(pattern),
                    false => {
                        return Err(format!("{text:?}: is not part of a valid namespace name"));
                    }
                }
            }
            Values::ServiceAccounts(accounts) => accounts.push(service_account(text, namespace)?),
            Values::TrustDomains(patterns) => {
                pattern(text, "a trust domain", is_of_trust_domain)?;
                for name in trust_domains.trust_domains(&text.to_ascii_lowercase()) {
                    patterns.push(Pattern::parse(&name)?);
                }
            }
            Values::SourceIps(blocks) | Values::DestinationIps(blocks) => blocks.push(block(text)?),
            Values::DestinationPorts(ports) => ports.push(port(text)?),
        }
        Ok(())
    }

    /// Whether the attribute identifies the source.
    pub(super) fn is_identity(&self) -> bool {
        matches!(
            self,
            Values::Principals(_) | Values::Namespaces(_) | Values::ServiceAccounts(_)
        )
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Values::Principals(values)
            | Values::Namespaces(values)
            | Values::TrustDomains(values) => values.is_empty(),
            Values::ServiceAccounts(values) => values.is_empty(),
            Values::SourceIps(values) | Values::DestinationIps(values) => values.is_empty(),
            Values::DestinationPorts(values) => values.is_empty(),
        }
    }
}

fn principals(text: &str, trust_domains: &TrustDomains) -> Result<Vec<Pattern>, String> {
    if text.starts_with("spiffe://") {
        return Err(format!(
            "{text:?}: principals are written without spiffe://"
        ));
    }
    let parsed = pattern(text, "a principal", is_of_principal)?;
    if !can_match_principal(&parsed) {
        return Err(format!(
            "{text:?} can never match; a principal is <trust domain>/ns/<namespace>/sa/<account>"
        ));
    }
    // Trust domains are compared in lower case.
    let text = match text.split_once('/') {
        Some((trust_domain, path)) => format!("{}/{path}", trust_domain.to_ascii_lowercase()),
        None => text.to_owned(),
    };
    let expanded = trust_domains.principals(&text);
    expanded.iter().map(|text| Pattern::parse(text)).collect()
}

fn pattern(text: &str, what: &str, admits: fn(u8) -> bool) -> Result<Pattern, String> {
    let pattern = Pattern::parse(text)?;
    match pattern.literal().bytes().all(admits) {
        true => Ok(pattern),
        false => Err(format!("{text:?} cannot be part of {what}")),
    }
}

/// Whether a valid name can match the pattern.
fn is_part_of_name(pattern: &Pattern, is_name: fn(&str) -> bool) -> bool {
    match pattern {
        Pattern::Exact(text) => is_name(text),
        // The shortest completion is enough.
        Pattern::Prefix(text) => is_name(text) || is_name(&format!("{text}0")),
        Pattern::Suffix(text) => is_name(text) || is_name(&format!("0{text}")),
        Pattern::Presence(_) => true,
    }
}

/// Whether any identity can match: `<trust domain>/<path>` without empty segments; in Istio's form the
/// third and fifth segments are Kubernetes names. A DENY rule with a value that never matches would
/// silently deny nothing.
fn can_match_principal(pattern: &Pattern) -> bool {
    let segments: Vec<&str> = pattern.literal().split('/').collect();
    // The complete segments.
    let (first, last) = match pattern {
        Pattern::Exact(_) => (0, segments.len()),
        Pattern::Prefix(_) => (0, segments.len() - 1),
        Pattern::Suffix(_) => (1, segments.len()),
        Pattern::Presence(_) => return true,
    };
    let is_legal = |segment: &&str| !matches!(*segment, "" | "." | "..");
    // An incomplete single segment may be the end of any segment.
    let is_whole = match pattern {
        Pattern::Exact(_) => segments.len() > 1,
        Pattern::Prefix(_) => true,
        _ => segments.last().is_some_and(|last| !last.is_empty()),
    };
    let has_trust_domain = first > 0 || !matches!(&segments[..last], ["ns", _, "sa", ..]);
    is_whole
        && has_trust_domain
        && segments[first..last].iter().all(is_legal)
        && has_legal_names(pattern, &segments, first, last)
}

/// Whether namespace and account of Istio's form are valid, as far as the pattern has them.
fn has_legal_names(pattern: &Pattern, segments: &[&str], first: usize, last: usize) -> bool {
    let is_name = |i: usize, is_name: fn(&str) -> bool| match segments.get(i) {
        None | Some(&"") => true,
        Some(segment) if (first..last).contains(&i) => is_name(segment),
        Some(segment) => match pattern {
            Pattern::Prefix(_) => is_name(&format!("{segment}0")),
            _ => is_name(&format!("0{segment}")),
        },
    };
    let is_account =
        |i: &usize| segments[*i] == "sa" || (*i >= last && "sa".starts_with(segments[*i]));
    let is_form = |i: &usize| match i.checked_sub(2) {
        Some(ns) => ns >= first && segments[ns] == "ns",
        None => *i == 1 && first == 1,
    };
    let ends_in_namespace = matches!(segments, [_, "ns", _]) && first == 0;
    let mut forms = (0..segments.len()).filter(|i| is_account(i) && is_form(i));
    forms.all(|i| is_name(i - 1, names::is_namespace) && is_name(i + 1, names::is_object_name))
        && (!ends_in_namespace || is_name(2, names::is_namespace))
}

fn is_of_label(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'
}

fn is_of_trust_domain(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')
}

fn is_of_principal(b: u8) -> bool {
    is_of_trust_domain(b) || b == b'/'
}

/// `namespace/account`, or an account of the policy's own namespace.
fn service_account(text: &str, namespace: &str) -> Result<ServiceAccount, String> {
    let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
    match names::is_namespace(namespace) && names::is_object_name(name) {
        true => Ok(ServiceAccount {
            namespace: namespace.into(),
            name: name.into(),
        }),
        false => Err(format!(
            "{text:?} is neither an account name nor namespace/account"
        )),
    }
}

/// Parses a block or a single address.
fn block(text: &str) -> Result<Cidr, String> {
    match text.contains('/') {
        true => Cidr::parse(text),
        false if text.contains(':') => Cidr::parse(&format!("{text}/128")),
        false => Cidr::parse(&format!("{text}/32")),
    }
    .map_err(|_| {
        format!("{text:?} is neither an address nor a block such as 10.0.0.0/8 or fd00::/8")
    })
}

fn port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port > 0 => Ok(port),
        _ => Err(format!("{text:?} is not a port (1 to 65535)")),
    }
}
