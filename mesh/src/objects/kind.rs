//! Which kinds the mesh reads, and what it says of the others.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Object, Policy, PolicyKind};

/// A value that is not what its kind asks for.
#[derive(Clone)]
pub(super) struct BadField {
    pub(super) field: String,
    pub(super) message: String,
}

/// What a document's `apiVersion` and `kind` mean to the mesh.
pub(super) enum Known {
    /// The mesh reads it.
    Yes(fn(Value) -> Result<Object, BadField>),
    /// The mesh reads it, whatever is in it.
    Policy(PolicyKind),
    /// A `List`, whose items are documents of their own.
    List,
    /// It restricts traffic, and the mesh does not enforce it.
    NotEnforced,
    /// The mesh has no use for it.
    No,
}

/// Decides by the full `apiVersion`: a Knative `Service` is not a Kubernetes one.
pub(super) fn known(api_version: &str, kind: &str) -> Known {
    if let Some(kind) = PolicyKind::of(api_version, kind) {
        return Known::Policy(kind);
    }
    match (api_version, kind) {
        ("v1", "Namespace") => Known::Yes(|v| typed(v).map(Object::Namespace)),
        ("v1", "Node") => Known::Yes(|v| typed(v).map(Object::Node)),
        ("v1", "Pod") => Known::Yes(|v| typed(v).map(Object::Pod)),
        ("v1", "Service") => Known::Yes(|v| typed(v).map(Object::Service)),
        ("v1", "ServiceAccount") => Known::Yes(|v| typed(v).map(Object::ServiceAccount)),
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            Known::Yes(|v| typed(v).map(Object::EndpointSlice))
        }
        ("v1", "List") => Known::List,
        _ if restricts_traffic(api_version, kind) => Known::NotEnforced,
        _ => Known::No,
    }
}

/// Kinds that somebody relies on for protection. Silence about them would be a promise.
fn restricts_traffic(api_version: &str, kind: &str) -> bool {
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    group == "security.istio.io"
        || group == "policy.linkerd.io"
        || kind.ends_with("NetworkPolicy")
        || kind == "NetworkAuthentication"
        || kind == "MeshTLSAuthentication"
}

/// A policy of which at least the name can be read.
pub(super) fn policy(kind: PolicyKind, value: Value) -> Result<Object, BadField> {
    let Value::Object(document) = value else {
        let message = "is no object".to_owned();
        let field = String::new();
        return Err(BadField { field, message });
    };
    for key in ["name", "namespace"] {
        let value = document
            .get("metadata")
            .and_then(|metadata| metadata.get(key));
        if value.is_some_and(|value| !value.is_string() && !value.is_null()) {
            let (field, message) = (format!("metadata.{key}"), "is not a text".to_owned());
            return Err(BadField { field, message });
        }
    }
    Ok(Object::Policy(Arc::new(Policy::new(kind, document))))
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<Arc<T>, BadField> {
    read(value).map(Arc::new)
}

/// A value as a type, or where it is something else.
pub(super) fn read<T: DeserializeOwned>(value: Value) -> Result<T, BadField> {
    serde_path_to_error::deserialize(value).map_err(|error| BadField {
        field: match error.path().to_string() {
            // serde_path_to_error's way to say "the whole".
            path if path == "." => String::new(),
            path => path,
        },
        message: error.into_inner().to_string(),
    })
}
