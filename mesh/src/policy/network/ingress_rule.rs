//! Whether an ingress rule of a NetworkPolicy admits a connection: from which peers, to which ports.

use std::net::IpAddr;

use crate::id::NamedPort;
use crate::policy::cidr::Cidr;
use crate::policy::connection::{ConnectionAttributes, SourcePod};
use crate::policy::selector::Selector;

/// Admits connections from one of its peers to one of its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) from: From,
    pub(super) ports: Ports,
}

/// The sources that a rule admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum From {
    Anyone,
    Peers(Vec<Peer>),
}

/// One entry of `from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Pods {
        /// `None` for the policy's own namespace.
        namespaces: Option<Selector>,
        pods: Selector,
    },
    IpBlock(IpBlock),
}

/// `ipBlock`: a block without its exceptions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IpBlock {
    pub(super) cidr: Cidr,
    pub(super) except: Vec<Cidr>,
}

/// The TCP ports that a rule admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ports {
    All,
    /// Empty if the rule lists ports of other protocols only.
    These(Vec<Port>),
}

/// One entry of `ports` for TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Port {
    /// From the first to the last.
    Range(u16, u16),
    /// A container port name; its number may differ from pod to pod.
    Named(Box<str>),
}

impl Rule {
    /// Whether the rule of a policy in `namespace` admits the connection.
    pub(super) fn admits(&self, connection: &ConnectionAttributes<'_>, namespace: &str) -> bool {
        let port = connection.destination.port();
        let named = connection.destination_pod.named_ports;
        self.ports.admit(port, named) && self.from.admits(connection, namespace)
    }
}

impl Ports {
    fn admit(&self, port: u16, named: &[NamedPort]) -> bool {
        match self {
            Ports::All => true,
            Ports::These(ports) => ports.iter().any(|entry| match entry {
                Port::Range(first, last) => (*first..=*last).contains(&port),
                Port::Named(name) => named.iter().any(|n| n.port == port && *n.name == **name),
            }),
        }
    }
}

impl From {
    fn admits(&self, connection: &ConnectionAttributes<'_>, namespace: &str) -> bool {
        match self {
            From::Anyone => true,
            From::Peers(peers) => peers.iter().any(|peer| peer.matches(connection, namespace)),
        }
    }
}

impl Peer {
    fn matches(&self, connection: &ConnectionAttributes<'_>, namespace: &str) -> bool {
        match self {
            Peer::IpBlock(block) => block.contains(connection.source_ip),
            Peer::Pods { namespaces, pods } => connection.source_pod.is_some_and(|pod| {
                let in_namespace = match namespaces {
                    None => *pod.namespace == *namespace,
                    Some(selector) => selects_namespace(selector, &pod),
                };
                in_namespace && pods.selects(pod.labels)
            }),
        }
    }
}

fn selects_namespace(selector: &Selector, pod: &SourcePod<'_>) -> bool {
    selector.selects_namespace(pod.namespace, pod.namespace_labels)
}

impl IpBlock {
    fn contains(&self, ip: IpAddr) -> bool {
        self.cidr.contains(ip) && !self.except.iter().any(|except| except.contains(ip))
    }
}
