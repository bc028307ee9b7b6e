//! Services: virtual addresses, ports and endpoints.

use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use super::Endpoint;
use crate::id::ServiceName;

/// A Kubernetes Service of any type but `ExternalName`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `<name>.<namespace>.svc.<cluster domain>`.
    pub hostname: Arc<str>,
    /// Cluster IPs, primary first; empty when headless.
    pub vips: Vec<IpAddr>,
    /// Addresses by which it is reached from outside the cluster, and also from pods:
    /// `spec.externalIPs` and the addresses of its load balancer.
    pub external: Vec<IpAddr>,
    /// TCP ports.
    pub ports: Vec<ServicePort>,
    /// All endpoints, usable or not; sorted by key.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// Session affinity.
    pub affinity: Affinity,
    /// Which endpoints are preferred.
    pub distribution: Distribution,
    /// `internalTrafficPolicy: Local`: only endpoints on the client's node.
    pub node_local: bool,
    /// Not-ready endpoints count as ready.
    pub publish_not_ready: bool,
}

impl Service {
    /// Its namespace and name as a key.
    pub fn key(&self) -> ServiceName {
        ServiceName::new(self.namespace.clone(), self.name.clone())
    }

    /// Whether it has no virtual address: clients use the addresses of the endpoints.
    pub fn is_headless(&self) -> bool {
        self.vips.is_empty()
    }

    /// The port with this number.
    pub fn port(&self, port: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|p| p.port == port)
    }
}

/// One TCP port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ServicePort {
    /// Name; empty when the service has one unnamed port.
    pub name: Arc<str>,
    /// Port of the virtual address.
    pub port: u16,
    /// `appProtocol`, empty when not given.
    pub app_protocol: Arc<str>,
    /// The port of this service port on every node.
    pub node_port: Option<u16>,
}

/// `sessionAffinity`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Affinity {
    /// Any endpoint for any connection.
    #[default]
    None,
    /// Connections of one client address go to one endpoint while it is usable.
    ClientIp,
}

/// Which endpoints a client prefers (`spec.trafficDistribution` and Istio's annotation). A
/// preference falls back to the next nearest endpoints; it never leaves a client with none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Distribution {
    /// None preferred.
    #[default]
    Any,
    /// `PreferSameZone` and its older name `PreferClose`: same zone, else same region, else any.
    PreferSameZone,
    /// Same node, else same subzone, zone, region, else any.
    PreferSameNode,
}
