//! What the fields of a rule compare, and how their values are written.

use crate::policy::aliases::TrustDomains;
use crate::policy::cidr::Cidr;
use crate::policy::rule::{ServiceAccount, Values};
use crate::policy::text::Pattern;

/// Something that a connection has and a rule can ask for.
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

/// The fields of `from.source` that connections have: listed, and listed as excluded.
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

/// Those that only requests have.
pub(super) const HTTP_SOURCE: [&str; 4] = [
    "requestPrincipals",
    "notRequestPrincipals",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
];

/// The fields of `to.operation` that connections have.
pub(super) const OPERATION: [(&str, &str, Attribute); 1] =
    [("ports", "notPorts", Attribute::DestinationPorts)];

/// Those that only requests have.
pub(super) const HTTP_OPERATION: [&str; 6] = [
    "hosts",
    "notHosts",
    "methods",
    "notMethods",
    "paths",
    "notPaths",
];

/// What the `key` of a condition asks for.
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
    /// Without a value yet.
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
    /// Reads one value of a policy in this namespace. Says what is wrong with it: a value that can
    /// match nothing was meant to match something.
    pub(super) fn add(
        &mut self,
        text: &str,
        namespace: &str,
        trust_domains: &TrustDomains,
    ) -> Result<(), String> {
        match self {
            Values::Principals(patterns) => patterns.extend(principals(text, trust_domains)?),
            Values::Namespaces(patterns) => {
                patterns.push(pattern(text, "a namespace", is_of_label)?);
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

    /// Whether it says who the source is.
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
    pattern(text, "a principal", is_of_principal)?;
    // Trust domains are lower case, whatever their certificate says.
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
        false => Err(format!("{text:?} can be no part of {what}")),
    }
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
    let is_name =
        |name: &str| !name.is_empty() && name.bytes().all(|b| is_of_label(b) || b == b'.');
    match is_name(namespace) && is_name(name) {
        true => Ok(ServiceAccount {
            namespace: namespace.into(),
            name: name.into(),
        }),
        false => Err(format!(
            "{text:?} is neither an account nor namespace/account"
        )),
    }
}

/// A block, or one address.
fn block(text: &str) -> Result<Cidr, String> {
    match text.contains('/') {
        true => Cidr::parse(text),
        false if text.contains(':') => Cidr::parse(&format!("{text}/128")),
        false => Cidr::parse(&format!("{text}/32")),
    }
    .map_err(|_| format!("{text:?} is no address, and no block such as 10.0.0.0/8 or fd00::/8"))
}

fn port(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port > 0 => Ok(port),
        _ => Err(format!("{text:?} is no port (1 to 65535)")),
    }
}
