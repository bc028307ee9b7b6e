//! kube-proxy: the nft rules that translate ClusterIPs to endpoints.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::service;
use crate::options::IpFamily;

/// The rules' table, in every node's namespace.
pub(crate) const TABLE: &str = "inet lab-kube-proxy";

/// One port of one ClusterIP and its backends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frontend {
    pub(crate) address: SocketAddr,
    pub(crate) protocol: &'static str,
    pub(crate) backends: Vec<SocketAddr>,
    /// `sessionAffinity: ClientIP`: a client always gets the same backend.
    pub(crate) is_sticky: bool,
}

/// The frontends of a service. The backends are the ready endpoints, or if there are none, those that
/// are terminating and still serving.
pub(crate) fn frontends(service: &Service, slices: &[&EndpointSlice]) -> Vec<Frontend> {
    let spec = service.spec.clone().unwrap_or_default();
    let is_sticky = spec.session_affinity.as_deref() == Some("ClientIP");
    let mut frontends = Vec::new();
    for ip in service::cluster_ips(service) {
        for port in spec.ports.iter().flatten() {
            let protocol = match port.protocol.as_deref() {
                None | Some("TCP") => "tcp",
                Some("UDP") => "udp",
                Some(_) => continue,
            };
            let Ok(number) = u16::try_from(port.port) else {
                continue;
            };
            let name = port.name.as_deref().unwrap_or_default();
            let backends = backends(slices, IpFamily::of(ip), name, protocol);
            let address = SocketAddr::new(ip, number);
            frontends.push(Frontend {
                address,
                protocol,
                backends,
                is_sticky,
            });
        }
    }
    frontends
}

fn backends(
    slices: &[&EndpointSlice],
    family: IpFamily,
    name: &str,
    protocol: &str,
) -> Vec<SocketAddr> {
    let (mut ready, mut terminating) = (Vec::new(), Vec::new());
    for slice in slices {
        let ports = slice.ports.iter().flatten().filter(|port| {
            port.name.as_deref().unwrap_or_default() == name
                && port
                    .protocol
                    .as_deref()
                    .unwrap_or("TCP")
                    .eq_ignore_ascii_case(protocol)
        });
        let ports: Vec<u16> = ports.filter_map(|p| u16::try_from(p.port?).ok()).collect();
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let ips = endpoint
                .addresses
                .iter()
                .filter_map(|ip| ip.parse::<IpAddr>().ok());
            let found = ips
                .filter(|ip| family.contains(*ip))
                .flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)));
            if conditions.ready.unwrap_or(true) {
                ready.extend(found);
            } else if conditions.serving == Some(true) && conditions.terminating == Some(true) {
                terminating.extend(found);
            }
        }
    }
    if ready.is_empty() { terminating } else { ready }
}

/// The whole table as one transaction. The base chains are kept while their rules change: removing
/// the last NAT chain would unregister NAT and break established connections.
pub(crate) fn ruleset(frontends: &[Frontend]) -> String {
    let mut text = format!(
        "table {TABLE} {{\n\
           chain prerouting {{ type nat hook prerouting priority dstnat; }}\n\
           chain output {{ type nat hook output priority -100; }}\n\
           chain forward-filter {{ type filter hook forward priority filter; }}\n\
           chain output-filter {{ type filter hook output priority filter; }}\n\
           chain services {{ }}\n\
           chain without-endpoints {{ }}\n\
         }}\n\
         flush table {TABLE}\n\
         add rule {TABLE} prerouting jump services\n\
         add rule {TABLE} output jump services\n\
         add rule {TABLE} forward-filter jump without-endpoints\n\
         add rule {TABLE} output-filter jump without-endpoints\n"
    );
    for frontend in unique(frontends).values() {
        let (chain, verdict) = match frontend.backends.as_slice() {
            [] => ("without-endpoints", "reject".to_owned()),
            backends => ("services", dnat(frontend, backends)),
        };
        let (family, address) = (family(frontend.address.ip()), frontend.address);
        let (ip, protocol, port) = (address.ip(), frontend.protocol, address.port());
        let _ = writeln!(
            text,
            "add rule {TABLE} {chain} {family} daddr {ip} {protocol} dport {port} {verdict}"
        );
    }
    text
}

/// Frontends by address: of two services with one address, the second rule would never match.
fn unique(frontends: &[Frontend]) -> BTreeMap<(SocketAddr, &'static str), &Frontend> {
    frontends
        .iter()
        .map(|frontend| ((frontend.address, frontend.protocol), frontend))
        .collect()
}

fn dnat(frontend: &Frontend, backends: &[SocketAddr]) -> String {
    let family = family(frontend.address.ip());
    if let [only] = backends {
        return format!("dnat {family} to {only}");
    }
    let choice = if frontend.is_sticky {
        format!("jhash {family} saddr")
    } else {
        "numgen random".to_owned()
    };
    let numbered: Vec<String> = (0..)
        .zip(backends)
        .map(|(index, backend): (usize, _)| {
            format!("{index} : {} . {}", backend.ip(), backend.port())
        })
        .collect();
    format!(
        "dnat {family} to {choice} mod {} map {{ {} }}",
        backends.len(),
        numbered.join(", ")
    )
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "ip" } else { "ip6" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(spec: &str) -> Service {
        let text = format!("{{metadata: {{name: web}}, spec: {spec}}}");
        serde_yaml_ng::from_str(&text).unwrap()
    }

    fn slice(endpoints: &str) -> EndpointSlice {
        let text = format!(
            "{{addressType: IPv4, metadata: {{name: web-1}}, ports: [{{port: 8080, name: ''}}], endpoints: {endpoints}}}"
        );
        serde_yaml_ng::from_str(&text).unwrap()
    }

    const SPEC: &str = "{clusterIP: 10.96.0.2, clusterIPs: [10.96.0.2], ports: [{port: 80}]}";

    #[test]
    fn several_endpoints_are_chosen_at_random() {
        let slice = slice("[{addresses: [10.244.1.2]}, {addresses: [10.244.2.2]}]");
        let text = ruleset(&frontends(&service(SPEC), &[&slice]));
        assert!(text.contains(
            "services ip daddr 10.96.0.2 tcp dport 80 dnat ip to numgen random mod 2 \
             map { 0 : 10.244.1.2 . 8080, 1 : 10.244.2.2 . 8080 }"
        ));
    }

    #[test]
    fn client_affinity_hashes_the_clients_address() {
        let spec = SPEC.replace('{', "{sessionAffinity: ClientIP, ").replacen(
            "[{sessionAffinity: ClientIP, ",
            "[{",
            1,
        );
        let slice = slice("[{addresses: [10.244.1.2]}, {addresses: [10.244.2.2]}]");
        assert!(ruleset(&frontends(&service(&spec), &[&slice])).contains("jhash ip saddr mod 2"));
    }

    #[test]
    fn without_endpoints_a_connection_is_refused() {
        let text = ruleset(&frontends(&service(SPEC), &[]));
        assert!(text.contains("without-endpoints ip daddr 10.96.0.2 tcp dport 80 reject"));
    }

    #[test]
    fn terminating_endpoints_serve_only_without_ready_ones() {
        let terminating = "{addresses: [10.244.1.9], conditions: {ready: false, serving: true, terminating: true}}";
        let starting = "{addresses: [10.244.1.8], conditions: {ready: false, serving: false}}";
        let without_ready = slice(&format!("[{terminating}, {starting}]"));
        let with_ready = slice(&format!("[{terminating}, {{addresses: [10.244.1.2]}}]"));
        let backends = |slice| frontends(&service(SPEC), &[slice])[0].backends.clone();
        assert_eq!(
            backends(&without_ready),
            ["10.244.1.9:8080".parse().unwrap()]
        );
        assert_eq!(backends(&with_ready), ["10.244.1.2:8080".parse().unwrap()]);
    }

    #[test]
    fn ipv6_address_with_port_has_brackets() {
        let frontend = Frontend {
            address: "[fd00::1]:80".parse().unwrap(),
            protocol: "tcp",
            backends: vec!["[fd00::2]:8080".parse().unwrap()],
            is_sticky: false,
        };
        let text = ruleset(&[frontend]);
        assert!(text.contains("ip6 daddr fd00::1 tcp dport 80 dnat ip6 to [fd00::2]:8080"));
    }
}
