//! Typed Kubernetes objects, each with the file and document it came from.
//!
//! [`parse`] reads a file of YAML (or JSON) documents. It reports errors document by document, so
//! that one error affects one object and not the file.

mod deny_placeholder;
mod kind;
mod parse;

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use crate::policy::{Policy, PolicyKind};
pub use parse::{Parsed, parse};

pub use crate::diagnostic::Origin;

use crate::diagnostic::Diagnostic;
use crate::id::ObjectRef;
use crate::names::namespace_of;

/// One object of a kind that the mesh reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// v1 Namespace.
    Namespace(Arc<core::Namespace>),
    /// v1 Node.
    Node(Arc<core::Node>),
    /// v1 Pod.
    Pod(Arc<core::Pod>),
    /// v1 Service.
    Service(Arc<core::Service>),
    /// v1 ServiceAccount.
    ServiceAccount(Arc<core::ServiceAccount>),
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice(Arc<discovery::EndpointSlice>),
    /// A policy of any kind.
    Policy(Arc<Policy>),
}

impl Object {
    /// `kind` as written in manifests.
    pub fn kind(&self) -> &'static str {
        match self {
            Object::Namespace(_) => "Namespace",
            Object::Node(_) => "Node",
            Object::Pod(_) => "Pod",
            Object::Service(_) => "Service",
            Object::ServiceAccount(_) => "ServiceAccount",
            Object::EndpointSlice(_) => "EndpointSlice",
            Object::Policy(o) => o.kind.as_str(),
        }
    }

    /// `metadata`.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Object::Namespace(o) => &o.metadata,
            Object::Node(o) => &o.metadata,
            Object::Pod(o) => &o.metadata,
            Object::Service(o) => &o.metadata,
            Object::ServiceAccount(o) => &o.metadata,
            Object::EndpointSlice(o) => &o.metadata,
            Object::Policy(o) => &o.metadata,
        }
    }

    /// Kind, namespace and name. A namespaced object without a namespace is in `default`, as for
    /// kubectl.
    pub fn reference(&self) -> ObjectRef {
        let meta = self.metadata();
        let cluster_scoped = matches!(self, Object::Namespace(_) | Object::Node(_));
        ObjectRef {
            kind: self.kind().into(),
            namespace: if cluster_scoped {
                "".into()
            } else {
                namespace_of(meta).into()
            },
            name: meta.name.as_deref().unwrap_or_default().into(),
        }
    }
}

/// An object and where it is written.
#[derive(Clone, Debug)]
pub struct Sourced<T> {
    /// The object.
    pub object: Arc<T>,
    /// Where it is written.
    pub origin: Origin,
}

/// Objects of one kind by (namespace, name); ordered, so that everything derived is deterministic.
pub(crate) type Kind<T> = BTreeMap<(String, String), Sourced<T>>;

/// The objects of a source, each once.
///
/// An object that is written twice is taken from its first origin (by file name, then document), so
/// that the result does not depend on the order of reading; the other origins are reported.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    pub(crate) namespaces: Kind<core::Namespace>,
    pub(crate) nodes: Kind<core::Node>,
    pub(crate) pods: Kind<core::Pod>,
    pub(crate) services: Kind<core::Service>,
    pub(crate) service_accounts: Kind<core::ServiceAccount>,
    pub(crate) slices: Kind<discovery::EndpointSlice>,
    pub(crate) authorization_policies: Kind<Policy>,
    pub(crate) peer_authentications: Kind<Policy>,
    pub(crate) network_policies: Kind<Policy>,
    duplicates: Vec<(ObjectRef, Origin)>,
    diagnostics: Vec<Diagnostic>,
}

impl Objects {
    /// Adds an object.
    pub fn insert(&mut self, object: Object, origin: Origin) {
        let reference = object.reference();
        let loser = match object {
            Object::Namespace(o) => keep_first(&mut self.namespaces, &reference, o, origin),
            Object::Node(o) => keep_first(&mut self.nodes, &reference, o, origin),
            Object::Pod(o) => keep_first(&mut self.pods, &reference, o, origin),
            Object::Service(o) => keep_first(&mut self.services, &reference, o, origin),
            Object::ServiceAccount(o) => {
                keep_first(&mut self.service_accounts, &reference, o, origin)
            }
            Object::EndpointSlice(o) => keep_first(&mut self.slices, &reference, o, origin),
            Object::Policy(o) => keep_first(self.policies_mut(o.kind), &reference, o, origin),
        };
        self.duplicates
            .extend(loser.map(|origin| (reference, origin)));
    }

    /// Adds a diagnostic of the reader; `compile` returns it with its own.
    pub fn report(&mut self, diagnostic: Diagnostic) {
        self.diagnostics.push(diagnostic);
    }

    /// Number of objects, without duplicates.
    pub fn len(&self) -> usize {
        self.namespaces.len()
            + self.nodes.len()
            + self.pods.len()
            + self.services.len()
            + self.service_accounts.len()
            + self.slices.len()
            + self.authorization_policies.len()
            + self.peer_authentications.len()
            + self.network_policies.len()
    }

    fn policies_mut(&mut self, kind: PolicyKind) -> &mut Kind<Policy> {
        match kind {
            PolicyKind::Authorization => &mut self.authorization_policies,
            PolicyKind::PeerAuthentication => &mut self.peer_authentications,
            PolicyKind::Network => &mut self.network_policies,
        }
    }

    /// Whether there is no object.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Diagnostics of the reader, and one for each duplicate.
    pub(crate) fn diagnostics(&self) -> impl Iterator<Item = Diagnostic> + '_ {
        self.diagnostics
            .iter()
            .cloned()
            .chain(self.duplicates.iter().map(|(object, origin)| {
                let message =
                    "is written in another place too; the first by file name and document counts";
                Diagnostic::new("", "duplicate_object", message).at(object.clone(), origin)
            }))
    }
}

/// Inserts an object unless an earlier origin holds it; returns the origin that is dropped.
fn keep_first<T>(
    kind: &mut Kind<T>,
    reference: &ObjectRef,
    object: Arc<T>,
    origin: Origin,
) -> Option<Origin> {
    let key = (reference.namespace.to_string(), reference.name.to_string());
    let new = Sourced { object, origin };
    match kind.get_mut(&key) {
        None => {
            kind.insert(key, new);
            None
        }
        Some(old) if new.origin < old.origin => Some(std::mem::replace(old, new).origin),
        Some(_) => Some(new.origin),
    }
}

#[cfg(test)]
mod tests;
