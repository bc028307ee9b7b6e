//! A place in the lab where commands run and packets are captured.

use std::fmt;

/// The fabric, a node or a pod: each is one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// The bridge between the nodes and its namespace, which is outside the cluster.
    Fabric,
    /// A node's own namespace. A capture records all its interfaces, and so also traffic between
    /// pods of this node.
    Node(String),
    /// A pod. A capture records its eth0.
    Pod(String),
}

impl Location {
    /// The node of this name.
    pub fn node(name: &str) -> Self {
        Self::Node(name.to_owned())
    }

    /// The pod of this name, `name` or `namespace/name`.
    pub fn pod(name: &str) -> Self {
        Self::Pod(name.to_owned())
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fabric => write!(f, "the fabric"),
            Self::Node(node) => write!(f, "node {node}"),
            Self::Pod(pod) => write!(f, "pod {pod}"),
        }
    }
}
