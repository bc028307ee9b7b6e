//! kube-proxy's part: the nft rules that turn a ClusterIP into an endpoint.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::service;
use crate::options::IpFamily;

/// The lab's own table, in every node's namespace.
pub(crate) const TABLE: &str = "inet lab-kube-proxy";

/// One port of one ClusterIP, and where it leads.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frontend {
    pub(crate) address: SocketAddr,
    pub(crate) protocol: &'static str,
    pub(crate) backends: Vec<SocketAddr>,
    /// `sessionAffinity: ClientIP`: the same client meets the same backend.
    pub(crate) sticky: bool,
}

/// The frontends of a service. Ready endpoints serve; where there is none, those that terminate but
/// still serve.
pub(crate) fn frontends(service: &Service, slices: &[&EndpointSlice]) -> Vec<Frontend> {
    let spec = service.spec.clone().unwrap_or_default();
    let sticky = spec.session_affinity.as_deref() == Some("ClientIP");
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
                sticky,
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
    let (mut ready, mut leaving) = (Vec::new(), Vec::new());
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
                .filter(|ip| family.has(*ip))
                .flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)));
            if conditions.ready.unwrap_or(true) {
                ready.extend(found);
            } else if conditions.serving == Some(true) && conditions.terminating == Some(true) {
                leaving.extend(found);
            }
        }
    }
    if ready.is_empty() { leaving } else { ready }
}

/// The whole table as one transaction. The base chains stay while their rules change: taking the
/// last NAT chain away would unhook NAT from connections that are established.
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

/// By address: two services that claim one address would make two rules, of which one never acts.
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
    let choice = if frontend.sticky {
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
    fn several_endpoints_share_by_chance() {
        let slice = slice("[{addresses: [10.244.1.2]}, {addresses: [10.244.2.2]}]");
        let text = ruleset(&frontends(&service(SPEC), &[&slice]));
        assert!(text.contains(
            "services ip daddr 10.96.0.2 tcp dport 80 dnat ip to numgen random mod 2 \
             map { 0 : 10.244.1.2 . 8080, 1 : 10.244.2.2 . 8080 }"
        ));
    }

    #[test]
    fn client_affinity_chooses_by_the_clients_address() {
        let spec = SPEC.replace('{', "{sessionAffinity: ClientIP, ").replacen(
            "[{sessionAffinity: ClientIP, ",
            "[{",
            1,
        );
        let slice = slice("[{addresses: [10.244.1.2]}, {addresses: [10.244.2.2]}]");
        assert!(ruleset(&frontends(&service(&spec), &[&slice])).contains("jhash ip saddr mod 2"));
    }

    #[test]
    fn without_endpoints_a_connection_is_refused_at_once() {
        let text = ruleset(&frontends(&service(SPEC), &[]));
        assert!(text.contains("without-endpoints ip daddr 10.96.0.2 tcp dport 80 reject"));
    }

    #[test]
    fn the_terminating_serve_only_when_nobody_is_ready() {
        let leaving = "{addresses: [10.244.1.9], conditions: {ready: false, serving: true, terminating: true}}";
        let starting = "{addresses: [10.244.1.8], conditions: {ready: false, serving: false}}";
        let alone = slice(&format!("[{leaving}, {starting}]"));
        let with_ready = slice(&format!("[{leaving}, {{addresses: [10.244.1.2]}}]"));
        let backends = |slice| frontends(&service(SPEC), &[slice])[0].backends.clone();
        assert_eq!(backends(&alone), ["10.244.1.9:8080".parse().unwrap()]);
        assert_eq!(backends(&with_ready), ["10.244.1.2:8080".parse().unwrap()]);
    }

    #[test]
    fn v6_addresses_are_written_with_brackets_where_a_port_follows() {
        let frontend = Frontend {
            address: "[fd00::1]:80".parse().unwrap(),
            protocol: "tcp",
            backends: vec!["[fd00::2]:8080".parse().unwrap()],
            sticky: false,
        };
        let text = ruleset(&[frontend]);
        assert!(text.contains("ip6 daddr fd00::1 tcp dport 80 dnat ip6 to [fd00::2]:8080"));
    }
}
