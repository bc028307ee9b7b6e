use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use super::{Authority, HeaderError};

/// The original client, in the `forwarded` header of RFC 7239 as Istio writes it: `for="10.0.0.1:4711";host=svc`.
///
/// A hint for telemetry only: anybody in the mesh may write anything here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Forwarded {
    /// The address and port that the client connected from.
    pub for_: SocketAddr,
    /// The service that it asked for, if it asked for one.
    pub host: Option<String>,
}

/// Far more than an address and a host name need.
const MAX_HEADER: usize = 1024;

/// A host name and a port.
const MAX_HOST: usize = 260;

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", Authority::from(self.for_))?;
        match self.host.as_deref().filter(|host| is_host(host)) {
            Some(host) => write!(f, ";host={host}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Forwarded {
    type Err = HeaderError;

    /// Takes one element; of several proxies' elements, separated by commas, none is more credible than the others.
    fn from_str(s: &str) -> Result<Self, HeaderError> {
        if s.len() > MAX_HEADER {
            return Err(malformed("too long"));
        }
        let (mut for_, mut host) = (None, None);
        for pair in s.split(';') {
            let (key, value) = pair
                .split_once('=')
                .ok_or(malformed("not a list of pairs"))?;
            let value = unquote(value.trim_matches([' ', '\t']))?;
            match key.trim_matches([' ', '\t']).to_ascii_lowercase().as_str() {
                "for" if for_.is_none() => for_ = Some(parse_address(value)?),
                "host" if host.is_none() => host = Some(parse_host(value)?),
                "by" | "proto" => {}
                _ => return Err(malformed("unknown or repeated parameter")),
            }
        }
        let for_ = for_.ok_or(malformed("no for parameter"))?;
        Ok(Self { for_, host })
    }
}

fn unquote(value: &str) -> Result<&str, HeaderError> {
    let inner = match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').ok_or(malformed("unclosed quote"))?,
        None => value,
    };
    // No escapes: no value that we understand has need of one.
    if inner.contains(['"', '\\', ',']) {
        Err(malformed("bad character"))
    } else {
        Ok(inner)
    }
}

fn parse_address(value: &str) -> Result<SocketAddr, HeaderError> {
    match value.parse() {
        Ok(Authority::Address(address)) => Ok(address),
        _ => Err(malformed("for is not an address with a port")),
    }
}

fn parse_host(value: &str) -> Result<String, HeaderError> {
    if is_host(value) {
        Ok(value.to_owned())
    } else {
        Err(malformed("bad host"))
    }
}

fn is_host(host: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    !host.is_empty() && host.len() <= MAX_HOST && host.bytes().all(allowed)
}

const fn malformed(problem: &'static str) -> HeaderError {
    HeaderError {
        header: "forwarded",
        problem,
    }
}
