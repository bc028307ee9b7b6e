//! Which kinds of objects the mesh reads, which it ignores, and which it ignores with a warning.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::policy::group;
use super::{Object, PolicyKind};
use crate::diagnostic::Diagnostic;

/// What a document's `apiVersion` and `kind` mean to the mesh.
pub(super) enum Support {
    /// The mesh reads it with this function.
    Typed(fn(Value) -> Result<Object, Box<Diagnostic>>),
    /// The mesh reads it, whatever its content.
    Policy(PolicyKind),
    /// A `List`, whose items are documents of their own. Items of a list of policies may omit
    /// `apiVersion` and `kind`.
    List(Option<PolicyKind>),
    /// `apiVersion` or `kind` is missing.
    Missing,
    /// It restricts traffic, and the mesh does not enforce it.
    NotEnforced,
    /// The mesh does not use it.
    Unused,
}

/// Decides by the full `apiVersion`: a Knative `Service` is not a Kubernetes one. Policies are
/// recognised leniently: a policy that is overlooked no longer denies.
pub(super) fn support(api_version: &str, kind: &str, document: &Value) -> Support {
    if kind.eq_ignore_ascii_case("List") {
        return Support::List(None);
    }
    if let Some(item) = item_of_list(kind)
        && let Some(kind) = PolicyKind::of(api_version, item)
    {
        return Support::List(Some(kind));
    }
    let policy = PolicyKind::of(api_version, kind);
    if let Some(kind) = policy.or_else(|| PolicyKind::by_group(api_version, kind, document)) {
        return Support::Policy(kind);
    }
    match (api_version, kind) {
        ("", _) | (_, "") => Support::Missing,
        ("v1", "Namespace") => Support::Typed(|v| typed(v).map(Object::Namespace)),
        ("v1", "Node") => Support::Typed(|v| typed(v).map(Object::Node)),
        ("v1", "Pod") => Support::Typed(|v| typed(v).map(Object::Pod)),
        ("v1", "Service") => Support::Typed(|v| typed(v).map(Object::Service)),
        ("v1", "ServiceAccount") => Support::Typed(|v| typed(v).map(Object::ServiceAccount)),
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            Support::Typed(|v| typed(v).map(Object::EndpointSlice))
        }
        _ if restricts_traffic(api_version, kind) => Support::NotEnforced,
        _ => Support::Unused,
    }
}

/// The kind of the items of a list: `AuthorizationPolicy` for `AuthorizationPolicyList`.
pub(super) fn item_of_list(kind: &str) -> Option<&str> {
    let (item, list) = kind.split_at_checked(kind.len().checked_sub("List".len())?)?;
    list.eq_ignore_ascii_case("List").then_some(item)
}

/// Kinds that users rely on for protection, so ignoring them needs a warning.
fn restricts_traffic(api_version: &str, kind: &str) -> bool {
    let group = group(api_version);
    group == "security.istio.io"
        || group == "policy.linkerd.io"
        || kind.ends_with("NetworkPolicy")
        || kind == "NetworkAuthentication"
        || kind == "MeshTLSAuthentication"
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<Arc<T>, Box<Diagnostic>> {
    read(value).map(Arc::new)
}

/// Deserializes a value; the error names the field that has another type.
pub(super) fn read<T: DeserializeOwned>(value: Value) -> Result<T, Box<Diagnostic>> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        // serde_path_to_error writes "." for the whole value.
        let field = if path == "." { String::new() } else { path };
        Box::new(Diagnostic::new(
            field,
            "bad_field",
            error.into_inner().to_string(),
        ))
    })
}
