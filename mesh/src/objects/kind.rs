//! Which kinds of objects the mesh reads, which it ignores, and which it ignores with a warning.

use std::sync::Arc;

use mesh_kubernetes::FromJson;
use serde_json::Value;

use super::{Object, PolicyKind};
use crate::deserialize::deserialize;
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
        && let Some(kind) = policy_kind(api_version, item)
    {
        return Support::List(Some(kind));
    }
    let policy = policy_kind(api_version, kind);
    if let Some(kind) = policy.or_else(|| policy_kind_by_group(api_version, kind, document)) {
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

fn typed<T: FromJson>(value: Value) -> Result<Arc<T>, Box<Diagnostic>> {
    deserialize(value).map(Arc::new)
}

/// The kind by its name, in any letter case, unless the group belongs to another product. An
/// unknown version or group may be a typing error, so the document still counts as a policy.
pub(super) fn policy_kind(api_version: &str, kind: &str) -> Option<PolicyKind> {
    let named = |known: &PolicyKind| known.as_str().eq_ignore_ascii_case(kind);
    let found = PolicyKind::ALL.into_iter().find(named)?;
    (!is_of_another_product(&group(api_version))).then_some(found)
}

/// The kind by its group, for a document whose kind does not exist in its group: in a group of
/// policies it can only be a misspelt policy.
fn policy_kind_by_group(api_version: &str, kind: &str, document: &Value) -> Option<PolicyKind> {
    let spec = document.get("spec");
    let has = |key| spec.is_some_and(|spec| spec.get(key).is_some());
    match &*group(api_version) {
        "security.istio.io" if is_request_authentication(kind) => None,
        "security.istio.io" if has("mtls") || has("portLevelMtls") => {
            Some(PolicyKind::PeerAuthentication)
        }
        "security.istio.io" => Some(PolicyKind::Authorization),
        "networking.k8s.io" if has("podSelector") => Some(PolicyKind::Network),
        _ => None,
    }
}

/// Products with a kind of the same name in their own group, or in a subgroup. They enforce it
/// themselves.
const OTHER_PRODUCTS: [&str; 6] = [
    "linkerd.io",
    "projectcalico.org",
    "cilium.io",
    "antrea.io",
    "antrea.tanzu.vmware.com",
    "juniper.net",
];

fn is_of_another_product(group: &str) -> bool {
    OTHER_PRODUCTS.into_iter().any(|product| {
        group
            .strip_suffix(product)
            .is_some_and(|below| below.is_empty() || below.ends_with('.'))
    })
}

/// The group of an `apiVersion`, whose version may be missing.
fn group(api_version: &str) -> String {
    let group = match api_version.split_once('/') {
        Some((group, _)) => group,
        None if api_version.contains('.') => api_version,
        None => "",
    };
    group.trim().to_ascii_lowercase()
}

/// Applies to requests, not to connections: the one other kind of Istio's group.
fn is_request_authentication(kind: &str) -> bool {
    let kind = item_of_list(kind).unwrap_or(kind);
    kind.eq_ignore_ascii_case("RequestAuthentication")
}
