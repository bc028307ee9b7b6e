//! Ingress rules: from whom, to which ports.

use std::net::IpAddr;

use crate::id::NamedPort;
use crate::model::{Model, Namespace, Workload};
use crate::policy::InboundConnection;
use crate::policy::cidr::Cidr;
use crate::policy::selector::Selector;

/// Admits what comes from one of its peers to one of its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) from: From,
    pub(super) ports: Ports,
}

/// Whom a rule admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum From {
    Anyone,
    Peers(Vec<Peer>),
}

/// One entry of `from`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    Pods {
        /// `None` for the policy's own.
        namespaces: Option<Selector>,
        pods: Selector,
    },
    Block {
        cidr: Cidr,
        except: Vec<Cidr>,
    },
}

/// To which TCP ports a rule admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ports {
    All,
    /// None of them if the rule speaks of other protocols only.
    These(Vec<Port>),
}

/// One entry of `ports` for TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Port {
    /// From the first to the last.
    Range(u16, u16),
    /// The container port of that name, which is another number from pod to pod.
    Named(Box<str>),
}

/// Who connects, as NetworkPolicy sees it.
pub(super) struct Source<'a> {
    ip: IpAddr,
    /// Not of a pod on the host's network: its address is its node's.
    pod: Option<&'a Workload>,
    namespace: Option<&'a Namespace>,
}

impl<'a> Source<'a> {
    pub(super) fn new(connection: &InboundConnection<'a>, model: &'a Model) -> Self {
        let pod = connection.source_workload.filter(|pod| !pod.host_network);
        Self {
            ip: connection.source_ip.to_canonical(),
            pod,
            namespace: pod.and_then(|pod| model.namespace(&pod.namespace).map(|n| &**n)),
        }
    }

    pub(super) fn is(&self, workload: &Workload) -> bool {
        self.pod.is_some_and(|pod| pod.uid == workload.uid)
    }
}

impl Rule {
    /// Whether it admits this source to this port of a pod that names its ports so. `namespace` is
    /// the policy's.
    pub(super) fn admits(
        &self,
        source: &Source<'_>,
        port: u16,
        named: &[NamedPort],
        namespace: &str,
    ) -> bool {
        self.ports.admit(port, named) && self.from.admits(source, namespace)
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
    fn admits(&self, source: &Source<'_>, namespace: &str) -> bool {
        match self {
            From::Anyone => true,
            From::Peers(peers) => peers.iter().any(|peer| peer.is(source, namespace)),
        }
    }
}

impl Peer {
    fn is(&self, source: &Source<'_>, own: &str) -> bool {
        match self {
            Peer::Block { cidr, except } => {
                cidr.contains(source.ip) && !except.iter().any(|block| block.contains(source.ip))
            }
            Peer::Pods { namespaces, pods } => source.pod.is_some_and(|pod| {
                let right_namespace = match namespaces {
                    None => *pod.namespace == *own,
                    Some(selector) => selector.selects_namespace(&pod.namespace, source.namespace),
                };
                right_namespace && pods.selects(&pod.labels)
            }),
        }
    }
}
