//! Extracts EndpointSlices.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1 as discovery;

use super::{ports, values};
use crate::diagnostic::Diagnostics;
use crate::id::ServiceName;
use crate::model::Health;
use crate::names::namespace_of;
use crate::names::{self, Form, Scope};

/// What an EndpointSlice contains.
#[derive(Clone, Debug)]
pub(in crate::compile) struct ExtractedSlice {
    pub(in crate::compile) service: ServiceName,
    /// Target port by name of the service port.
    pub(in crate::compile) ports: Vec<(Arc<str>, u16)>,
    pub(in crate::compile) endpoints: Vec<SliceEndpoint>,
}

/// One entry of a slice.
#[derive(Clone, Debug)]
pub(in crate::compile) struct SliceEndpoint {
    /// Path of its field.
    pub(in crate::compile) field: String,
    /// Its first address: Kubernetes treats the others as the same backend and never uses them.
    pub(in crate::compile) ip: IpAddr,
    pub(in crate::compile) health: Health,
    pub(in crate::compile) node: Arc<str>,
    pub(in crate::compile) zone: Arc<str>,
    /// Name and uid (empty if not given) of the pod, in the slice's namespace.
    pub(in crate::compile) pod: Option<(Arc<str>, Arc<str>)>,
}

pub(super) fn read(
    object: &discovery::EndpointSlice,
    diagnostics: &mut Diagnostics,
) -> Option<ExtractedSlice> {
    const SERVICE: &str = "kubernetes.io/service-name";
    let meta = &object.metadata;
    names::check(meta, Scope::Namespaced(Form::Subdomain), diagnostics);
    let Some(service) = values::label(meta, SERVICE).filter(|name| !name.is_empty()) else {
        let message = "is missing, so the slice belongs to no service".to_owned();
        diagnostics.error(
            format!("metadata.labels[{SERVICE}]"),
            "missing_label",
            message,
        );
        return None;
    };
    let v6 = match object.address_type.as_str() {
        "IPv4" => false,
        "IPv6" => true,
        other => {
            let message = format!("{other:?} is neither \"IPv4\" nor \"IPv6\"");
            diagnostics.error("addressType", "bad_value", message);
            return None;
        }
    };
    let ports = slice_ports(object, diagnostics);
    let endpoints = object.endpoints.iter().flatten().enumerate();
    let endpoints = endpoints
        .filter_map(|(i, e)| endpoint(i, e, v6, diagnostics))
        .collect();
    let service = ServiceName::new(namespace_of(meta), service);
    (!diagnostics.is_fatal()).then_some(ExtractedSlice {
        service,
        ports,
        endpoints,
    })
}

fn slice_ports(
    object: &discovery::EndpointSlice,
    diagnostics: &mut Diagnostics,
) -> Vec<(Arc<str>, u16)> {
    let mut found = Vec::new();
    for (i, port) in object.ports.iter().flatten().enumerate() {
        if let (true, Some(number)) = (ports::is_tcp(&port.protocol), port.port) {
            let number = values::port_at(number, format!("ports[{i}].port"), diagnostics);
            let name: Arc<str> = port.name.as_deref().unwrap_or_default().into();
            found.extend(number.map(|number| (name, number)));
        }
    }
    found
}

fn endpoint(
    index: usize,
    endpoint: &discovery::Endpoint,
    v6: bool,
    diagnostics: &mut Diagnostics,
) -> Option<SliceEndpoint> {
    let field = format!("endpoints[{index}]");
    let address = format!("{field}.addresses[0]");
    let Some(text) = endpoint.addresses.first() else {
        diagnostics.error(address, "bad_ip", "is missing".to_owned());
        return None;
    };
    let ip = values::ip_at(text, address.as_str(), diagnostics)?;
    if ip.is_ipv6() != v6 {
        let message = format!("{ip} is not of the slice's addressType");
        diagnostics.error(address, "bad_ip", message);
        return None;
    }
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    // Defaults of the API: unknown readiness is ready, unknown serving is as ready.
    let ready = conditions.ready.unwrap_or(true);
    let health = Health {
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
    };
    let target = endpoint
        .target_ref
        .as_ref()
        .filter(|t| t.kind.as_deref() == Some("Pod"));
    let pod = target.map(|t| {
        let text = |value: &Option<String>| Arc::from(value.as_deref().unwrap_or_default());
        (text(&t.name), text(&t.uid))
    });
    Some(SliceEndpoint {
        field,
        ip,
        health,
        node: endpoint.node_name.as_deref().unwrap_or_default().into(),
        zone: endpoint.zone.as_deref().unwrap_or_default().into(),
        pod,
    })
}
