//! Values of the command line: from text to what they mean, and all complaints in one place.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use spiffe::TrustDomain;
use tracing_subscriber::EnvFilter;

/// The complaints so far.
#[derive(Debug, Default)]
pub(super) struct Errors(Vec<String>);

impl Errors {
    /// Says which of these values are empty. A variable that a manifest sets to nothing is a mistake
    /// there, and not a wish for the default.
    pub(super) fn empty(&mut self, values: &[(&str, Option<&OsStr>)]) {
        for (flag, _) in values
            .iter()
            .filter(|(_, value)| *value == Some(OsStr::new("")))
        {
            self.say(format!("{flag} is empty; leave it out if it has no value"));
        }
    }

    /// The value, or a complaint and a stand-in that nobody will see.
    pub(super) fn required<T: Default>(&mut self, flag: &str, value: Option<T>) -> T {
        value.unwrap_or_else(|| {
            self.0.push(format!("{flag} is required"));
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
            self.0.push(format!("{flag} {value:?}: {error}"));
            default
        })
    }

    /// A trust domain, or a complaint and one that nobody will see.
    pub(super) fn trust_domain(&mut self, name: &str) -> TrustDomain {
        TrustDomain::new(name).unwrap_or_else(|error| {
            self.0.push(format!("--trust-domain {name:?}: {error}"));
            stand_in()
        })
    }

    /// Trust domains separated by commas; those that are none become complaints.
    pub(super) fn trust_domains(&mut self, names: Option<&str>) -> Vec<TrustDomain> {
        let names = list(names.unwrap_or_default());
        let parse = |name: String| match TrustDomain::new(&name) {
            Ok(domain) => Some(domain),
            Err(error) => {
                self.say(format!("--trust-domain-aliases {name:?}: {error}"));
                None
            }
        };
        names.into_iter().filter_map(parse).collect()
    }

    /// Adds a complaint.
    pub(super) fn say(&mut self, complaint: String) {
        self.0.push(complaint);
    }

    /// Fails with the complaints, if there are any.
    pub(super) fn none(self) -> Result<(), Vec<String>> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(self.0)
        }
    }
}

#[allow(clippy::expect_used)]
fn stand_in() -> TrustDomain {
    TrustDomain::new("invalid").expect("seven lower-case letters are a trust domain")
}

/// Durations as Go writes them, which Istio's variables do: `5s`, `500ms`, `1h30m`.
pub(super) fn duration(text: &str, least: Duration) -> Result<Duration, String> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let unit_length = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_length);
        let number: u32 = number
            .parse()
            .map_err(|_| "a number and a unit are needed, such as 5s".to_string())?;
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
    if text.is_empty() || total < least {
        return Err(format!("it must be at least {least:?}"));
    }
    Ok(total)
}

/// A number of threads, a percentage of the cores (rounded up), or 0 for all of them.
pub(super) fn threads(text: &str, cores: usize) -> Result<usize, String> {
    /// More threads than this are a slip of the pen.
    const MOST: usize = 512;
    let number = |text: &str| {
        text.parse::<usize>()
            .map_err(|_| "a number, or a percentage such as 50%, is needed".to_string())
    };
    let threads = match text.strip_suffix('%') {
        Some(percent) => cores.saturating_mul(number(percent)?).div_ceil(100),
        None => number(text)?,
    };
    match threads {
        0 => Ok(cores),
        1..=MOST => Ok(threads),
        _ => Err(format!("more than {MOST}")),
    }
}

/// An address with a port.
pub(super) fn addresses(text: &str, loopback: bool) -> Result<SocketAddr, String> {
    let text = text
        .strip_prefix("localhost:")
        .map_or_else(|| text.to_string(), |port| format!("127.0.0.1:{port}"));
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "an address and a port are needed, such as 127.0.0.1:15000".to_string())?;
    if loopback && !address.ip().is_loopback() {
        return Err("it must be a loopback address".into());
    }
    Ok(address)
}

/// Log levels, unchanged if they can be understood.
pub(super) fn levels(text: &str) -> Result<String, tracing_subscriber::filter::ParseError> {
    EnvFilter::try_new(text).map(|_| text.to_string())
}

/// Whether something is enforced.
pub(super) fn enforced(text: &str) -> Result<bool, &'static str> {
    match text {
        "enforce" => Ok(true),
        "off" => Ok(false),
        _ => Err("it must be enforce or off"),
    }
}

/// Names separated by commas.
pub(super) fn list(text: &str) -> BTreeSet<String> {
    text.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(str::to_string)
        .collect()
}
