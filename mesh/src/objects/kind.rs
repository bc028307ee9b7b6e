//! Which kinds the mesh reads, and what it says of the others.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Object;

/// A value that is not what its kind asks for.
pub(super) struct BadField {
    pub(super) field: String,
    pub(super) message: String,
}

/// What a document's `apiVersion` and `kind` mean to the mesh.
pub(super) enum Known {
    /// The mesh reads it.
    Yes(fn(Value) -> Result<Object, BadField>),
    /// A `List`, whose items are documents of their own.
    List,
    /// It restricts traffic, and the mesh does not enforce it.
    NotEnforced,
    /// The mesh has no use for it.
    No,
}

/// Decides by the full `apiVersion`: a Knative `Service` is not a Kubernetes one.
pub(super) fn known(api_version: &str, kind: &str) -> Known {
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

fn typed<T: DeserializeOwned>(value: Value) -> Result<Arc<T>, BadField> {
    serde_path_to_error::deserialize(value)
        .map(Arc::new)
        .map_err(|error| BadField {
            field: match error.path().to_string() {
                // serde_path_to_error's way to say "the whole".
                path if path == "." => String::new(),
                path => path,
            },
            message: error.into_inner().to_string(),
        })
}
