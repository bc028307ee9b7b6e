//! The addresses that a namespace really has: the proof that it is the pod's.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use crate::netns::Netns;

/// All addresses of the namespace's devices, except loopback and link-local ones, which every
/// namespace has.
///
/// # Errors
/// Fails if the namespace cannot be entered.
pub fn addresses(netns: &Netns) -> io::Result<BTreeSet<IpAddr>> {
    netns.enter(|| {
        let interfaces = nix::ifaddrs::getifaddrs()?;
        Ok(interfaces
            .filter_map(|interface| ip(&interface))
            .filter(|ip| !ip.is_loopback())
            .collect())
    })
}

fn ip(interface: &nix::ifaddrs::InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(v4.ip().into());
    }
    let v6 = address.as_sockaddr_in6()?.ip();
    (!v6.is_unicast_link_local()).then_some(v6.into())
}
