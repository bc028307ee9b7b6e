//! The outbound decision: where does a connection go?
//!
//! A pure function from a model, a source and a destination to a [`Route`]. Services are looked up
//! before pods, as in Istio. External addresses, load balancers and node ports come last, because any
//! author of a Service may name any address there. A refused address
//! ([`Model::address_refusal`]) has no route; only an unknown address is passed through.
//!
//! `choose_endpoint.rs` picks one endpoint of a service, `affinity.rs` the one of a client with
//! session affinity.

mod affinity;
mod choose_endpoint;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{
    Endpoint, EndpointKey, EndpointLease, HBONE_PORT, Load, Model, Service, Workload,
};

/// The ports of the daemon in every enrolled pod: outbound, inbound plaintext, inbound HBONE.
const DAEMON_PORTS: [u16; 3] = [15001, 15006, HBONE_PORT];

/// The route of a connection.
#[derive(Debug)]
pub enum Route {
    /// Through the mesh, by HBONE.
    Mesh {
        /// The pod whose identity the tunnel must verify.
        workload: Arc<Workload>,
        /// The service, if the destination is one.
        service: Option<Arc<Service>>,
        /// Pod address and target port: the CONNECT authority.
        target: SocketAddr,
        /// Pod address and HBONE port: where the tunnel is dialled.
        tunnel: SocketAddr,
        /// Counts the connection; keep it as long as the connection is open.
        lease: EndpointLease,
    },
    /// Outside the mesh, by plain TCP, to a known target.
    Plain {
        /// The address to dial.
        target: SocketAddr,
        /// The pod, if it is one.
        workload: Option<Arc<Workload>>,
        /// The service, if the destination is one.
        service: Option<Arc<Service>>,
        /// Counts the connection; keep it as long as the connection is open.
        lease: EndpointLease,
    },
    /// The destination is unknown: plain TCP to the original destination.
    Passthrough {
        /// The original destination.
        target: SocketAddr,
    },
    /// There is no endpoint; the connection must be refused.
    NoEndpoint {
        /// The service, if the destination is one.
        service: Option<Arc<Service>>,
        /// Stable reason code.
        code: &'static str,
    },
}

impl Route {
    /// The chosen endpoint; add it to `tried` to choose another.
    pub fn endpoint(&self) -> Option<EndpointKey> {
        match self {
            Route::Mesh { workload, .. }
            | Route::Plain {
                workload: Some(workload),
                ..
            } => Some(EndpointKey::Workload(workload.uid.clone())),
            Route::Plain { target, .. } => Some(EndpointKey::Address(target.ip())),
            Route::Passthrough { .. } | Route::NoEndpoint { .. } => None,
        }
    }

    /// Whether another endpoint may exist: the destination is a service.
    pub fn may_retry(&self) -> bool {
        matches!(
            self,
            Route::Mesh {
                service: Some(_),
                ..
            } | Route::Plain {
                service: Some(_),
                ..
            }
        )
    }
}

/// Decides where a connection from `source` to `destination` goes. Endpoints in `tried` are not
/// chosen again. Reason codes of [`Route::NoEndpoint`]:
///
/// | code | meaning |
/// |---|---|
/// | `self_call` | the destination is the daemon itself, or not an address of another host |
/// | `duplicate_ip`, `duplicate_service_ip`, `pod_ip_is_service_ip`, `invalid_workload`, `invalid_service` | the address is refused |
/// | `service_port_unknown` | the service has no such TCP port |
/// | `no_endpoint` | the service has no endpoint |
/// | `no_local_endpoint` | `internalTrafficPolicy: Local`, and no endpoint on this node |
/// | `no_endpoint_for_port` | no endpoint serves this port, or none in an address family of the source |
/// | `no_healthy_endpoint` | endpoints exist, but none accepts traffic |
/// | `endpoints_exhausted` | every usable endpoint was tried |
pub fn route(
    model: &Model,
    source: &Workload,
    destination: SocketAddr,
    tried: &[EndpointKey],
    rng: &mut fastrand::Rng,
) -> Route {
    let destination = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let ip = destination.ip();
    if is_self_call(source, destination) {
        return refuse(None, "self_call");
    }
    if let Some(refusal) = model.address_refusal(ip) {
        return refuse(None, refusal.code());
    }
    if let Some(service) = model.service_by_vip(ip) {
        return to_service(service, source, destination, tried, rng);
    }
    match model.workload_by_ip(ip) {
        Some(workload) if tried.contains(&EndpointKey::Workload(workload.uid.clone())) => {
            refuse(None, "endpoints_exhausted")
        }
        Some(workload) => to_workload(workload, None, destination),
        None => to_external_address(model, source, destination, tried, rng),
    }
}

/// Routes an external address, load balancer or node port of a service. The mesh resolves it, because
/// kube-proxy would make a plaintext connection to a pod that may be in the mesh.
fn to_external_address(
    model: &Model,
    source: &Workload,
    destination: SocketAddr,
    tried: &[EndpointKey],
    rng: &mut fastrand::Rng,
) -> Route {
    match model.service_by_external_address(destination) {
        Some((service, port)) => {
            let destination = SocketAddr::new(destination.ip(), port);
            to_service(service, source, destination, tried, rng)
        }
        None => Route::Passthrough {
            target: destination,
        },
    }
}

/// A connection made directly to the daemon's outbound port has the daemon as its original
/// destination; routing it would loop. Capture does not redirect loopback, so any other loopback
/// destination comes from such a connection too.
fn is_self_call(source: &Workload, destination: SocketAddr) -> bool {
    let ip = destination.ip();
    let is_daemon = source.ips.contains(&ip) && DAEMON_PORTS.contains(&destination.port());
    is_daemon || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast()
}

fn refuse(service: Option<&Arc<Service>>, code: &'static str) -> Route {
    Route::NoEndpoint {
        service: service.cloned(),
        code,
    }
}

fn to_service(
    service: &Arc<Service>,
    source: &Workload,
    destination: SocketAddr,
    tried: &[EndpointKey],
    rng: &mut fastrand::Rng,
) -> Route {
    if service.port(destination.port()).is_none() {
        return refuse(Some(service), "service_port_unknown");
    }
    match choose_endpoint::choose(service, source, destination, tried, rng) {
        Ok((endpoint, target)) => to_endpoint(endpoint, service, target),
        Err(code) => refuse(Some(service), code),
    }
}

fn to_endpoint(endpoint: &Endpoint, service: &Arc<Service>, target: SocketAddr) -> Route {
    match endpoint.workload() {
        Some(workload) => to_workload(workload, Some(service), target),
        None => plain(target, None, Some(service), endpoint.load()),
    }
}

fn to_workload(
    workload: &Arc<Workload>,
    service: Option<&Arc<Service>>,
    target: SocketAddr,
) -> Route {
    if !workload.is_meshed() {
        return plain(target, Some(workload), service, &workload.load);
    }
    Route::Mesh {
        workload: workload.clone(),
        service: service.cloned(),
        target,
        tunnel: SocketAddr::new(target.ip(), HBONE_PORT),
        lease: workload.load.lease(),
    }
}

fn plain(
    target: SocketAddr,
    workload: Option<&Arc<Workload>>,
    service: Option<&Arc<Service>>,
    load: &Load,
) -> Route {
    Route::Plain {
        target,
        workload: workload.cloned(),
        service: service.cloned(),
        lease: load.lease(),
    }
}

/// An address of the endpoint that the source can reach: one of the destination's family, else one of
/// the other family if the source has an address of it. The daemon opens a new connection, so the
/// family may change.
fn reachable_address(
    endpoint: &Endpoint,
    source: &Workload,
    destination: IpAddr,
) -> Option<IpAddr> {
    let of = |v6: bool| {
        endpoint
            .addresses
            .iter()
            .copied()
            .find(|ip| ip.is_ipv6() == v6)
    };
    let other = !destination.is_ipv6();
    of(destination.is_ipv6()).or_else(|| source.ip(other).and_then(|_| of(other)))
}

#[cfg(test)]
mod tests;
