//! Which kinds the mesh reads, and what it says of the others.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::policy::group;
use super::{Object, PolicyKind};

/// A value that is not what its kind asks for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct BadField {
    pub(super) field: String,
    pub(super) code: &'static str,
    pub(super) message: String,
}

impl BadField {
    /// A document that is no YAML.
    pub(super) fn syntax(message: String) -> Self {
        Self {
            field: String::new(),
            code: "yaml_syntax",
            message,
        }
    }

    /// A field without which nothing can be made of a document.
    pub(super) fn missing(field: &str, message: String) -> Self {
        Self {
            field: field.to_owned(),
            code: "missing_field",
            message,
        }
    }
}

/// What a document's `apiVersion` and `kind` mean to the mesh.
pub(super) enum Known {
    /// The mesh reads it.
    Yes(fn(Value) -> Result<Object, BadField>),
    /// The mesh reads it, whatever is in it.
    Policy(PolicyKind),
    /// A `List`, whose items are documents of their own; those of a list of policies need not say
    /// what they are.
    List(Option<PolicyKind>),
    /// It does not say what it is.
    Nothing,
    /// It restricts traffic, and the mesh does not enforce it.
    NotEnforced,
    /// The mesh has no use for it.
    No,
}

/// Decides by the full `apiVersion`: a Knative `Service` is not a Kubernetes one. Only with
/// policies it is generous: one that goes unnoticed no longer denies.
pub(super) fn known(api_version: &str, kind: &str, document: &Value) -> Known {
    if kind.eq_ignore_ascii_case("List") {
        return Known::List(None);
    }
    if let Some(item) = item_of_list(kind)
        && let Some(kind) = PolicyKind::of(api_version, item)
    {
        return Known::List(Some(kind));
    }
    let policy = PolicyKind::of(api_version, kind);
    if let Some(kind) = policy.or_else(|| PolicyKind::by_group(api_version, kind, document)) {
        return Known::Policy(kind);
    }
    match (api_version, kind) {
        ("", _) | (_, "") => Known::Nothing,
        ("v1", "Namespace") => Known::Yes(|v| typed(v).map(Object::Namespace)),
        ("v1", "Node") => Known::Yes(|v| typed(v).map(Object::Node)),
        ("v1", "Pod") => Known::Yes(|v| typed(v).map(Object::Pod)),
        ("v1", "Service") => Known::Yes(|v| typed(v).map(Object::Service)),
        ("v1", "ServiceAccount") => Known::Yes(|v| typed(v).map(Object::ServiceAccount)),
        ("discovery.k8s.io/v1", "EndpointSlice") => {
            Known::Yes(|v| typed(v).map(Object::EndpointSlice))
        }
        _ if restricts_traffic(api_version, kind) => Known::NotEnforced,
        _ => Known::No,
    }
}

/// `AuthorizationPolicy` for `AuthorizationPolicyList`.
pub(super) fn item_of_list(kind: &str) -> Option<&str> {
    let (item, list) = kind.split_at_checked(kind.len().checked_sub("List".len())?)?;
    list.eq_ignore_ascii_case("List").then_some(item)
}

/// Kinds that somebody relies on for protection. Silence about them would be a promise.
fn restricts_traffic(api_version: &str, kind: &str) -> bool {
    let group = group(api_version);
    group == "security.istio.io"
        || group == "policy.linkerd.io"
        || kind.ends_with("NetworkPolicy")
        || kind == "NetworkAuthentication"
        || kind == "MeshTLSAuthentication"
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
        code: "bad_field",
        message: error.into_inner().to_string(),
    })
}
