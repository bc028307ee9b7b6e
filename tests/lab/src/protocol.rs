//! The protocol of the agent's socket: one JSON request per line, one JSON response per line.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::options::{IpFamily, LaunchOptions};

/// A request to the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Create or update the objects of a multi-document manifest: all of them or none.
    Apply { yaml: String },
    /// Delete one object. Pods are terminated gracefully; the response follows when they are removed.
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
    /// The status of the lab, once its generation is above `after` or `wait_ms` have passed.
    Status { after: Option<u64>, wait_ms: u64 },
    /// The namespace, environment and folder for a command in this pod.
    Exec { pod: String },
    /// Signal or start the daemon of a node.
    Daemon { node: String, action: ProgramAction },
    /// Signal or start the certificate authority.
    Ca { action: ProgramAction },
    /// Launch options from the next start on: of a node's daemon, or without a node of the
    /// certificate authority.
    SetLaunchOptions {
        node: Option<String>,
        launch: LaunchOptions,
    },
    /// Tie the lab to this connection: the lab is removed when the connection closes.
    Own,
    /// Keep the lab when the owning connection closes.
    Keep,
    /// Remove everything. The response follows when it is removed.
    Down,
}

/// A change of a program's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ProgramAction {
    /// Send SIGKILL; the program stays stopped.
    Kill,
    /// Send SIGTERM; the program stays stopped. The response follows when it has exited.
    Stop,
    /// Start the program if it is not running.
    Start,
}

/// The response to [`Request::Exec`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ExecInfo {
    pub(crate) netns: String,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) dir: PathBuf,
}

/// The state of a lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Incremented with every change of the fields below.
    pub generation: u64,
    /// The lab's name.
    pub name: String,
    /// The folder of the lab's files.
    pub dir: PathBuf,
    /// The namespace of the bridge, which is outside the cluster.
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
    /// The state of its daemon.
    pub daemon: ProgramState,
    /// The daemon's process id, while it runs.
    pub daemon_pid: Option<u32>,
}

/// The certificate authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaStatus {
    /// The address it serves on.
    pub address: SocketAddr,
    /// Its state.
    pub state: ProgramState,
    /// Its process id, while it runs.
    pub pid: Option<u32>,
}

/// The state of a program that the lab runs: the daemon of one node, or the certificate authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProgramState {
    /// The lab runs without daemons.
    Disabled,
    /// Started, not yet ready.
    Starting,
    /// A daemon returns 200 on its readiness port; a certificate authority listens.
    Ready,
    /// Not running, with how it exited.
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
    /// How often containers were restarted.
    pub restarts: u32,
    /// What the pod waits for or why it fails; empty otherwise.
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
    /// The pod `name` or `namespace/name`; a name without namespace must be unique.
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
                "pod {name} is ambiguous: use {}/{name} or {}/{name}",
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

    /// The pods and programs that are not ready, each with the reason. Empty when all are.
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
            let reason = if pod.message.is_empty() {
                "not ready"
            } else {
                &pod.message
            };
            format!(
                "pod {}/{}: {}: {reason}",
                pod.namespace, pod.name, pod.phase
            )
        });
        ca.chain(nodes).chain(pods).collect()
    }
}

impl PodStatus {
    /// The pod's address of this family.
    pub fn ip(&self, family: IpFamily) -> Option<IpAddr> {
        self.ips.iter().copied().find(|ip| family.contains(*ip))
    }

    /// The key of this pod in the daemon's `workloadState`, given the cluster's name.
    pub fn workload_uid(&self, cluster: &str) -> String {
        format!(
            "{cluster}//Pod/{}/{}/{}",
            self.namespace, self.name, self.uid
        )
    }
}
