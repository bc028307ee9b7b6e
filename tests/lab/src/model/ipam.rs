//! Who has which address.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

use crate::options::IpFamily;

/// A block of addresses of one family: a node's pod CIDR, or the service CIDR.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    first: IpAddr,
    /// Offsets from `first`, and who has them.
    taken: BTreeMap<u32, String>,
    size: u32,
    /// Where the search for a free one starts: an address is not given out again at once, so that
    /// what still talks to its last owner is seen to do so.
    next: u32,
}

impl Pool {
    pub(crate) fn new(first: IpAddr, size: u32) -> Self {
        Self {
            first,
            taken: BTreeMap::new(),
            size,
            next: 0,
        }
    }

    pub(crate) fn family(&self) -> IpFamily {
        IpFamily::of(self.first)
    }

    fn at(&self, offset: u32) -> IpAddr {
        match self.first {
            IpAddr::V4(first) => IpAddr::V4(Ipv4Addr::from_bits(first.to_bits() + offset)),
            IpAddr::V6(first) => {
                IpAddr::V6(Ipv6Addr::from_bits(first.to_bits() + u128::from(offset)))
            }
        }
    }

    fn offset(&self, ip: IpAddr) -> Option<u32> {
        let offset = match (self.first, ip) {
            (IpAddr::V4(first), IpAddr::V4(ip)) => ip.to_bits().checked_sub(first.to_bits())?,
            (IpAddr::V6(first), IpAddr::V6(ip)) => {
                u32::try_from(ip.to_bits().checked_sub(first.to_bits())?).ok()?
            }
            _ => return None,
        };
        (offset < self.size).then_some(offset)
    }

    /// A free address for `owner`.
    pub(crate) fn allocate(&mut self, owner: &str) -> Result<IpAddr> {
        for step in 0..self.size {
            let offset = (self.next + step) % self.size;
            if let Entry::Vacant(free) = self.taken.entry(offset) {
                free.insert(owner.to_owned());
                self.next = offset + 1;
                return Ok(self.at(offset));
            }
        }
        bail!(
            "no address is left of the {} from {}",
            self.size,
            self.first
        )
    }

    /// This very address for `owner`.
    pub(crate) fn claim(&mut self, ip: IpAddr, owner: &str) -> Result<()> {
        let Some(offset) = self.offset(ip) else {
            bail!(
                "address {ip} is not among the {} from {}",
                self.size,
                self.first
            );
        };
        if let Some(other) = self.taken.get(&offset) {
            bail!("address {ip} is taken by {other}");
        }
        self.taken.insert(offset, owner.to_owned());
        Ok(())
    }

    pub(crate) fn release(&mut self, ip: IpAddr) {
        if let Some(offset) = self.offset(ip) {
            self.taken.remove(&offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        Pool::new("10.244.1.2".parse().unwrap(), 3)
    }

    #[test]
    fn addresses_are_given_in_turn_and_not_again_at_once() {
        let mut pool = pool();
        let first = pool.allocate("a").unwrap();
        pool.release(first);
        assert_eq!(first.to_string(), "10.244.1.2");
        assert_eq!(pool.allocate("b").unwrap().to_string(), "10.244.1.3");
    }

    #[test]
    fn a_full_pool_says_so() {
        let mut pool = pool();
        for owner in ["a", "b", "c"] {
            pool.allocate(owner).unwrap();
        }
        assert!(
            pool.allocate("d")
                .unwrap_err()
                .to_string()
                .contains("no address is left")
        );
    }

    #[test]
    fn a_claimed_address_is_not_allocated_and_names_its_owner() {
        let mut pool = pool();
        let ip = "10.244.1.2".parse().unwrap();
        pool.claim(ip, "pod shop/a").unwrap();
        assert_eq!(pool.allocate("b").unwrap().to_string(), "10.244.1.3");
        assert!(
            pool.claim(ip, "c")
                .unwrap_err()
                .to_string()
                .contains("pod shop/a")
        );
        pool.release(ip);
        pool.claim(ip, "c").unwrap();
    }

    #[test]
    fn addresses_of_other_blocks_and_families_are_refused() {
        let mut pool = pool();
        for ip in ["10.244.1.1", "10.244.1.5", "fd00::1"] {
            assert!(pool.claim(ip.parse().unwrap(), "a").is_err(), "{ip}");
        }
    }

    #[test]
    fn v6_blocks_count_like_v4_blocks() {
        let mut pool = Pool::new("fd00:10:244:1::2".parse().unwrap(), 0xffff);
        assert_eq!(pool.allocate("a").unwrap().to_string(), "fd00:10:244:1::2");
        pool.claim("fd00:10:244:1::ff".parse().unwrap(), "b")
            .unwrap();
        assert!(
            pool.claim("fd00:10:244:2::2".parse().unwrap(), "c")
                .is_err()
        );
    }
}
