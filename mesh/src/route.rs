//! The outbound decision: where does a connection go?

use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::{EndpointKey, EndpointLease, Model, Service, Workload};

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

/// Decides where a connection of `source` to `destination` goes.
pub fn route(
    model: &Model,
    source: &Workload,
    destination: SocketAddr,
    tried: &[EndpointKey],
    rng: &mut fastrand::Rng,
) -> Route {
    let _ = (model, source, tried, rng);
    Route::Passthrough {
        target: destination,
    }
}
