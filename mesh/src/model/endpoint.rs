//! Endpoints of services, and the number of connections to each.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

use super::{Health, Locality, Workload};
use crate::id::WorkloadUid;

/// One backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// The pod or address that serves it.
    pub target: EndpointTarget,
    /// Its addresses for this service, without refused ones.
    pub addresses: Vec<IpAddr>,
    /// The target of each service port; a service port without an entry is not served here.
    pub ports: Vec<EndpointPort>,
    /// Whether it accepts traffic of this service (`publishNotReadyAddresses` already applied).
    pub health: Health,
    /// Its location.
    pub locality: Locality,
    /// Name of its node; empty when unknown.
    pub node: Arc<str>,
}

impl Endpoint {
    /// Identifies the endpoint within its service.
    pub fn key(&self) -> EndpointKey {
        match &self.target {
            EndpointTarget::Workload(workload) => EndpointKey::Workload(workload.uid.clone()),
            EndpointTarget::Address { ip, .. } => EndpointKey::Address(*ip),
        }
    }

    /// Its workload, if it is a pod.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        match &self.target {
            EndpointTarget::Workload(workload) => Some(workload),
            EndpointTarget::Address { .. } => None,
        }
    }

    /// The target port of a service port.
    pub fn target_port(&self, service_port: u16) -> Option<u16> {
        self.ports
            .iter()
            .find(|p| p.service == service_port)
            .map(|p| p.target)
    }

    /// Open connections of this process to it.
    pub fn load(&self) -> &Load {
        match &self.target {
            EndpointTarget::Workload(workload) => &workload.load,
            EndpointTarget::Address { load, .. } => load,
        }
    }
}

/// The pod or address that serves an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointTarget {
    /// A pod.
    #[serde(serialize_with = "uid_only")]
    Workload(Arc<Workload>),
    /// An address without a pod: plain TCP, no identity.
    Address {
        /// The address.
        ip: IpAddr,
        /// Open connections of this process to it.
        #[serde(skip)]
        load: Load,
    },
}

fn uid_only<S: serde::Serializer>(workload: &Arc<Workload>, s: S) -> Result<S::Ok, S::Error> {
    workload.uid.serialize(s)
}

/// The target of one service port at one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct EndpointPort {
    /// Port of the service.
    pub service: u16,
    /// Port of the endpoint.
    pub target: u16,
}

/// Identifies an endpoint, so that a retry can use another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointKey {
    /// A pod.
    Workload(WorkloadUid),
    /// A bare address.
    Address(IpAddr),
}

/// The number of open connections of this process to one target.
///
/// All loads compare equal, so that traffic is not a change of configuration. The store moves the
/// counter from model to model.
#[derive(Clone, Debug, Default)]
pub struct Load(Arc<AtomicUsize>);

impl Load {
    /// The number of open connections.
    pub fn active(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one connection until the lease is dropped.
    pub fn lease(&self) -> EndpointLease {
        self.0.fetch_add(1, Ordering::Relaxed);
        EndpointLease(self.clone())
    }
}

impl PartialEq for Load {
    fn eq(&self, _: &Load) -> bool {
        true
    }
}

impl Eq for Load {}

/// Counts one connection until it is dropped.
#[derive(Debug)]
pub struct EndpointLease(Load);

impl Drop for EndpointLease {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
