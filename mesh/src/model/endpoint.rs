//! Endpoints of services, and the load that each carries.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

use super::{Health, Locality, Workload};
use crate::id::WorkloadUid;

/// One backend of one service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Endpoint {
    /// What answers.
    pub target: EndpointTarget,
    /// Addresses by which it may be reached for this service; refused ones are not among them.
    pub addresses: Vec<IpAddr>,
    /// Where each service port leads; a service port without an entry is not served here.
    pub ports: Vec<EndpointPort>,
    /// Whether it takes traffic of this service (`publishNotReadyAddresses` already applied).
    pub health: Health,
    /// Where it is.
    pub locality: Locality,
    /// Name of its node; empty when unknown.
    pub node: Arc<str>,
}

impl Endpoint {
    /// Names the endpoint within its service.
    pub fn key(&self) -> EndpointKey {
        match &self.target {
            EndpointTarget::Workload(workload) => EndpointKey::Workload(workload.uid.clone()),
            EndpointTarget::Address { ip, .. } => EndpointKey::Address(*ip),
        }
    }

    /// The workload behind it, if it is a pod.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        match &self.target {
            EndpointTarget::Workload(workload) => Some(workload),
            EndpointTarget::Address { .. } => None,
        }
    }

    /// The target port behind a service port.
    pub fn target_port(&self, service_port: u16) -> Option<u16> {
        self.ports
            .iter()
            .find(|p| p.service == service_port)
            .map(|p| p.target)
    }

    /// Connections that this process holds to it.
    pub fn load(&self) -> &Load {
        match &self.target {
            EndpointTarget::Workload(workload) => &workload.load,
            EndpointTarget::Address { load, .. } => load,
        }
    }
}

/// What answers behind an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointTarget {
    /// A pod.
    #[serde(serialize_with = "uid_only")]
    Workload(Arc<Workload>),
    /// An address of which the mesh knows nothing else: plain TCP, no identity.
    Address {
        /// The address.
        ip: IpAddr,
        /// Connections that this process holds to it.
        #[serde(skip)]
        load: Load,
    },
}

fn uid_only<S: serde::Serializer>(workload: &Arc<Workload>, s: S) -> Result<S::Ok, S::Error> {
    workload.uid.serialize(s)
}

/// Where one service port leads at one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct EndpointPort {
    /// Port of the service.
    pub service: u16,
    /// Port of the endpoint.
    pub target: u16,
}

/// Names an endpoint across attempts, so that a retry goes elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointKey {
    /// A pod.
    Workload(WorkloadUid),
    /// A bare address.
    Address(IpAddr),
}

/// How many connections this process holds to one target.
///
/// The count is no part of what the model says: two loads are always equal, so that traffic never
/// looks like a change of configuration. The store hands the counter on from model to model.
#[derive(Clone, Debug, Default)]
pub struct Load(Arc<AtomicUsize>);

impl Load {
    /// Connections now.
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

/// One connection, counted while this lives.
#[derive(Debug)]
pub struct EndpointLease(Load);

impl Drop for EndpointLease {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
