//! Whether an inbound connection addresses this pod, and which of its services and ports.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh::{Endpoint, EndpointKey, Model, Service, Workload};

use super::Error;
use crate::ports_and_marks::POD_PORTS;

/// Refuses a destination that is not an address of this pod, or that is a port of the data plane.
pub(super) fn require_local_dst(pod: &Workload, destination: SocketAddr) -> Result<(), Error> {
    refuse_own_port(destination)?;
    if pod.ips.contains(&destination.ip()) {
        Ok(())
    } else {
        Err(Error::NotThisPod {
            authority: destination.to_string(),
        })
    }
}

/// Refuses a port of the data plane itself.
pub(super) fn refuse_own_port(destination: SocketAddr) -> Result<(), Error> {
    if POD_PORTS.contains(&destination.port()) {
        return Err(Error::SelfCall(destination));
    }
    Ok(())
}

/// The port of this pod behind a service's host name and port.
pub(super) fn target_port(model: &Model, pod: &Workload, name: &str, port: u16) -> Option<u16> {
    let service =
        services_of(model, pod).find(|service| service.hostname.eq_ignore_ascii_case(name));
    endpoint_of(service?, pod)?.target_port(port)
}

/// The service that a connection to a port of this pod addresses: the one that the client named if
/// this pod is behind it, else the first that leads to the port.
pub(super) fn addressed_service(
    model: &Model,
    pod: &Workload,
    host: Option<&str>,
    port: u16,
) -> Option<Arc<Service>> {
    let named =
        host.and_then(|host| services_of(model, pod).find(|service| *service.hostname == *host));
    if let Some(named) = named {
        return Some(named.clone());
    }
    let leads_to_port = |service: &&Arc<Service>| {
        endpoint_of(service, pod)
            .is_some_and(|endpoint| endpoint.ports.iter().any(|ports| ports.target == port))
    };
    services_of(model, pod).find(leads_to_port).cloned()
}

fn services_of<'a>(
    model: &'a Model,
    pod: &'a Workload,
) -> impl Iterator<Item = &'a Arc<Service>> + 'a {
    pod.services
        .iter()
        .filter_map(|name| model.service(&name.namespace, &name.name))
}

/// The pod as an endpoint of a service. A service's endpoints are sorted by key.
fn endpoint_of<'a>(service: &'a Service, pod: &Workload) -> Option<&'a Endpoint> {
    let key = EndpointKey::Workload(pod.uid.clone());
    let at = service
        .endpoints
        .binary_search_by(|endpoint| endpoint.key().cmp(&key))
        .ok()?;
    service.endpoints.get(at).map(AsRef::as_ref)
}
