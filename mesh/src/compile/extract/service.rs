//! Extracts services: addresses, ports and traffic policies.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{ports, values};
use crate::diagnostic::Diagnostics;
use crate::model::{Affinity, Distribution, Service, ServicePort};
use crate::names::namespace_of;
use crate::names::{self, Form, Scope};
use crate::params::Params;

/// What a service contains.
#[derive(Clone, Debug)]
pub(in crate::compile) struct ExtractedService {
    /// Complete but for the endpoints, and the namespace's distribution.
    pub(in crate::compile) service: Service,
    /// `None` if its endpoints are managed elsewhere.
    pub(in crate::compile) selector: Option<BTreeMap<String, String>>,
    /// Where each of `service.ports` leads, in the same order, with the path of its field.
    pub(in crate::compile) targets: Vec<(String, TargetPort)>,
    /// The service's own traffic distribution.
    pub(in crate::compile) distribution: Option<Distribution>,
}

/// The result for a service that is not an `ExternalName`.
pub(in crate::compile) enum ServiceExtraction {
    Usable(Box<ExtractedService>),
    /// Its name is not certain, but its addresses are, so they are refused.
    Unreadable {
        vips: Vec<IpAddr>,
    },
}

/// `targetPort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::compile) enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

/// Reads a service; `None` for `ExternalName`, which is only a DNS name.
pub(super) fn read(
    object: &core::Service,
    params: &Params,
    diagnostics: &mut Diagnostics,
) -> Option<ServiceExtraction> {
    let (meta, spec) = (&object.metadata, object.spec.clone().unwrap_or_default());
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    names::check(meta, Scope::Namespaced(Form::Label), diagnostics);
    let (namespace, name) = (namespace_of(meta), meta.name.as_deref().unwrap_or_default());
    let (ports, targets) = service_ports(&spec, diagnostics);
    let service = Service {
        namespace: namespace.into(),
        name: name.into(),
        hostname: format!("{name}.{namespace}.svc.{}", params.cluster_domain).into(),
        vips: vips(&spec, diagnostics),
        external: external(object, &spec, diagnostics),
        ports,
        endpoints: Vec::new(),
        affinity: affinity(&spec, diagnostics),
        distribution: Distribution::Any,
        node_local: node_local(&spec, diagnostics),
        publish_not_ready: spec.publish_not_ready_addresses == Some(true),
    };
    let distribution = distribution(object, &spec, diagnostics);
    let selector = spec.selector.filter(|selector| !selector.is_empty());
    Some(match diagnostics.is_fatal() {
        true => ServiceExtraction::Unreadable { vips: service.vips },
        false => ServiceExtraction::Usable(Box::new(ExtractedService {
            service,
            selector,
            targets,
            distribution,
        })),
    })
}

fn vips(spec: &core::ServiceSpec, diagnostics: &mut Diagnostics) -> Vec<IpAddr> {
    let listed = spec.cluster_ips.iter().flatten().enumerate();
    let listed = listed.map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), Some(ip.as_str())));
    let single = [("spec.clusterIP".to_owned(), spec.cluster_ip.as_deref())];
    let mut vips = Vec::new();
    for (field, text) in listed.chain(single) {
        let Some(text) = text.filter(|text| !matches!(*text, "" | "None")) else {
            continue;
        };
        vips.extend(values::ip_at(text, field, diagnostics).filter(|ip| !vips.contains(ip)));
    }
    vips
}

/// External IPs and load balancer IPs. A load balancer reports its addresses in the status, so an
/// unusable one is ignored. With `ipMode: Proxy` connections must go through the load balancer.
fn external(
    object: &core::Service,
    spec: &core::ServiceSpec,
    diagnostics: &mut Diagnostics,
) -> Vec<IpAddr> {
    let mut ips = Vec::new();
    for (i, text) in spec.external_ips.iter().flatten().enumerate() {
        ips.extend(values::ip_at(
            text,
            format!("spec.externalIPs[{i}]"),
            diagnostics,
        ));
    }
    let balancer = object
        .status
        .as_ref()
        .and_then(|s| s.load_balancer.as_ref());
    let ingress = balancer.and_then(|balancer| balancer.ingress.as_ref());
    let direct = ingress.into_iter().flatten();
    let direct = direct.filter(|ingress| ingress.ip_mode.as_deref() != Some("Proxy"));
    ips.extend(direct.filter_map(|ingress| values::ip(ingress.ip.as_deref()?).ok()));
    ips.sort_unstable();
    ips.dedup();
    ips
}

fn service_ports(
    spec: &core::ServiceSpec,
    diagnostics: &mut Diagnostics,
) -> (Vec<ServicePort>, Vec<(String, TargetPort)>) {
    let (mut ports, mut targets) = (Vec::<ServicePort>::new(), Vec::new());
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        if !ports::is_tcp(&port.protocol) {
            continue;
        }
        let path = format!("spec.ports[{i}]");
        let number = values::port_at(port.port, format!("{path}.port"), diagnostics);
        let target = target_port(port, &path, diagnostics);
        let (Some(number), Some(target)) = (number, target) else {
            continue;
        };
        if ports.iter().any(|known| known.port == number) {
            let message = format!("{number} is listed twice; the first counts");
            diagnostics.error(format!("{path}.port"), "duplicate_port", message);
            continue;
        }
        ports.push(ServicePort {
            name: port.name.as_deref().unwrap_or_default().into(),
            port: number,
            app_protocol: port.app_protocol.as_deref().unwrap_or_default().into(),
            node_port: port.node_port.and_then(|port| u16::try_from(port).ok()),
        });
        targets.push((format!("{path}.targetPort"), target));
    }
    (ports, targets)
}

fn target_port(
    port: &core::ServicePort,
    path: &str,
    diagnostics: &mut Diagnostics,
) -> Option<TargetPort> {
    let field = format!("{path}.targetPort");
    match &port.target_port {
        // Clients write zero or the empty name for "not set".
        None | Some(IntOrString::Int(0)) => {
            values::port_at(port.port, field, &mut Diagnostics::default()).map(TargetPort::Number)
        }
        Some(IntOrString::Int(number)) => {
            values::port_at(*number, field, diagnostics).map(TargetPort::Number)
        }
        Some(IntOrString::String(name)) if name.is_empty() => {
            values::port_at(port.port, field, &mut Diagnostics::default()).map(TargetPort::Number)
        }
        Some(IntOrString::String(name)) => Some(TargetPort::Name(name.as_str().into())),
    }
}

fn affinity(spec: &core::ServiceSpec, diagnostics: &mut Diagnostics) -> Affinity {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => Affinity::None,
        Some("ClientIP") => Affinity::ClientIp,
        Some(other) => {
            let message = format!("{other:?} is neither \"None\" nor \"ClientIP\"");
            diagnostics.error("spec.sessionAffinity", "bad_value", message);
            Affinity::None
        }
    }
}

/// An unknown value is read as the narrower one.
fn node_local(spec: &core::ServiceSpec, diagnostics: &mut Diagnostics) -> bool {
    match spec.internal_traffic_policy.as_deref() {
        None | Some("" | "Cluster") => false,
        Some("Local") => true,
        Some(other) => {
            let message = format!("{other:?} is neither \"Cluster\" nor \"Local\"");
            diagnostics.error("spec.internalTrafficPolicy", "bad_value", message);
            true
        }
    }
}

/// The field overrides the annotation (Istio's order); the namespace's annotation comes last.
fn distribution(
    object: &core::Service,
    spec: &core::ServiceSpec,
    diagnostics: &mut Diagnostics,
) -> Option<Distribution> {
    let annotation = values::distribution_annotation(&object.metadata, diagnostics);
    match spec.traffic_distribution.as_deref() {
        None | Some("") => annotation,
        Some(text) => values::distribution(text).or_else(|| {
            let message = format!("{text:?} is not a traffic distribution");
            diagnostics.error("spec.trafficDistribution", "bad_value", message);
            annotation
        }),
    }
}
