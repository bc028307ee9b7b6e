//! The compiled state of the mesh, which the data path reads.
//!
//! A [`Model`] is immutable. Every lookup is one hash lookup; entries are shared by `Arc`, and an
//! entry that an update does not change is the same allocation in the next model.

mod endpoint;
mod service;
mod workload;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Serialize;

pub use endpoint::{Endpoint, EndpointKey, EndpointLease, EndpointPort, EndpointTarget, Load};
pub use service::{Affinity, Distribution, Service, ServicePort};
pub use workload::{Health, Locality, Mode, Workload, WorkloadType};

use crate::diagnostic::Diagnostic;
use crate::id::{ServiceName, WorkloadUid};
use crate::policy::PolicyReport;

/// Port on which a meshed pod accepts HBONE (Istio's convention).
pub const HBONE_PORT: u16 = 15008;

/// The state of the mesh at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub(crate) workloads: FxHashMap<WorkloadUid, Arc<Workload>>,
    pub(crate) by_ip: FxHashMap<IpAddr, Arc<Workload>>,
    pub(crate) services: FxHashMap<ServiceName, Arc<Service>>,
    pub(crate) by_vip: FxHashMap<IpAddr, Arc<Service>>,
    pub(crate) external: External,
    pub(crate) refused_addresses: FxHashMap<IpAddr, AddressRefusal>,
    pub(crate) nodes: FxHashMap<Arc<str>, Arc<Node>>,
    pub(crate) namespaces: FxHashMap<Arc<str>, Arc<Namespace>>,
    pub(crate) policies: Arc<[Arc<PolicyReport>]>,
    pub(crate) diagnostics: Arc<Vec<Diagnostic>>,
}

impl Model {
    /// The workload with this uid.
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that owns this address. Host-network pods own none, and an address that several
    /// pods claim has no owner (see [`Model::address_refusal`]).
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_ip.get(&ip.to_canonical())
    }

    /// All workloads, in no particular order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The service with this namespace and name.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        self.services.get(&ServiceName::new(namespace, name))
    }

    /// The service that owns this cluster IP.
    pub fn service_by_vip(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.by_vip.get(&ip.to_canonical())
    }

    /// The service, and its port, behind an external address and port: an external IP or load balancer
    /// IP with a port of the service, or the address of any node with a node port. Pod IPs and cluster
    /// IPs take precedence; look the address up there first.
    pub fn service_by_external_address(&self, to: SocketAddr) -> Option<(&Arc<Service>, u16)> {
        let (ip, port) = (to.ip().to_canonical(), to.port());
        let by_address = self.external.by_address.get(&(ip, port));
        by_address.map(|service| (service, port)).or_else(|| {
            let service = self.external.by_node_port.get(&port)?;
            let is_node = self.external.nodes.contains(&ip);
            let mut ports = service.ports.iter();
            let found = ports.find(|one| is_node && one.node_port == Some(port))?;
            Some((service, found.port))
        })
    }

    /// All services, in no particular order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Why no connection may be routed to this address; `None` if it may.
    pub fn address_refusal(&self, ip: IpAddr) -> Option<AddressRefusal> {
        self.refused_addresses.get(&ip.to_canonical()).copied()
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    /// All nodes, in no particular order.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// The namespace of this name.
    pub fn namespace(&self, name: &str) -> Option<&Arc<Namespace>> {
        self.namespaces.get(name)
    }

    /// The state of each policy, sorted by kind, namespace and name.
    pub fn policies(&self) -> &[Arc<PolicyReport>] {
        &self.policies
    }

    /// What is wrong with the input, sorted by file, document and object.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }
}

/// External addresses of services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct External {
    pub(crate) by_address: FxHashMap<(IpAddr, u16), Arc<Service>>,
    pub(crate) by_node_port: FxHashMap<u16, Arc<Service>>,
    pub(crate) nodes: FxHashSet<IpAddr>,
}

/// Why an address is refused: its owner is not certain, so no connection is routed to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressRefusal {
    /// Two or more live pods claim it.
    DuplicatePodIp,
    /// Two or more services claim it.
    DuplicateServiceIp,
    /// A pod and a service claim it.
    PodIpIsServiceIp,
    /// Its pod could not be compiled, so it is unknown whether it is in the mesh.
    InvalidWorkload,
    /// Its service could not be compiled, so its endpoints are unknown.
    InvalidService,
}

impl AddressRefusal {
    /// Stable reason code.
    pub const fn code(self) -> &'static str {
        match self {
            AddressRefusal::DuplicatePodIp => "duplicate_ip",
            AddressRefusal::DuplicateServiceIp => "duplicate_service_ip",
            AddressRefusal::PodIpIsServiceIp => "pod_ip_is_service_ip",
            AddressRefusal::InvalidWorkload => "invalid_workload",
            AddressRefusal::InvalidService => "invalid_service",
        }
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// Its internal and external addresses from `status.addresses`.
    pub addresses: Vec<IpAddr>,
    /// From the topology labels.
    pub locality: Locality,
}

/// The mesh settings of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// The mode of its pods without a label of their own (`istio.io/dataplane-mode`).
    pub mode: Mode,
    /// The distribution of its services without a setting of their own
    /// (`networking.istio.io/traffic-distribution`).
    pub distribution: Option<Distribution>,
    /// `metadata.labels`; NetworkPolicies select by them.
    pub labels: Arc<BTreeMap<String, String>>,
}
