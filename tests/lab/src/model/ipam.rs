//! Allocation of addresses from a block.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

use crate::options::IpFamily;

/// A block of addresses of one family: a node's pod CIDR, or the service CIDR.
#[derive(Debug, Clone)]
pub(crate) struct AddressPool {
    first: IpAddr,
    /// Owners by offset from `first`.
    owners: BTreeMap<u32, String>,
    size: u32,
    /// The offset at which the search for a free address starts. A released address is not reused at
    /// once, so that traffic to its previous owner fails instead of reaching another pod.
    next: u32,
}

impl AddressPool {
    pub(crate) fn new(first: IpAddr, size: u32) -> Self {
        Self {
            first,
            owners: BTreeMap::new(),
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

    /// Allocates a free address.
    pub(crate) fn allocate(&mut self, owner: &str) -> Result<IpAddr> {
        for step in 0..self.size {
            let offset = (self.next + step) % self.size;
            if let Entry::Vacant(free) = self.owners.entry(offset) {
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

    /// Allocates this address.
    pub(crate) fn reserve(&mut self, ip: IpAddr, owner: &str) -> Result<()> {
        let Some(offset) = self.offset(ip) else {
            bail!(
                "address {ip} is not among the {} from {}",
                self.size,
                self.first
            );
        };
        if let Some(other) = self.owners.get(&offset) {
            bail!("address {ip} is taken by {other}");
        }
        self.owners.insert(offset, owner.to_owned());
        Ok(())
    }

    /// Frees an address. One that is not of this block is ignored.
    pub(crate) fn release(&mut self, ip: IpAddr) {
        if let Some(offset) = self.offset(ip) {
            self.owners.remove(&offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> AddressPool {
        AddressPool::new("10.244.1.2".parse().unwrap(), 3)
    }

    #[test]
    fn released_address_is_not_reused_at_once() {
        let mut pool = pool();
        let first = pool.allocate("a").unwrap();
        pool.release(first);
        assert_eq!(first.to_string(), "10.244.1.2");
        assert_eq!(pool.allocate("b").unwrap().to_string(), "10.244.1.3");
    }

    #[test]
    fn full_pool_is_an_error() {
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
    fn reserved_address_is_not_allocated_and_names_its_owner() {
        let mut pool = pool();
        let ip = "10.244.1.2".parse().unwrap();
        pool.reserve(ip, "pod shop/a").unwrap();
        assert_eq!(pool.allocate("b").unwrap().to_string(), "10.244.1.3");
        assert!(
            pool.reserve(ip, "c")
                .unwrap_err()
                .to_string()
                .contains("pod shop/a")
        );
        pool.release(ip);
        pool.reserve(ip, "c").unwrap();
    }

    #[test]
    fn addresses_of_other_blocks_and_families_are_refused() {
        let mut pool = pool();
        for ip in ["10.244.1.1", "10.244.1.5", "fd00::1"] {
            assert!(pool.reserve(ip.parse().unwrap(), "a").is_err(), "{ip}");
        }
    }

    #[test]
    fn ipv6_pool_allocates_like_ipv4_pool() {
        let mut pool = AddressPool::new("fd00:10:244:1::2".parse().unwrap(), 0xffff);
        assert_eq!(pool.allocate("a").unwrap().to_string(), "fd00:10:244:1::2");
        pool.reserve("fd00:10:244:1::ff".parse().unwrap(), "b")
            .unwrap();
        assert!(
            pool.reserve("fd00:10:244:2::2".parse().unwrap(), "c")
                .is_err()
        );
    }
}
