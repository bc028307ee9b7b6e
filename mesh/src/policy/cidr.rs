//! Blocks of addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A block of addresses of one family.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Cidr {
    v6: bool,
    /// Network part; an IPv4 address stands in the low 32 bits.
    network: u128,
    mask: u128,
}

impl Cidr {
    /// Reads `10.0.0.0/8` or `fd00::/8`. Bits behind the prefix do not count, as for Kubernetes.
    ///
    /// # Errors
    ///
    /// Says what is wrong. What two readers may take for different blocks is refused: a prefix
    /// length with a sign or a leading zero, an IPv4 address in its mapped form.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is no block of addresses such as 10.0.0.0/8 or fd00::/8");
        let (address, length) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let plain = length.bytes().all(|b| b.is_ascii_digit())
            && (length.len() == 1 || !length.starts_with('0'));
        let length: u32 = match plain {
            true => length.parse().map_err(|_| bad())?,
            false => return Err(bad()),
        };
        let (v6, bits, width) = match address {
            IpAddr::V4(v4) => (false, u128::from(v4.to_bits()), 32),
            IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
                return Err(format!("{text:?} is an IPv4 block in an IPv6 dress"));
            }
            IpAddr::V6(v6) => (true, v6.to_bits(), 128),
        };
        if length > width {
            return Err(bad());
        }
        let all = u128::MAX >> (128 - width);
        // A shift by the whole width is none: the mask of /0 is empty.
        let mask = all & !all.checked_shr(length).unwrap_or_default();
        Ok(Self {
            v6,
            network: bits & mask,
            mask,
        })
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        let (v6, bits) = match ip {
            IpAddr::V4(v4) => (false, u128::from(v4.to_bits())),
            IpAddr::V6(v6) => (true, v6.to_bits()),
        };
        self.v6 == v6 && bits & self.mask == self.network
    }

    /// Whether the other block is a part of this one, and not all of it.
    pub(super) fn strictly_contains(&self, other: &Self) -> bool {
        self.v6 == other.v6
            && self.mask.count_ones() < other.mask.count_ones()
            && other.network & self.mask == self.network
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = match self.v6 {
            true => IpAddr::V6(Ipv6Addr::from_bits(self.network)),
            false => {
                let [.., a, b, c, d] = self.network.to_be_bytes();
                IpAddr::V4(Ipv4Addr::new(a, b, c, d))
            }
        };
        write!(f, "{address}/{}", self.mask.count_ones())
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests;
