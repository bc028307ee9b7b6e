//! The hosts file that replaces cluster DNS.

use std::fmt::Write;
use std::net::IpAddr;

/// A service's addresses: its ClusterIPs, or the addresses of the ready pods of a headless service.
#[derive(Debug)]
pub(crate) struct ServiceAddresses {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
}

/// The hosts file of a pod in `namespace`, or of a node (`None`). `own` is its own name and addresses.
pub(crate) fn text(
    namespace: Option<&str>,
    own: (&str, &[IpAddr]),
    services: &[ServiceAddresses],
) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n".to_owned();
    for ip in own.1 {
        let _ = writeln!(text, "{ip} {}", own.0);
    }
    for service in services {
        let ServiceAddresses {
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

/// A resolver address without a resolver: a name that is not in the hosts file fails at once instead
/// of after a timeout.
pub(crate) const RESOLV_CONF: &str = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n";

#[cfg(test)]
mod tests {
    use super::*;

    fn services() -> Vec<ServiceAddresses> {
        vec![ServiceAddresses {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            addresses: vec!["10.96.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        }]
    }

    #[test]
    fn short_name_is_only_in_the_services_namespace() {
        let inside = text(Some("shop"), ("client", &[]), &services());
        let outside = text(Some("other"), ("client", &[]), &services());
        assert!(
            inside.contains("10.96.0.2 web.shop.svc.cluster.local web.shop.svc web.shop web\n")
        );
        assert!(outside.contains("10.96.0.2 web.shop.svc.cluster.local web.shop.svc web.shop\n"));
    }

    #[test]
    fn file_has_both_families_and_the_own_name() {
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
