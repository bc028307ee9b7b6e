//! Settings of the mesh that come from the command line, not from objects.

use std::collections::BTreeSet;
use std::sync::Arc;

use spiffe::TrustDomain;

/// Settings of the mesh that no object holds.
#[derive(Clone, Debug)]
pub struct Params {
    /// Cluster id; first part of every workload uid. Istio's default is `Kubernetes`.
    pub cluster: Arc<str>,
    /// Trust domain of every identity of this cluster.
    pub trust_domain: TrustDomain,
    /// DNS suffix of services.
    pub cluster_domain: Arc<str>,
    /// Namespaces whose pods are never meshed, regardless of their labels.
    pub excluded_namespaces: BTreeSet<String>,
    /// The namespace whose policies apply to the whole mesh.
    pub root_namespace: Arc<str>,
    /// Former or future names of the trust domain. A policy that names the trust domain or an alias
    /// means all of them.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Whether NetworkPolicies are enforced.
    pub network_policy: bool,
}

impl Params {
    /// Istio's defaults for everything but the trust domain: cluster `Kubernetes`, cluster domain
    /// `cluster.local`, `kube-system` excluded, root namespace `istio-system`, no trust domain alias,
    /// NetworkPolicies enforced.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            cluster: "Kubernetes".into(),
            trust_domain,
            cluster_domain: "cluster.local".into(),
            excluded_namespaces: BTreeSet::from(["kube-system".to_owned()]),
            root_namespace: "istio-system".into(),
            trust_domain_aliases: Vec::new(),
            network_policy: true,
        }
    }
}
