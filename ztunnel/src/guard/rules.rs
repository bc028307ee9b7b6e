//! The nftables rules of the guard, as text for `nft`: pure functions of two sets of addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;

use super::TABLE;
use crate::ports_and_marks::HBONE_PORT;

/// The addresses that the guard matches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    /// Addresses of this node's meshed pods.
    pub local: BTreeSet<IpAddr>,
    /// Addresses of all meshed pods, of every node.
    pub meshed: BTreeSet<IpAddr>,
}

/// Name of the counter of dropped packets.
pub(super) const COUNTER: &str = "plaintext";

/// Addresses per line of the script. `nft` accepts longer lines; this keeps them readable.
const ADDRESSES_PER_LINE: usize = 64;

impl Sets {
    /// The script that creates the table, or replaces it in one transaction.
    pub(super) fn script(&self) -> String {
        let mut script = format!(
            "add table inet {TABLE}\ndelete table inet {TABLE}\n{}",
            table()
        );
        self.elements("add", &mut script);
        script
    }

    /// The script that changes the elements from `before` to these, or an empty one if nothing
    /// differs. A change of one pod is one line per set, whatever the size of the mesh.
    pub(super) fn changes(&self, before: &Sets) -> String {
        let difference =
            |a: &BTreeSet<IpAddr>, b: &BTreeSet<IpAddr>| a.difference(b).copied().collect();
        let added = Sets {
            local: difference(&self.local, &before.local),
            meshed: difference(&self.meshed, &before.meshed),
        };
        let removed = Sets {
            local: difference(&before.local, &self.local),
            meshed: difference(&before.meshed, &self.meshed),
        };
        let mut script = String::new();
        removed.elements("delete", &mut script);
        added.elements("add", &mut script);
        script
    }

    /// The elements by the name of their set in the table. Empty sets are left out.
    pub(super) fn by_name(&self) -> BTreeMap<String, BTreeSet<IpAddr>> {
        let mut sets: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        for (name, addresses) in [("local", &self.local), ("meshed", &self.meshed)] {
            for address in addresses {
                let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
                sets.entry(format!("{name}_{family}"))
                    .or_default()
                    .insert(*address);
            }
        }
        sets
    }

    fn elements(&self, verb: &str, script: &mut String) {
        for (name, addresses) in self.by_name() {
            let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            for line in addresses.chunks(ADDRESSES_PER_LINE) {
                let list = line.join(", ");
                // Writing to a string cannot fail.
                let _ = writeln!(script, "{verb} element inet {TABLE} {name} {{ {list} }}");
            }
        }
    }
}

/// The table without elements. Connections that are older than the pod's enrolment are established
/// for conntrack and are accepted. Any other TCP between two meshed pods is either HBONE or
/// plaintext that capture has missed.
fn table() -> String {
    format!(
        "table inet {TABLE} {{
  set local_ipv4 {{ type ipv4_addr; }}
  set local_ipv6 {{ type ipv6_addr; }}
  set meshed_ipv4 {{ type ipv4_addr; }}
  set meshed_ipv6 {{ type ipv6_addr; }}
  counter {COUNTER} {{ }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    ct state established,related accept
    meta l4proto != tcp accept
    tcp dport {HBONE_PORT} accept
    tcp sport {HBONE_PORT} accept
    ip saddr @local_ipv4 ip daddr @meshed_ipv4 counter name {COUNTER} drop
    ip6 saddr @local_ipv6 ip6 daddr @meshed_ipv6 counter name {COUNTER} drop
  }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(local: &[&str], meshed: &[&str]) -> Sets {
        let parse = |addresses: &[&str]| {
            addresses
                .iter()
                .map(|address| address.parse().expect("an address"))
                .collect()
        };
        Sets {
            local: parse(local),
            meshed: parse(meshed),
        }
    }

    #[test]
    fn script_replaces_table_and_elements_in_one_transaction() {
        let script = sets(&["10.0.0.1"], &["10.0.0.1", "fd00::2"]).script();
        assert!(script.starts_with(
            "add table inet ambit-guard\ndelete table inet ambit-guard\ntable inet ambit-guard {\n"
        ));
        assert!(script.contains("add element inet ambit-guard local_ipv4 { 10.0.0.1 }\n"));
        assert!(script.contains("add element inet ambit-guard meshed_ipv4 { 10.0.0.1 }\n"));
        assert!(script.contains("add element inet ambit-guard meshed_ipv6 { fd00::2 }\n"));
        assert!(
            !script.contains("local_ipv6 {  }"),
            "an empty set has no elements to add"
        );
    }

    #[test]
    fn change_of_one_pod_is_one_line_per_set_and_family() {
        let before = sets(&["10.0.0.1"], &["10.0.0.1", "10.0.0.9"]);
        let after = sets(&["10.0.0.1", "10.0.0.2"], &["10.0.0.1", "10.0.0.2"]);
        assert_eq!(
            after.changes(&before),
            "delete element inet ambit-guard meshed_ipv4 { 10.0.0.9 }\n\
             add element inet ambit-guard local_ipv4 { 10.0.0.2 }\n\
             add element inet ambit-guard meshed_ipv4 { 10.0.0.2 }\n"
        );
        assert_eq!(after.changes(&after), "");
    }
}
