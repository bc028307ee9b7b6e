//! The outbound decision: where does a connection go?
//!
//! Pure: a model, a source and a destination in, a [`Route`] out. Services are looked up before
//! pods, as Istio does; the ways in from outside (external addresses, load balancers, node ports)
//! come last, because anybody who may write a Service may name any address there. An address that is
//! refused ([`Model::address_refusal`]) leads nowhere; only an address of which nothing at all is known is
//! passed through.

mod balance;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{
    Endpoint, EndpointKey, EndpointLease, HBONE_PORT, Load, Model, Service, Workload,
};

/// Ports of the daemon in every enrolled pod: outbound, inbound plain, inbound HBONE.
const OWN_PORTS: [u16; 3] = [15001, 15006, HBONE_PORT];

/// Where a connection goes.
#[derive(Debug)]
pub enum Route {
    /// Through the mesh, by HBONE.
    Mesh {
        /// The pod that must prove its identity.
        workload: Arc<Workload>,
        /// The service that was addressed, if one was.
        service: Option<Arc<Service>>,
        /// Pod address and target port: the CONNECT authority.
        target: SocketAddr,
        /// Pod address and HBONE port: where the tunnel is dialled.
        tunnel: SocketAddr,
        /// Hold it as long as the connection lives.
        lease: EndpointLease,
    },
    /// Outside the mesh, by plain TCP, to a target that is known.
    Plain {
        /// What is dialled.
        target: SocketAddr,
        /// The pod, if it is one.
        workload: Option<Arc<Workload>>,
        /// The service that was addressed, if one was.
        service: Option<Arc<Service>>,
        /// Hold it as long as the connection lives.
        lease: EndpointLease,
    },
    /// Nothing is known of the destination: plain TCP to where the application wanted to go.
    Passthrough {
        /// The original destination.
        target: SocketAddr,
    },
    /// The connection must be refused.
    NoEndpoint {
        /// The service that was addressed, if one was.
        service: Option<Arc<Service>>,
        /// Stable reason code.
        code: &'static str,
    },
}

impl Route {
    /// The endpoint that was chosen: add it to `tried` before asking for another.
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

    /// Another endpoint may exist: the destination was a service.
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

/// Decides where a connection of `source` to `destination` goes. Endpoints in `tried` are not
/// chosen again. Reason codes of [`Route::NoEndpoint`]:
///
/// | code | meaning |
/// |---|---|
/// | `self_call` | the destination is the daemon itself, or no address of another machine |
/// | `duplicate_ip`, `duplicate_service_ip`, `pod_ip_is_service_ip`, `invalid_workload`, `invalid_service` | the address is refused |
/// | `service_port_unknown` | the service has no such TCP port |
/// | `no_endpoint` | nothing stands behind the service |
/// | `no_local_endpoint` | `internalTrafficPolicy: Local`, and nothing on this node |
/// | `no_endpoint_for_port` | no endpoint serves this port, or none in an address family of the source |
/// | `no_healthy_endpoint` | endpoints exist, and none takes traffic |
/// | `endpoints_exhausted` | every endpoint that could be used was tried |
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
        None => from_outside(model, source, destination, tried, rng),
    }
}

/// A way into the cluster is taken by the mesh, since what the node would make of it is a connection
/// in clear to a pod that may be in the mesh.
fn from_outside(
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
/// destination, and following it would never end. Capture leaves loopback alone, so any other
/// loopback destination was made by the same means.
fn is_self_call(source: &Workload, destination: SocketAddr) -> bool {
    let ip = destination.ip();
    let own = source.ips.contains(&ip) && OWN_PORTS.contains(&destination.port());
    own || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast()
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
    match balance::choose(service, source, destination, tried, rng) {
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

/// An address of the endpoint that the source can reach: of the family it asked for, else of the
/// other one if the source has an address there, since the daemon dials anew.
fn reachable(endpoint: &Endpoint, source: &Workload, wanted: IpAddr) -> Option<IpAddr> {
    let of = |v6: bool| {
        endpoint
            .addresses
            .iter()
            .copied()
            .find(|ip| ip.is_ipv6() == v6)
    };
    let other = !wanted.is_ipv6();
    of(wanted.is_ipv6()).or_else(|| source.ip(other).and_then(|_| of(other)))
}

#[cfg(test)]
mod tests;
