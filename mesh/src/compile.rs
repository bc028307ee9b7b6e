//! From objects to the model: pure functions, no I/O, no clock.

use std::collections::BTreeSet;
use std::sync::Arc;

use spiffe::TrustDomain;

use crate::model::Model;
use crate::objects::Objects;
use crate::problem::Problem;

/// What the mesh is told about itself rather than finds in objects.
#[derive(Clone, Debug)]
pub struct Params {
    /// Cluster id; first part of every workload uid. Istio's default is `Kubernetes`.
    pub cluster: Arc<str>,
    /// Trust domain of every identity of this cluster.
    pub trust_domain: TrustDomain,
    /// DNS suffix of services.
    pub cluster_domain: Arc<str>,
    /// Namespaces whose pods are never meshed.
    pub excluded_namespaces: BTreeSet<String>,
}

/// Makes the model of these objects and says what is wrong with them.
pub fn compile(objects: &Objects, params: &Params) -> (Model, Vec<Problem>) {
    let _ = (objects, params);
    (Model::default(), Vec::new())
}
