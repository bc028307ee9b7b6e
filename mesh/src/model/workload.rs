//! Workloads: the pods of the mesh model.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Serialize, Serializer};
use spiffe::SpiffeId;

use super::Load;
use crate::id::{NamedPort, ServiceName, WorkloadUid};
use crate::policy::PolicySet;

/// One live pod. Pods that have ended (`Succeeded`, `Failed`) are not in the model.
///
/// Strings are empty, not absent, where the pod sets nothing; the telemetry layer decides how
/// "unknown" is spelled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Identifies this incarnation of the pod.
    pub uid: WorkloadUid,
    /// Pod name.
    pub name: Arc<str>,
    /// Pod namespace.
    pub namespace: Arc<str>,
    /// Service account name (`default` when the pod names none).
    pub service_account: Arc<str>,
    /// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[serde(serialize_with = "as_string")]
    pub identity: SpiffeId,
    /// Pod addresses, primary first; at most one per family. The addresses of a host-network pod are
    /// its node's and identify no workload.
    pub ips: Vec<IpAddr>,
    /// Name of the node it runs on; empty while unscheduled.
    pub node: Arc<str>,
    /// Where that node is.
    pub locality: Locality,
    /// The pod shares its node's network namespace, so it can never be meshed.
    pub host_network: bool,
    /// Whether the mesh carries its traffic.
    pub mode: Mode,
    /// Whether it accepts traffic.
    pub health: Health,
    /// Istio's canonical service: by label, else the workload name.
    pub canonical_name: Arc<str>,
    /// Istio's canonical revision: by label, else `latest`.
    pub canonical_revision: Arc<str>,
    /// The kind of object that owns the pod.
    pub workload_type: WorkloadType,
    /// Name of the owner, for example of the Deployment; the pod's own if it has none.
    pub workload_name: Arc<str>,
    /// Label `app` (or `app.kubernetes.io/name`).
    pub app: Arc<str>,
    /// Label `version` (or `app.kubernetes.io/version`).
    pub version: Arc<str>,
    /// Cluster id.
    pub cluster: Arc<str>,
    /// Ports of the kubelet's probes and HTTP hooks; sorted, without duplicates.
    pub probe_ports: Vec<u16>,
    /// Named TCP container ports.
    pub ports: Vec<NamedPort>,
    /// Services that have an endpoint on this workload, sorted.
    pub services: Vec<ServiceName>,
    /// `metadata.labels`; policies select by them.
    pub labels: Arc<BTreeMap<String, String>>,
    /// The policies that apply to connections to it.
    pub policies: PolicySet,
    /// `metadata.uid`.
    pub kube_uid: Arc<str>,
    /// Open connections of this process to it; kept across updates of the workload.
    #[serde(skip)]
    pub load: Load,
}

impl Workload {
    /// Its address of one family.
    pub fn ip(&self, v6: bool) -> Option<IpAddr> {
        self.ips.iter().copied().find(|ip| ip.is_ipv6() == v6)
    }

    /// Whether the mesh carries its traffic.
    pub fn is_meshed(&self) -> bool {
        self.mode == Mode::Mesh
    }
}

fn as_string<S: Serializer>(id: &SpiffeId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

/// Whether the mesh carries the traffic of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Opted in: reached by HBONE only.
    Mesh,
    /// Not opted in: reached by plain TCP.
    #[default]
    Plain,
}

/// Whether a pod accepts traffic, in the terms of an EndpointSlice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Health {
    /// Serving and not terminating.
    pub ready: bool,
    /// Passes its readiness probes, terminating or not.
    pub serving: bool,
    /// Being deleted.
    pub terminating: bool,
}

/// A location, from coarse to fine; empty where unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone`.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone`.
    pub subzone: Arc<str>,
}

/// The owners that Istio's telemetry distinguishes; all others count as `Pod`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadType {
    /// No other known owner.
    #[default]
    Pod,
    /// A ReplicaSet of a Deployment.
    Deployment,
    /// A Job without a CronJob.
    Job,
    /// A Job of a CronJob.
    CronJob,
}

impl WorkloadType {
    /// As in the baggage key `k8s.<type>.name` and the workload dump.
    pub const fn as_str(self) -> &'static str {
        match self {
            WorkloadType::Pod => "pod",
            WorkloadType::Deployment => "deployment",
            WorkloadType::Job => "job",
            WorkloadType::CronJob => "cronjob",
        }
    }
}

impl fmt::Display for WorkloadType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
