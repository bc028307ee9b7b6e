//! The compiled mesh: what the data path reads.
//!
//! A [`Model`] is immutable. All lookups are one hash lookup; entries are shared by `Arc`, and an
//! entry that an update did not change is the very same allocation in the next model.

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

/// Port on which a meshed pod accepts HBONE (Istio's contract).
pub const HBONE_PORT: u16 = 15008;

/// Everything the mesh knows at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub(crate) workloads: FxHashMap<WorkloadUid, Arc<Workload>>,
    pub(crate) by_ip: FxHashMap<IpAddr, Arc<Workload>>,
    pub(crate) services: FxHashMap<ServiceName, Arc<Service>>,
    pub(crate) by_vip: FxHashMap<IpAddr, Arc<Service>>,
    pub(crate) external: External,
    pub(crate) refused: FxHashMap<IpAddr, AddressRefusal>,
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

    /// The one workload that owns this address. Host-network pods own none, and an address that
    /// several pods claim is owned by nobody (see [`Model::address_refusal`]).
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

    /// The service, and the port of it, that an address and port of the outside lead to: an external
    /// address or a load balancer's with the service's own port, or any node's with its node port.
    /// Pods and cluster IPs come first: see there whether the address is theirs.
    pub fn service_by_external_address(&self, to: SocketAddr) -> Option<(&Arc<Service>, u16)> {
        let (ip, port) = (to.ip().to_canonical(), to.port());
        let by_address = self.external.by_address.get(&(ip, port));
        by_address.map(|service| (service, port)).or_else(|| {
            let service = self.external.by_node_port.get(&port)?;
            let nodes = self.external.nodes.contains(&ip);
            let mut ports = service.ports.iter();
            let found = ports.find(|one| nodes && one.node_port == Some(port))?;
            Some((service, found.port))
        })
    }

    /// All services, in no particular order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Why nothing may be sent to this address, if that is so.
    pub fn address_refusal(&self, ip: IpAddr) -> Option<AddressRefusal> {
        self.refused.get(&ip.to_canonical()).copied()
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

    /// What was wrong with the input, sorted by file, document and object.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }
}

/// What leads to services from outside of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct External {
    pub(crate) by_address: FxHashMap<(IpAddr, u16), Arc<Service>>,
    pub(crate) by_node_port: FxHashMap<u16, Arc<Service>>,
    pub(crate) nodes: FxHashSet<IpAddr>,
}

/// Why an address is refused: no route leads to it, because every answer might be the wrong one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressRefusal {
    /// Two or more live pods claim it.
    DuplicatePodIp,
    /// Two or more services claim it.
    DuplicateServiceIp,
    /// A pod and a service claim it.
    PodIpIsServiceIp,
    /// Its pod could not be compiled, so it is not known whether the mesh protects it.
    InvalidWorkload,
    /// Its service could not be compiled, so it is not known what stands behind it.
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

/// A machine of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// Its internal and external addresses from `status.addresses`.
    pub addresses: Vec<IpAddr>,
    /// From the topology labels.
    pub locality: Locality,
}

/// What a namespace says about the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// `metadata.name`.
    pub name: Arc<str>,
    /// What pods of it are when they say nothing themselves (`istio.io/dataplane-mode`).
    pub mode: Mode,
    /// What services of it prefer when they say nothing themselves
    /// (`networking.istio.io/traffic-distribution`).
    pub distribution: Option<Distribution>,
    /// `metadata.labels`; NetworkPolicies select by them.
    pub labels: Arc<BTreeMap<String, String>>,
}
