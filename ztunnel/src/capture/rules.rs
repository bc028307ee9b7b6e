//! The nftables rules of a pod, as text for `nft`: a pure function of what to redirect.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::net::IpAddr;

use super::TABLE;
use crate::ports_and_marks::{
    CONNTRACK_ZONE, DAEMON_MARK, HBONE_PORT, INBOUND_PLAIN_PORT, MARK_MASK, OUTBOUND_PORT,
    RETURN_MARK,
};

/// Exceptions from the redirection of a pod's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirection {
    /// The node's own addresses, from which the kubelet sends probes.
    pub node_addresses: BTreeSet<IpAddr>,
    /// The ports that the pod declares for probes. Connections to them from the node's addresses
    /// are not redirected.
    pub probe_ports: BTreeSet<u16>,
}

/// The rules in a pod's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rules {
    /// For a pod in the mesh: redirects every new connection from it and to it to the daemon.
    Redirect(Redirection),
    /// For a pod that has left the mesh and still has connections. Redirects nothing new.
    /// Established connections need the NAT chains to exist, even empty, for their address
    /// translation, and the marks that route replies to the daemon.
    ReturnPath,
}

impl Rules {
    /// The script that replaces the table by these rules in one transaction.
    pub(super) fn script(&self) -> String {
        format!("{}table inet {TABLE} {{\n{self}}}\n", removal())
    }
}

/// The script that removes the table, whether it exists or not.
pub(super) fn removal() -> String {
    format!("add table inet {TABLE}\ndelete table inet {TABLE}\n")
}

impl Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rules::Redirect(redirection) => {
                return_path(f)?;
                redirection.sets(f)?;
                redirection.chains(f)
            }
            Rules::ReturnPath => {
                return_path(f)?;
                chain(
                    f,
                    "redirect_inbound",
                    "nat hook prerouting priority dstnat",
                    &[],
                )?;
                chain(f, "redirect_outbound", "nat hook output priority -100", &[])
            }
        }
    }
}

impl Redirection {
    fn sets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (v4, v6): (Vec<_>, Vec<_>) = self
            .node_addresses
            .iter()
            .map(IpAddr::to_canonical)
            .partition(IpAddr::is_ipv4);
        set(f, "node_ipv4", "ipv4_addr", &v4)?;
        set(f, "node_ipv6", "ipv6_addr", &v6)?;
        set(
            f,
            "probe_ports",
            "inet_service",
            &self.probe_ports.iter().collect::<Vec<_>>(),
        )
    }

    /// Only a SYN is redirected. Conntrack may see an older connection for the first time, which
    /// must not be redirected midway.
    fn chains(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let syn = "tcp flags & (fin | syn | rst | ack) == syn";
        let own = format!("meta mark & {MARK_MASK:#x} == {DAEMON_MARK:#x} accept");
        chain(
            f,
            "redirect_inbound",
            "nat hook prerouting priority dstnat",
            &[
                &own,
                "ip saddr @node_ipv4 tcp dport @probe_ports accept",
                "ip6 saddr @node_ipv6 tcp dport @probe_ports accept",
                &format!("tcp dport != {HBONE_PORT} {syn} redirect to :{INBOUND_PLAIN_PORT}"),
            ],
        )?;
        chain(
            f,
            "redirect_outbound",
            "nat hook output priority -100",
            &[
                &own,
                "oifname \"lo\" accept",
                // A link-local address is incomplete without its interface, which SO_ORIGINAL_DST
                // does not return.
                "ip6 daddr fe80::/10 accept",
                &format!("{syn} redirect to :{OUTBOUND_PORT}"),
            ],
        )
    }
}

/// Rules that deliver replies to the daemon. The daemon connects to the application from the
/// client's address, so the reply's destination is outside the pod. The connection is marked when
/// it arrives at the application, and policy routing delivers packets with that mark locally.
///
/// Such a connection may have the same addresses and ports as the client's own connection, which
/// was redirected to the daemon. Therefore its original direction is tracked in a separate
/// conntrack zone. Without the zone the kernel takes the daemon's SYN for part of the client's
/// connection and resets both.
fn return_path(f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let own = format!("meta mark & {MARK_MASK:#x} == {DAEMON_MARK:#x}");
    let ports = format!("{{ {OUTBOUND_PORT}, {INBOUND_PLAIN_PORT}, {HBONE_PORT} }}");
    let keep = !MARK_MASK;
    chain(
        f,
        "separate",
        "filter hook output priority raw",
        &[&format!(
            "oifname \"lo\" {own} tcp sport != {ports} ct original zone set {CONNTRACK_ZONE}"
        )],
    )?;
    chain(
        f,
        "mark_connection",
        "filter hook prerouting priority mangle",
        &[&format!(
            "iifname \"lo\" {own} ct mark set ct mark & {keep:#x} | {RETURN_MARK:#x}"
        )],
    )?;
    chain(
        f,
        "mark_answer",
        "route hook output priority mangle",
        &[&format!(
            "ct mark & {MARK_MASK:#x} == {RETURN_MARK:#x} meta mark set ct mark"
        )],
    )
}

fn chain(f: &mut fmt::Formatter<'_>, name: &str, hook: &str, rules: &[&str]) -> fmt::Result {
    writeln!(f, "  chain {name} {{\n    type {hook}; policy accept;")?;
    rules
        .iter()
        .try_for_each(|rule| writeln!(f, "    {rule}"))?;
    writeln!(f, "  }}")
}

/// Writes a set. `nft` accepts no empty list of elements, so an empty set has none.
fn set(
    f: &mut fmt::Formatter<'_>,
    name: &str,
    kind: &str,
    elements: &[impl Display],
) -> fmt::Result {
    writeln!(f, "  set {name} {{\n    type {kind}")?;
    if !elements.is_empty() {
        let elements = elements
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        writeln!(f, "    elements = {{ {elements} }}")?;
    }
    writeln!(f, "  }}")
}

#[cfg(test)]
mod tests;
