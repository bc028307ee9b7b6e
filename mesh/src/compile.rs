//! From objects to the model: pure functions, no I/O, no clock.
//!
//! There are two steps. Each object is first read by itself ([`read`]): that yields facts and
//! faults that depend on nothing else, which is why a source can use the same step to decide
//! whether a new version of an object may replace the last good one. Then the facts are put
//! together: who owns which address, which pods stand behind which service.

mod addresses;
mod endpoints;
mod external;
mod fault;
mod join;
mod policies;
mod read;

use std::collections::BTreeSet;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use spiffe::TrustDomain;

use crate::diagnostic::{Diagnostic, ObjectRef};
use crate::model::Model;
use crate::objects::{Object, Objects, Origin};

pub(crate) use fault::{Fault, Faults};
pub(crate) use read::names;

/// What the mesh is told about itself rather than finds in objects.
#[derive(Clone, Debug)]
pub struct Params {
    /// Cluster id; first part of every workload uid. Istio's default is `Kubernetes`.
    pub cluster: Arc<str>,
    /// Trust domain of every identity of this cluster.
    pub trust_domain: TrustDomain,
    /// DNS suffix of services.
    pub cluster_domain: Arc<str>,
    /// Namespaces whose pods are never meshed, whatever their labels say.
    pub excluded_namespaces: BTreeSet<String>,
    /// The namespace whose policies hold for the whole mesh.
    pub root_namespace: Arc<str>,
    /// Former names of the trust domain, or names it will have: a policy that speaks of one of them
    /// or of the trust domain itself means them all.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Whether NetworkPolicies are enforced.
    pub network_policy: bool,
}

impl Params {
    /// Istio's defaults for everything but the trust domain: cluster `Kubernetes`, cluster domain
    /// `cluster.local`, `kube-system` excluded, root namespace `istio-system`, no other trust domain;
    /// and NetworkPolicies are enforced.
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

/// Makes the model of these objects and says what is wrong with them. The diagnostics are sorted, and
/// hold those that were found while reading ([`Objects::report`]).
pub fn compile(objects: &Objects, params: &Params) -> (Model, Vec<Diagnostic>) {
    let mut diagnostics: Vec<Diagnostic> = objects.diagnostics().collect();
    let facts = read::all(objects, params, &mut diagnostics);
    let (model, cross) = join::join(facts);
    diagnostics.extend(cross);
    diagnostics.sort();
    diagnostics.dedup();
    (model, diagnostics)
}

/// What is wrong with an object in itself, whatever else there is.
pub(crate) fn faults(object: &Object, params: &Params) -> Vec<Fault> {
    let mut faults = read::one(object, params);
    faults.retain(|fault| !fault.is_note());
    faults
}

/// Something read from an object, with where it was written.
#[derive(Clone, Debug)]
struct Fact<T> {
    value: T,
    reference: ObjectRef,
    origin: Origin,
}

impl<T> Fact<T> {
    fn diagnostic(
        &self,
        field: impl Into<String>,
        code: &'static str,
        message: String,
    ) -> Diagnostic {
        Diagnostic {
            file: self.origin.file.clone(),
            document: self.origin.document,
            object: Some(self.reference.clone()),
            field: field.into(),
            code,
            message,
        }
    }
}

/// A hash map that is quick for short keys.
type Map<K, V> = FxHashMap<K, V>;

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
