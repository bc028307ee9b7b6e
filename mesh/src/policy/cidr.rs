//! Address blocks in CIDR notation.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// A block of addresses of one family, with the host bits cleared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Cidr(IpNet);

impl Cidr {
    /// Parses `10.0.0.0/8` or `fd00::/8`. Host bits are ignored, as in Kubernetes.
    ///
    /// # Errors
    ///
    /// The error describes the mistake. Rejects what two parsers may read differently: a prefix length with a
    /// sign or a leading zero, and an IPv4-mapped IPv6 address.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not an address block such as 10.0.0.0/8 or fd00::/8");
        let (address, length) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let has_leading_zero = length.len() > 1 && length.starts_with('0');
        if has_leading_zero || !length.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        if matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some()) {
            return Err(format!("{text:?} is IPv4-mapped; write the block as IPv4"));
        }
        let length: u8 = length.parse().map_err(|_| bad())?;
        let block = IpNet::new(address, length).map_err(|_| bad())?;
        Ok(Self(block.trunc()))
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }

    /// Whether the other block is a part of this one, and not equal to it.
    pub(super) fn strictly_contains(&self, other: &Self) -> bool {
        self.0 != other.0 && self.0.contains(&other.0)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests;
