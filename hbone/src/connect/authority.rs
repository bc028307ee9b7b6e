//! The `:authority` of a CONNECT: grammar, parsing and printing.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use super::header_error::HeaderError;

/// The target of a CONNECT: `10.0.0.1:80`, `[2001:db8::1]:80` or `name.ns.svc:80`.
///
/// Strict: no user info, no zone id, no port 0, no leading zeros, no bytes outside the grammar of RFC 1123 host names.
/// A string that resembles an IPv4 address and is invalid is not parsed as a name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address.
    Address(SocketAddr),
    /// A host name, in the received spelling.
    Host {
        /// Labels of letters, digits, `-` and `_`, separated by dots; at most 253 bytes.
        name: String,
        /// Never 0.
        port: u16,
    },
}

/// RFC 1035, section 2.3.4.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

impl Authority {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(SocketAddr::new(address.ip(), address.port()))
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(SocketAddr::V4(a)) => write!(f, "{a}"),
            // Not `SocketAddrV6`'s own format, which includes the scope id.
            Self::Address(SocketAddr::V6(a)) => write!(f, "[{}]:{}", a.ip(), a.port()),
            Self::Host { name, port } => write!(f, "{name}:{port}"),
        }
    }
}

impl FromStr for Authority {
    type Err = HeaderError;

    fn from_str(s: &str) -> Result<Self, HeaderError> {
        let (host, port) = s.rsplit_once(':').ok_or(error("no port"))?;
        let port = parse_port(port)?;
        if let Some(inner) = host.strip_prefix('[') {
            let inner = inner.strip_suffix(']').ok_or(error("unclosed bracket"))?;
            let ip: Ipv6Addr = inner.parse().map_err(|_| error("bad IPv6 address"))?;
            return Ok(Self::Address((IpAddr::V6(ip), port).into()));
        }
        if let Ok(ip) = host.parse::<Ipv4Addr>() {
            return Ok(Self::Address((IpAddr::V4(ip), port).into()));
        }
        check_name(host)?;
        Ok(Self::Host {
            name: host.to_owned(),
            port,
        })
    }
}

fn parse_port(s: &str) -> Result<u16, HeaderError> {
    let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits || s.starts_with('0') {
        return Err(error("bad port"));
    }
    s.parse().map_err(|_| error("bad port"))
}

fn check_name(name: &str) -> Result<(), HeaderError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(error("bad length of host name"));
    }
    let mut last_label = "";
    for label in name.split('.') {
        let is_allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let has_outer_hyphen = label.starts_with('-') || label.ends_with('-');
        if label.is_empty()
            || label.len() > MAX_LABEL_BYTES
            || has_outer_hyphen
            || !label.bytes().all(is_allowed)
        {
            return Err(error("bad label in host name"));
        }
        last_label = label;
    }
    // As in the WHATWG URL standard: a name whose last label is a number is an IPv4 address, and this one is invalid.
    if last_label.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error("bad IPv4 address"));
    }
    Ok(())
}

const fn error(problem: &'static str) -> HeaderError {
    HeaderError {
        header: ":authority",
        problem,
    }
}
