//! Addresses, interfaces and routes of the lab, as `ip -batch` commands.
//!
//! A pod's eth0 has host prefixes (/32, /128) and a link-local gateway address that every node-side
//! veth has, as with point-to-point CNI plugins: there is no common subnet, and the node routes.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::ipam::AddressPool;

/// The fabric's address on the bridge: the gateway of every node's default route.
pub(crate) const FABRIC_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const FABRIC_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 1);
/// The broadcast address of the nodes' subnet.
pub(crate) const FABRIC_BROADCAST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 255);

/// The IPv4 gateway of every pod.
pub(crate) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The IPv6 gateway of every pod.
pub(crate) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Limit of node indexes. They start at 1; the last octet of a node's address is its index plus 10.
pub(crate) const MAX_NODES: u8 = 200;

/// The addresses of a node, IPv4 first.
pub(crate) fn node_addresses(index: u8) -> [IpAddr; 2] {
    let last = 10 + index;
    // Both families have the same decimal digits: node 1 is 10.0.0.11 and fd00:10::11.
    let digits =
        u16::from(last / 100) * 0x100 + u16::from(last / 10 % 10) * 0x10 + u16::from(last % 10);
    [
        Ipv4Addr::new(10, 0, 0, last).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, digits).into(),
    ]
}

/// The pod CIDRs of a node.
pub(crate) fn pod_cidrs(index: u8) -> [String; 2] {
    [
        format!("10.244.{index}.0/24"),
        format!("fd00:10:244:{index:x}::/64"),
    ]
}

/// The pools of a node's pod addresses.
pub(crate) fn pod_pools(index: u8) -> [AddressPool; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x244, index.into(), 0, 0, 0, 2);
    [
        AddressPool::new(Ipv4Addr::new(10, 244, index, 2).into(), 252),
        AddressPool::new(v6.into(), 252),
    ]
}

/// The pools of ClusterIPs.
pub(crate) fn service_pools() -> [AddressPool; 2] {
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 2);
    [
        AddressPool::new(Ipv4Addr::new(10, 96, 0, 2).into(), 0xfff0),
        AddressPool::new(v6.into(), 0xfff0),
    ]
}

/// Sysctls of a node. Duplicate address detection would delay addresses by a second, and a router
/// ignores router advertisements. The reverse path filter is set per pod interface, so not in `all`.
pub(crate) const NODE_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// Sysctls of a pod, as container runtimes set them.
pub(crate) const POD_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// Conntrack sysctls of a pod, in seconds. The default of 60 s would make a test of half-closed
/// connections wait for longer than that. A daemon raises the timeout when it enrols the pod.
pub(crate) const POD_CONNTRACK_SYSCTLS: &[(&str, &str)] =
    &[("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "20")];

/// The prefix of a single address.
pub(crate) fn host_prefix(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

/// In the fabric: the bridge. Multicast snooping is off, so that neighbour discovery works at once.
pub(crate) fn fabric() -> String {
    format!(
        "link set lo up\n\
         link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         addr add {FABRIC_V4}/24 brd + dev br0\n\
         addr add {FABRIC_V6}/64 dev br0 nodad\n\
         link set br0 up\n"
    )
}

/// In one namespace: a veth pair of `name` and the peer, a name and a namespace.
pub(crate) fn veth_pair(name: &str, (peer, peer_netns): (&str, &str)) -> String {
    format!("link add name {name} type veth peer name {peer} netns {peer_netns}\n")
}

/// In the fabric: the port of a node, and the routes to its pods.
pub(crate) fn fabric_port(index: u8) -> String {
    let port = port(index);
    format!("link set {port} master br0\nlink set {port} up\n") + &route_to(index)
}

/// The fabric's end of the link to a node.
pub(crate) fn port(index: u8) -> String {
    format!("port{index}")
}

/// In a node: its own addresses and the default routes.
pub(crate) fn node(index: u8) -> String {
    let [v4, v6] = node_addresses(index);
    format!(
        "link set lo up\n\
         addr add {GATEWAY_V4}/32 dev lo scope link\n\
         addr add {v4}/24 brd + dev eth0\n\
         addr add {v6}/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route replace 0.0.0.0/0 via {FABRIC_V4} dev eth0\n\
         route replace ::/0 via {FABRIC_V6} dev eth0\n"
    )
}

/// In another node or the fabric: the routes to a node's pods.
pub(crate) fn route_to(index: u8) -> String {
    let ([v4, v6], [pods4, pods6]) = (node_addresses(index), pod_cidrs(index));
    format!("route replace {pods4} via {v4}\nroute replace {pods6} via {v6}\n")
}

/// The node's end of the link to a pod; an interface name has at most 15 characters.
pub(crate) fn veth(pod_uid: &str) -> String {
    let digits: String = pod_uid
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(10)
        .collect();
    format!("veth{digits}")
}

/// In a pod: its addresses and routes.
pub(crate) fn pod(ips: &[IpAddr]) -> String {
    let mut batch = "link set lo up\nlink set eth0 up\n".to_owned();
    for ip in ips {
        let prefix = host_prefix(*ip);
        let _ = match ip {
            IpAddr::V4(_) => write!(
                batch,
                "addr add {prefix} dev eth0\n\
                 route add {GATEWAY_V4}/32 dev eth0 scope link\n\
                 route add 0.0.0.0/0 via {GATEWAY_V4} dev eth0\n"
            ),
            IpAddr::V6(_) => write!(
                batch,
                "addr add {prefix} dev eth0 nodad\nroute add ::/0 via {GATEWAY_V6} dev eth0\n"
            ),
        };
    }
    batch
}

/// In the pod's node: the other end of the link. The node connects to its pods from its own address.
pub(crate) fn node_side(veth: &str, ips: &[IpAddr], node: &[IpAddr]) -> String {
    let mut batch = format!("addr add {GATEWAY_V6}/64 dev {veth} nodad\nlink set {veth} up\n");
    for ip in ips {
        let node_ip = node.iter().find(|node| node.is_ipv4() == ip.is_ipv4());
        let source = node_ip.map(|ip| format!(" src {ip}")).unwrap_or_default();
        let _ = writeln!(
            batch,
            "route replace {} dev {veth}{source}",
            host_prefix(*ip)
        );
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_addresses_have_the_same_digits_in_both_families() {
        let [v4, v6] = node_addresses(1);
        assert_eq!(
            (v4.to_string(), v6.to_string()),
            ("10.0.0.11".into(), "fd00:10::11".into())
        );
        let [v4, v6] = node_addresses(93);
        assert_eq!(
            (v4.to_string(), v6.to_string()),
            ("10.0.0.103".into(), "fd00:10::103".into())
        );
    }

    #[test]
    fn pods_have_host_prefixes_and_a_link_local_gateway() {
        let ips = [
            "10.244.1.2".parse().unwrap(),
            "fd00:10:244:1::2".parse().unwrap(),
        ];
        let text = pod(&ips);
        assert!(text.contains("addr add 10.244.1.2/32 dev eth0\n"));
        assert!(text.contains("route add ::/0 via fe80::1 dev eth0\n"));
        assert!(!pod(&ips[1..]).contains("169.254"));
    }

    #[test]
    fn node_routes_to_its_pods_from_its_own_address() {
        let text = node_side(
            "vethx",
            &["10.244.1.2".parse().unwrap()],
            &node_addresses(1),
        );
        assert!(text.contains("route replace 10.244.1.2/32 dev vethx src 10.0.0.11\n"));
    }

    #[test]
    fn interface_name_has_at_most_15_characters() {
        assert_eq!(
            veth("01234567-89ab-cdef-0123-456789abcdef"),
            "veth0123456789"
        );
    }
}
