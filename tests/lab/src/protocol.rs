//! What is said over the agent's socket: one JSON request per line, one JSON answer per line.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::options::{IpFamily, LaunchOptions};

/// What the agent can be asked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Create or update the objects of a multi-document manifest; all of it or nothing.
    Apply { yaml: String },
    /// Delete one object; pods are terminated gracefully, and the answer comes when they are gone.
    Delete {
        kind: String,
        name: String,
        grace: Option<u64>,
    },
    /// Set (`Some`) or remove (`None`) labels.
    Label {
        kind: String,
        name: String,
        labels: BTreeMap<String, Option<String>>,
    },
    /// The state of the lab, once its generation is above `after` or `wait_ms` have passed.
    Status { after: Option<u64>, wait_ms: u64 },
    /// Where and with which environment a command of this pod runs.
    Exec { pod: String },
    /// Signal or start the daemon of a node.
    Daemon { node: String, action: DaemonAction },
    /// Signal or start the certificate authority.
    Ca { action: DaemonAction },
    /// What a program is started with from its next start on: a node's daemon, or without a node
    /// the certificate authority.
    SetLaunchOptions {
        node: Option<String>,
        launch: LaunchOptions,
    },
    /// From now on the lab lives only as long as this connection.
    Own,
    /// The lab outlives its owner after all.
    Keep,
    /// Remove everything. Answered when it is gone.
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DaemonAction {
    /// SIGKILL, and stay down.
    Kill,
    /// SIGTERM, and stay down; answered when it has exited.
    Stop,
    /// Start it if it is not running.
    Start,
}

/// The answer to [`Request::Exec`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ExecInfo {
    pub(crate) netns: String,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) dir: PathBuf,
}

/// A lab as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Grows with every change of anything below.
    pub generation: u64,
    /// The lab's name.
    pub name: String,
    /// Where the lab keeps its files.
    pub dir: PathBuf,
    /// The namespace with the bridge, which is also "outside the cluster".
    pub fabric: String,
    /// Every node, by name.
    pub nodes: Vec<NodeStatus>,
    /// The certificate authority, if it is a process of the lab.
    pub ca: Option<CaStatus>,
    /// Every pod, by namespace and name.
    pub pods: Vec<PodStatus>,
    /// Every service, by namespace and name.
    pub services: Vec<ServiceStatus>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// The Node's name.
    pub name: String,
    /// Its network namespace, a name for `ip netns`.
    pub netns: String,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Its daemon.
    pub daemon: ProgramState,
    /// The daemon's process, while it runs.
    pub daemon_pid: Option<u32>,
}

/// The certificate authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaStatus {
    /// Where it serves.
    pub address: SocketAddr,
    /// How it is.
    pub state: ProgramState,
    /// Its process, while it runs.
    pub pid: Option<u32>,
}

/// A program that the lab keeps: the daemon of one node, or the certificate authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProgramState {
    /// The lab runs without daemons.
    Disabled,
    /// Started, not yet ready.
    Starting,
    /// A daemon answers 200 on its readiness port, an authority listens.
    Ready,
    /// Not running; how it ended.
    Exited(String),
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
    /// metadata.uid
    pub uid: String,
    /// spec.nodeName as scheduled
    pub node: String,
    /// Its network namespace (the node's for a host-network pod).
    pub netns: String,
    /// status.podIPs, IPv4 first
    pub ips: Vec<IpAddr>,
    /// status.phase, or `Terminating`
    pub phase: String,
    /// The Ready condition.
    pub ready: bool,
    /// Opted in to the mesh by its labels.
    pub meshed: bool,
    /// How often a container was started again.
    pub restarts: u32,
    /// What the pod waits for or fails at, empty when there is nothing to say.
    pub message: String,
}

/// One service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// metadata.namespace
    pub namespace: String,
    /// metadata.name
    pub name: String,
    /// spec.clusterIPs; empty when headless
    pub cluster_ips: Vec<IpAddr>,
    /// Ready endpoint addresses.
    pub endpoints: Vec<IpAddr>,
}

impl Status {
    /// The pod `name`, which may be `namespace/name`; without a namespace it must be unique.
    ///
    /// # Errors
    /// No such pod, or several namespaces have one.
    pub fn pod(&self, name: &str) -> anyhow::Result<&PodStatus> {
        let mut found = self.pods.iter().filter(|pod| match name.split_once('/') {
            Some((namespace, name)) => pod.namespace == namespace && pod.name == name,
            None => pod.name == name,
        });
        match (found.next(), found.next()) {
            (Some(pod), None) => Ok(pod),
            (Some(a), Some(b)) => anyhow::bail!(
                "pod {name} is ambiguous: say {}/{name} or {}/{name}",
                a.namespace,
                b.namespace
            ),
            (None, _) => anyhow::bail!("no pod {name} in lab {}", self.name),
        }
    }

    /// The node `name`.
    ///
    /// # Errors
    /// No such node.
    pub fn node(&self, name: &str) -> anyhow::Result<&NodeStatus> {
        self.nodes
            .iter()
            .find(|node| node.name == name)
            .ok_or_else(|| anyhow::anyhow!("no node {name} in lab {}", self.name))
    }

    /// What is not yet as it should be: pods that are not ready, daemons that are not. Empty when
    /// the lab has settled.
    pub fn not_ready(&self) -> Vec<String> {
        let program = |name: String, state: &ProgramState| match state {
            ProgramState::Disabled | ProgramState::Ready => None,
            ProgramState::Starting => Some(format!("{name} is not ready")),
            ProgramState::Exited(how) => Some(format!("{name} {how}")),
        };
        let ca = self.ca.iter();
        let ca = ca.filter_map(|ca| program("the certificate authority".to_owned(), &ca.state));
        let daemon =
            |node: &NodeStatus| program(format!("node {}: daemon", node.name), &node.daemon);
        let nodes = self.nodes.iter().filter_map(daemon);
        let pods = self
            .pods
            .iter()
            .filter(|pod| !pod.ready && pod.phase != "Succeeded");
        let pods = pods.map(|pod| {
            let why = if pod.message.is_empty() {
                "not ready"
            } else {
                &pod.message
            };
            format!("pod {}/{}: {}: {why}", pod.namespace, pod.name, pod.phase)
        });
        ca.chain(nodes).chain(pods).collect()
    }
}

impl PodStatus {
    /// The pod's address of this family.
    pub fn ip(&self, family: IpFamily) -> Option<IpAddr> {
        self.ips.iter().copied().find(|ip| family.has(*ip))
    }

    /// The key of this pod in the daemon's `workloadState`, given the cluster's name.
    pub fn workload_uid(&self, cluster: &str) -> String {
        format!(
            "{cluster}//Pod/{}/{}/{}",
            self.namespace, self.name, self.uid
        )
    }
}
