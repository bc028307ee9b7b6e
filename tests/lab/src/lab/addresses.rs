//! The addresses of pods, services and nodes.

use std::net::IpAddr;

use anyhow::{Context, Result};

use super::Lab;
use crate::options::IpFamily;

impl Lab {
    /// The pod's address of this family.
    ///
    /// # Errors
    /// There is no such pod, or it has no address of this family.
    pub fn pod_ip(&self, pod: &str, family: IpFamily) -> Result<IpAddr> {
        let status = self.status()?;
        status
            .pod(pod)?
            .ip(family)
            .with_context(|| format!("pod {pod} has no {family:?} address"))
    }

    /// The ClusterIP of this family of a service, `name` or `namespace/name`.
    ///
    /// # Errors
    /// There is no such service, or it has no ClusterIP of this family.
    pub fn service_ip(&self, service: &str, family: IpFamily) -> Result<IpAddr> {
        let (namespace, name) = service.split_once('/').unwrap_or(("", service));
        let status = self.status()?;
        let mut found = status
            .services
            .iter()
            .filter(|s| s.name == name && (namespace.is_empty() || s.namespace == namespace));
        let found = found
            .next()
            .with_context(|| format!("no service {service}"))?;
        let ip = found
            .cluster_ips
            .iter()
            .copied()
            .find(|ip| family.contains(*ip));
        ip.with_context(|| format!("service {service} has no {family:?} ClusterIP"))
    }

    /// The node's own address of this family.
    ///
    /// # Errors
    /// There is no such node.
    pub fn node_ip(&self, node: &str, family: IpFamily) -> Result<IpAddr> {
        let status = self.status()?;
        let ip = status
            .node(node)?
            .addresses
            .iter()
            .copied()
            .find(|ip| family.contains(*ip));
        ip.with_context(|| format!("node {node} has no {family:?} address"))
    }
}
