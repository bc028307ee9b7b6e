//! The `forwarded` header: which client opened the connection, parsing and printing.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use super::authority::Authority;
use super::header_error::HeaderError;

/// The original client, in the `forwarded` header of RFC 7239 as Istio writes it: `for="10.0.0.1:4711";host=svc`.
///
/// A hint for telemetry only, because any peer in the mesh can send any value.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Forwarded {
    /// The source address and port of the client.
    pub for_: SocketAddr,
    /// The service that the client connected to, if any.
    pub host: Option<String>,
}

/// Well above the length of an address and a host name.
const MAX_HEADER_BYTES: usize = 1024;

/// A host name and a port.
const MAX_HOST_BYTES: usize = 260;

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

    /// Accepts a single element only. With elements of several proxies, separated by commas, none is more credible than
    /// the others.
    fn from_str(s: &str) -> Result<Self, HeaderError> {
        if s.len() > MAX_HEADER_BYTES {
            return Err(error("too long"));
        }
        let (mut for_, mut host) = (None, None);
        for pair in s.split(';') {
            let (key, value) = pair.split_once('=').ok_or(error("not a list of pairs"))?;
            let value = unquote(value.trim_matches([' ', '\t']))?;
            match key.trim_matches([' ', '\t']).to_ascii_lowercase().as_str() {
                "for" if for_.is_none() => for_ = Some(parse_address(value)?),
                "host" if host.is_none() => host = Some(parse_host(value)?),
                "by" | "proto" => {}
                _ => return Err(error("unknown or repeated parameter")),
            }
        }
        let for_ = for_.ok_or(error("no for parameter"))?;
        Ok(Self { for_, host })
    }
}

fn unquote(value: &str) -> Result<&str, HeaderError> {
    let inner = match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').ok_or(error("unclosed quote"))?,
        None => value,
    };
    // No escapes: no supported value needs one.
    if inner.contains(['"', '\\', ',']) {
        Err(error("bad character"))
    } else {
        Ok(inner)
    }
}

fn parse_address(value: &str) -> Result<SocketAddr, HeaderError> {
    match value.parse() {
        Ok(Authority::Address(address)) => Ok(address),
        _ => Err(error("for is not an address with a port")),
    }
}

fn parse_host(value: &str) -> Result<String, HeaderError> {
    if is_host(value) {
        Ok(value.to_owned())
    } else {
        Err(error("bad host"))
    }
}

fn is_host(host: &str) -> bool {
    let is_allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b':');
    !host.is_empty() && host.len() <= MAX_HOST_BYTES && host.bytes().all(is_allowed)
}

const fn error(problem: &'static str) -> HeaderError {
    HeaderError {
        header: "forwarded",
        problem,
    }
}
