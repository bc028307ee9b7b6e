//! Names: the hosts file that stands in for cluster DNS.

use std::fmt::Write;
use std::net::IpAddr;

/// A service's name and its addresses: the ClusterIPs, or of a headless one all pods'.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
}

/// The hosts file of a pod in `namespace` (of a node: none). `own` are its own name and addresses.
pub(crate) fn text(namespace: Option<&str>, own: (&str, &[IpAddr]), services: &[Named]) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned();
    for ip in own.1 {
        let _ = writeln!(text, "{ip} {}", own.0);
    }
    for service in services {
        let Named {
            namespace: ns,
            name,
            addresses,
        } = service;
        let short = if namespace == Some(ns) {
            format!(" {name}")
        } else {
            String::new()
        };
        for ip in addresses {
            let _ = writeln!(
                text,
                "{ip} {name}.{ns}.svc.cluster.local {name}.{ns}.svc {name}.{ns}{short}"
            );
        }
    }
    text
}

/// A resolver that is not there: what the hosts file does not know fails at once, not after a
/// timeout.
pub(crate) const RESOLV_CONF: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn services() -> Vec<Named> {
        vec![Named {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            addresses: vec!["10.96.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        }]
    }

    #[test]
    fn the_short_name_is_for_the_own_namespace() {
        let inside = text(Some("shop"), ("client", &[]), &services());
        let outside = text(Some("other"), ("client", &[]), &services());
        assert!(
            inside.contains("10.96.0.2 web.shop.svc.cluster.local web.shop.svc web.shop web\n")
        );
        assert!(outside.contains("10.96.0.2 web.shop.svc.cluster.local web.shop.svc web.shop\n"));
    }

    #[test]
    fn both_families_and_the_own_name_are_there() {
        let text = text(
            None,
            ("client", &["10.244.1.2".parse().unwrap()]),
            &services(),
        );
        assert!(text.contains("fd00::2 web.shop.svc.cluster.local"));
        assert!(text.contains("10.244.1.2 client\n"));
        assert!(text.starts_with("127.0.0.1 localhost\n"));
    }
}
