//! Values of the command line: from text to what they mean, and all complaints in one place.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rcgen::SanType;
use spiffe::TrustDomain;
use tracing_subscriber::EnvFilter;

/// The complaints so far.
#[derive(Debug, Default)]
pub(super) struct Errors(Vec<String>);

impl Errors {
    pub(super) fn say(&mut self, complaint: String) {
        self.0.push(complaint);
    }

    /// The value, or a complaint and a stand-in that nobody will see.
    pub(super) fn required<T: Default>(&mut self, flag: &str, value: Option<T>) -> T {
        value.unwrap_or_else(|| {
            self.say(format!("{flag} is required"));
            T::default()
        })
    }

    /// The meaning of a value, the default if there is no value, or a complaint and the default.
    pub(super) fn parsed<T, E: Display>(
        &mut self,
        flag: &str,
        value: Option<String>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> T {
        let Some(value) = value else { return default };
        parse(&value).unwrap_or_else(|error| {
            self.say(format!("{flag} {value:?}: {error}"));
            default
        })
    }

    /// A trust domain, or a complaint and one that nobody will see.
    pub(super) fn trust_domain(&mut self, name: &str) -> TrustDomain {
        TrustDomain::new(name).unwrap_or_else(|error| {
            self.say(format!("--trust-domain {name:?}: {error}"));
            stand_in()
        })
    }

    /// Fails with the complaints, if there are any.
    pub(super) fn none(self) -> Result<(), Vec<String>> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err(self.0),
        }
    }
}

#[allow(clippy::expect_used)]
fn stand_in() -> TrustDomain {
    TrustDomain::new("invalid").expect("seven lower-case letters are a trust domain")
}

/// Durations as Go writes them, which Istio's variables do: `5s`, `500ms`, `1h30m`.
pub fn duration(text: &str, least: Duration) -> Result<Duration, String> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit());
        let (number, tail) = rest.split_at(digits.unwrap_or(rest.len()));
        let letters = tail.find(|c: char| c.is_ascii_digit());
        let (unit, tail) = tail.split_at(letters.unwrap_or(tail.len()));
        let number: u32 = number
            .parse()
            .map_err(|_| "a number and a unit are needed, such as 24h".to_owned())?;
        let unit = match unit {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            other => return Err(format!("the unit {other:?} is none of ms, s, m, h")),
        };
        total = unit
            .checked_mul(number)
            .and_then(|part| total.checked_add(part))
            .ok_or("it is too long")?;
        rest = tail;
    }
    match text.is_empty() || total < least {
        true => Err(format!("it must be at least {least:?}")),
        false => Ok(total),
    }
}

/// An address with a port.
pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let text = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_owned(),
    };
    text.parse()
        .map_err(|_| "an address and a port are needed, such as 10.0.0.1:15012".to_owned())
}

/// DNS names and addresses, and those that go without saying.
pub(super) fn names(text: &str, listen: IpAddr) -> Result<Vec<SanType>, String> {
    let mut names = vec![SanType::DnsName(
        "localhost".try_into().map_err(|_| "localhost".to_owned())?,
    )];
    let mut addresses = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    if !listen.is_unspecified() && !listen.is_loopback() {
        addresses.push(listen);
    }
    for name in text.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        if let Ok(address) = name.parse() {
            addresses.push(address);
            continue;
        }
        let usable = |c: char| c.is_ascii_alphanumeric() || ".-_*".contains(c);
        let name = name.chars().all(usable).then(|| name.try_into().ok());
        let name = name.flatten();
        names.push(SanType::DnsName(name.ok_or(
            "DNS names and addresses are needed, separated by commas",
        )?));
    }
    names.extend(addresses.into_iter().map(SanType::IpAddress));
    Ok(names)
}

/// Log levels, unchanged if they can be understood.
pub(super) fn levels(text: &str) -> Result<String, tracing_subscriber::filter::ParseError> {
    EnvFilter::try_new(text).map(|_| text.to_owned())
}
