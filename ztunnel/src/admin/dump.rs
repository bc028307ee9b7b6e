//! The configuration dump, in the shape that `istioctl ztunnel-config` reads.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as BASE64;
use mesh::certs::{Certificate, IdentityState, IdentityStatus, TrustBundle};
use mesh::{Affinity, Distribution, EndpointTarget, Mode, Service, Workload};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Admin, WorkloadState};
use crate::dataplane::{ConnectionInfo, Direction};

impl Admin {
    /// The complete dump. It contains no private key: the types that it reads do not expose them.
    pub(super) fn dump(&self) -> Value {
        let model = self.store.model();
        let mut workloads: Vec<_> = model.workloads().collect();
        workloads.sort_unstable_by(|a, b| a.uid.cmp(&b.uid));
        let mut services: Vec<_> = model.services().collect();
        services.sort_unstable_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let states: BTreeMap<String, Value> = (self.workloads)()
            .into_iter()
            .map(|state| {
                (
                    state.uid.to_string(),
                    workload_state_json(&state, &self.data_plane.connections(&state.uid)),
                )
            })
            .collect();
        let workloads: Vec<_> = workloads
            .into_iter()
            .map(|workload| workload_json(workload))
            .collect();
        let services: Vec<_> = services
            .into_iter()
            .map(|service| service_json(service))
            .collect();
        json!({
            "workloads": workloads,
            "services": services,
            // With the fields that istioctl reads, and the state of each policy.
            "policies": model.policies(),
            "stagedServices": {},
            "certificates": self.certificates(),
            "workloadState": states,
            "problems": model.diagnostics(),
            "config": self.config,
            "version": { "version": env!("CARGO_PKG_VERSION"), "component": "ztunnel" },
        })
    }

    fn certificates(&self) -> Vec<Value> {
        let state = self.identities.state();
        let roots = roots_json(&state.bundle);
        let identities = state.identities.iter();
        identities
            .map(|status| identity_json(status, &roots))
            .collect()
    }
}

fn workload_json(workload: &Workload) -> Value {
    json!({
        "uid": workload.uid,
        "workloadIps": workload.ips,
        "protocol": match workload.mode { Mode::Mesh => "HBONE", Mode::Plain => "TCP" },
        "name": workload.name,
        "namespace": workload.namespace,
        "serviceAccount": workload.service_account,
        "trustDomain": workload.identity.trust_domain().to_string(),
        "workloadName": workload.workload_name,
        "workloadType": workload.workload_type.as_str(),
        "canonicalName": workload.canonical_name,
        "canonicalRevision": workload.canonical_revision,
        "clusterId": workload.cluster,
        "node": workload.node,
        "network": "",
        "networkMode": if workload.host_network { "HostNetwork" } else { "Standard" },
        "locality": workload.locality,
        "status": if workload.health.ready { "Healthy" } else { "Unhealthy" },
        "hostname": "",
        "capacity": 1,
        "applicationTunnel": { "protocol": "NONE" },
        "services": workload.services,
        "authorizationPolicies": workload.policies,
    })
}

fn service_json(service: &Service) -> Value {
    let endpoints: BTreeMap<String, Value> = service
        .endpoints
        .iter()
        .map(|endpoint| {
            let uid = match &endpoint.target {
                EndpointTarget::Workload(workload) => workload.uid.to_string(),
                EndpointTarget::Address { ip, .. } => ip.to_string(),
            };
            let ports: BTreeMap<String, u16> = endpoint
                .ports
                .iter()
                .map(|port| (port.service.to_string(), port.target))
                .collect();
            let value = json!({
                "workloadUid": uid,
                "service": format!("{}/{}", service.namespace, service.hostname),
                "port": ports,
                "addresses": endpoint.addresses,
                "status": if endpoint.health.ready { "Healthy" } else { "Unhealthy" },
            });
            (uid, value)
        })
        .collect();
    // istioctl shows one target per port, which the endpoints define; 0 if the service has none.
    let ports: BTreeMap<String, u16> = service
        .ports
        .iter()
        .map(|port| {
            let target = service
                .endpoints
                .iter()
                .find_map(|endpoint| endpoint.target_port(port.port));
            (port.port.to_string(), target.unwrap_or(0))
        })
        .collect();
    json!({
        "name": service.name,
        "namespace": service.namespace,
        "hostname": service.hostname,
        // `<network>/<address>`; there is one network, and its name is empty.
        "vips": service.vips.iter().map(|vip| format!("/{vip}")).collect::<Vec<_>>(),
        "ports": ports,
        "endpoints": endpoints,
        "subjectAltNames": [],
        "ipFamilies": families(service),
        "loadBalancer": load_balancer(service),
        "sessionAffinity": match service.affinity {
            Affinity::None => "None",
            Affinity::ClientIp => "ClientIP",
        },
    })
}

fn families(service: &Service) -> &'static str {
    let has = |v6: bool| service.vips.iter().any(|vip| vip.is_ipv6() == v6);
    match (has(false), has(true)) {
        (true, true) => "Dual",
        (true, false) => "IPv4",
        (false, true) => "IPv6",
        (false, false) => "",
    }
}

fn load_balancer(service: &Service) -> Value {
    let (mode, preferences): (_, &[&str]) = match (service.node_local, service.distribution) {
        (true, _) => ("Strict", &["Node"]),
        (false, Distribution::PreferSameZone) => ("Failover", &["Network", "Region", "Zone"]),
        (false, Distribution::PreferSameNode) => (
            "Failover",
            &["Network", "Region", "Zone", "Subzone", "Node"],
        ),
        (false, Distribution::Any) => return Value::Null,
    };
    let health = if service.publish_not_ready {
        "AllowAll"
    } else {
        "OnlyHealthy"
    };
    json!({ "mode": mode, "routingPreferences": preferences, "healthPolicy": health })
}

fn workload_state_json(state: &WorkloadState, connections: &[ConnectionInfo]) -> Value {
    let of = |direction: Direction| {
        connections
            .iter()
            .filter(|connection| connection.direction == direction)
            .map(connection_json)
            .collect::<Vec<_>>()
    };
    let mut value = json!({
        "state": state.state,
        "since": rfc3339(state.since),
        "connections": { "inbound": of(Direction::Inbound), "outbound": of(Direction::Outbound) },
        "info": {
            "name": state.name,
            "namespace": state.namespace,
            "trustDomain": state.trust_domain,
            "serviceAccount": state.service_account,
        },
    });
    if let Some(reason) = &state.reason {
        value["reason"] = json!(reason);
    }
    value
}

fn connection_json(connection: &ConnectionInfo) -> Value {
    let text = |address: &SocketAddr| address.to_string();
    json!({
        "src": text(&connection.source),
        "originalDst": text(&connection.original_destination),
        "actualDst": connection.actual_destination.as_ref().map(text).unwrap_or_default(),
        "protocol": if connection.hbone { "HBONE" } else { "TCP" },
        "bytesSent": connection.sent,
        "bytesReceived": connection.received,
    })
}

/// One identity, in the shape that `istioctl ztunnel-config certificate` reads.
fn identity_json(status: &IdentityStatus, roots: &[Value]) -> Value {
    let error = status.last_error.as_ref();
    let cause = error.map(|error| format!(": {}: {}", error.code, error.message));
    let cause = cause.unwrap_or_default();
    let state = match status.state {
        IdentityState::Initializing => "Initializing".to_owned(),
        IdentityState::Available => "Available".to_owned(),
        IdentityState::Unavailable => format!("Unavailable{cause}"),
        IdentityState::Expired { at } => {
            format!("Unavailable: certificate_expired at {}{cause}", rfc3339(at))
        }
    };
    let certificate = status.certificate.as_ref();
    let mut value = json!({
        "identity": status.identity.to_string(),
        "state": state,
        "certChain": certificate.map(certificate_json).into_iter().collect::<Vec<_>>(),
        "rootCerts": roots,
    });
    // Present also while an earlier certificate is still valid.
    if let Some(error) = error {
        value["lastError"] = json!({ "code": error.code, "message": error.message });
    }
    value
}

fn certificate_json(certificate: &Arc<Certificate>) -> Value {
    json!({
        "pem": certificate.chain.first().map(|der| pem(der)).unwrap_or_default(),
        "serialNumber": decimal(&certificate.serial),
        "validFrom": rfc3339(certificate.not_before),
        "expirationTime": rfc3339(certificate.not_after),
    })
}

fn roots_json(bundle: &TrustBundle) -> Vec<Value> {
    bundle
        .roots()
        .iter()
        .map(|der| json!({ "pem": pem(der) }))
        .collect()
}

/// Base64 of the PEM text: bytes in JSON, as Istio's ztunnel writes them.
fn pem(der: &[u8]) -> String {
    BASE64.encode(pem::encode(&pem::Pem::new("CERTIFICATE", der)))
}

/// Converts a hexadecimal number of any length to decimal, the form in which istioctl reads serial
/// numbers. Empty if it is not a number.
fn decimal(hex: &str) -> String {
    let mut digits: Vec<u32> = vec![0];
    for c in hex.chars().filter(|c| *c != ':') {
        let Some(mut carry) = c.to_digit(16) else {
            return String::new();
        };
        for digit in &mut digits {
            let value = *digit * 16 + carry;
            *digit = value % 10;
            carry = value / 10;
        }
        while carry > 0 {
            digits.push(carry % 10);
            carry /= 10;
        }
    }
    digits
        .iter()
        .rev()
        .filter_map(|digit| char::from_digit(*digit, 10))
        .collect()
}

/// RFC 3339 in UTC; empty for a time out of its range.
fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time)
        .format(&Rfc3339)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
