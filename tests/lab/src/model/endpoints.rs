//! The endpoints controller: makes EndpointSlices from services and pods.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::pod::{Phase, PodEntry};
use crate::options::IpFamily;

/// The label with the name of a slice's service.
pub(crate) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The slices of a service with a selector: one per family and set of resolved ports (a named port
/// can have another number in another pod). `zone` returns the zone of a node.
pub(crate) fn slices<'a>(
    service: &Service,
    pods: impl Iterator<Item = &'a PodEntry>,
    zone: impl Fn(&str) -> Option<String>,
) -> Vec<EndpointSlice> {
    let Some(spec) = &service.spec else {
        return Vec::new();
    };
    let Some(selector) = spec
        .selector
        .as_ref()
        .filter(|selector| !selector.is_empty())
    else {
        return Vec::new();
    };
    let families = spec.ip_families.clone().unwrap_or_default();
    let publish_not_ready = spec.publish_not_ready_addresses.unwrap_or(false);
    let mut groups = Groups::new();
    for family in &families {
        // Every family has a slice, even without endpoints.
        groups
            .entry((FamilyV4First(family == "IPv6"), String::new()))
            .or_default();
    }
    for pod in pods.filter(|pod| is_selected(service, &pod.object, selector) && is_listed(pod)) {
        let ports = resolve_ports(spec.ports.as_deref().unwrap_or_default(), &pod.object);
        let key = ports
            .iter()
            .map(|p| format!("{:?}/{:?};", p.name, p.port))
            .collect::<String>();
        for ip in &pod.ips {
            let is_v6 = IpFamily::of(*ip) == IpFamily::V6;
            if families.iter().any(|family| (family == "IPv6") == is_v6) {
                let group = groups
                    .entry((FamilyV4First(is_v6), key.clone()))
                    .or_default();
                group.0.clone_from(&ports);
                group.1.push(endpoint(
                    pod,
                    ip.to_string(),
                    publish_not_ready,
                    zone(&pod.node),
                ));
            }
        }
    }
    drop_placeholders(&mut groups);
    let numbered = groups.into_iter().enumerate();
    numbered
        .map(|(index, ((family, _), group))| slice(service, family.0, index, group))
        .collect()
}

/// Whether the family is IPv6; orders IPv4 before IPv6.
#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
struct FamilyV4First(bool);

/// Ports and endpoints by family and resolved ports. The ports are text because they have no order.
type Groups = BTreeMap<(FamilyV4First, String), (Vec<EndpointPort>, Vec<Endpoint>)>;

/// Drops the empty placeholder of each family that has endpoints.
fn drop_placeholders(groups: &mut Groups) {
    let filled: Vec<_> = groups
        .iter()
        .filter(|(_, group)| !group.1.is_empty())
        .map(|(k, _)| k.0)
        .collect();
    groups.retain(|key, group| !group.1.is_empty() || !filled.contains(&key.0));
}

fn is_selected(service: &Service, pod: &Pod, selector: &BTreeMap<String, String>) -> bool {
    let empty = BTreeMap::new();
    let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
    pod.metadata.namespace == service.metadata.namespace
        && selector
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
}

/// A pod without addresses, or whose containers have terminated, is not an endpoint.
fn is_listed(pod: &PodEntry) -> bool {
    pod.status.has_sandbox && !matches!(pod.status.phase, Phase::Succeeded | Phase::Failed)
}

fn resolve_ports(ports: &[ServicePort], pod: &Pod) -> Vec<EndpointPort> {
    let resolve = |port: &ServicePort| {
        let number = match &port.target_port {
            None => Some(port.port),
            Some(IntOrString::Int(number)) => Some(*number),
            Some(IntOrString::String(name)) => named_port(pod, name, protocol(port)),
        };
        // A port name that the pod does not declare is not a port of this endpoint.
        number.map(|number| EndpointPort {
            name: Some(port.name.clone().unwrap_or_default()),
            port: Some(number),
            protocol: Some(protocol(port).to_owned()),
            app_protocol: port.app_protocol.clone(),
        })
    };
    ports.iter().filter_map(resolve).collect()
}

fn protocol(port: &ServicePort) -> &str {
    port.protocol.as_deref().unwrap_or("TCP")
}

fn named_port(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    ports
        .find(|port| {
            port.name.as_deref() == Some(name)
                && port.protocol.as_deref().unwrap_or("TCP") == protocol
        })
        .map(|port| port.container_port)
}

fn endpoint(pod: &PodEntry, ip: String, publish_not_ready: bool, zone: Option<String>) -> Endpoint {
    let terminating = pod.deleting.is_some();
    let serving = pod.status.ready;
    Endpoint {
        addresses: vec![ip],
        conditions: Some(EndpointConditions {
            ready: Some(publish_not_ready || (serving && !terminating)),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        node_name: Some(pod.node.clone()),
        zone,
        hostname: pod.spec().hostname,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            name: pod.object.metadata.name.clone(),
            namespace: pod.object.metadata.namespace.clone(),
            uid: Some(pod.uid.clone()),
            ..ObjectReference::default()
        }),
        ..Endpoint::default()
    }
}

fn slice(
    service: &Service,
    is_v6: bool,
    index: usize,
    (ports, endpoints): (Vec<EndpointPort>, Vec<Endpoint>),
) -> EndpointSlice {
    let name = service.metadata.name.clone().unwrap_or_default();
    let family = if is_v6 { "ipv6" } else { "ipv4" };
    EndpointSlice {
        address_type: if is_v6 { "IPv6" } else { "IPv4" }.to_owned(),
        endpoints: Some(endpoints),
        ports: Some(ports),
        metadata: ObjectMeta {
            name: Some(format!("{name}-{family}-{index}")),
            namespace: service.metadata.namespace.clone(),
            labels: Some(BTreeMap::from([
                (SERVICE_NAME.to_owned(), name),
                (
                    "endpointslice.kubernetes.io/managed-by".to_owned(),
                    "endpointslice-controller.k8s.io".to_owned(),
                ),
            ])),
            ..ObjectMeta::default()
        },
    }
}

#[cfg(test)]
mod tests;
