//! The pod's rules, as text: a pure function of what they are for.

use std::collections::BTreeSet;
use std::fmt::{self, Display};
use std::net::IpAddr;

use super::TABLE;
use crate::contract::{
    CONNTRACK_ZONE, DAEMON_MARK, HBONE_PORT, INBOUND_PLAIN_PORT, MARK_MASK, OUTBOUND_PORT,
    RETURN_MARK,
};

/// What is redirected, and what is let through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirection {
    /// The node's own addresses, from which the kubelet probes.
    pub node_addresses: BTreeSet<IpAddr>,
    /// The ports that the pod declares for probes. From the node's addresses they are reached as
    /// they are without a mesh.
    pub probe_ports: BTreeSet<u16>,
}

/// What stands in a pod's namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rules {
    /// The pod is in the mesh: every new connection of it, and to it, goes to the daemon.
    Redirect(Redirection),
    /// The pod has left the mesh and its last connections have not ended. Nothing new is
    /// redirected. The translation of what was redirected needs a NAT chain to exist, though an
    /// empty one, and the answers need their way back to the daemon.
    ReturnPath,
}

impl Rules {
    /// The script that puts these rules in place of any before them, in one transaction.
    pub(super) fn script(&self) -> String {
        format!("{}table inet {TABLE} {{\n{self}}}\n", removal())
    }
}

/// The script that removes the table, whether it is there or not.
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

    /// Only a SYN is redirected: a connection that is older than these rules may be new to
    /// conntrack, and stays what it was.
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
                // An address of one link means nothing without its interface, of which nobody tells
                // the daemon.
                "ip6 daddr fe80::/10 accept",
                &format!("{syn} redirect to :{OUTBOUND_PORT}"),
            ],
        )
    }
}

/// The daemon connects to the application from the client's address, so the answer is addressed to
/// somebody who is elsewhere: the connection is marked on its way in, and policy routing delivers
/// what carries the mark locally.
///
/// Such a connection can have the very addresses and ports of the client's own, which was
/// redirected to the daemon: its original direction is therefore tracked in a zone of its own.
/// Without it the kernel takes the daemon's SYN for part of the client's connection, and both are
/// reset.
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

/// A set in nft's words; an empty one has no list of elements.
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
