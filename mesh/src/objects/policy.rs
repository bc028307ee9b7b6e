//! Policies as raw documents.
//!
//! Other kinds are typed, and an object that does not fit its type is left out. A policy that is
//! left out no longer denies. So only the name of a policy must be readable; the policy compiler
//! reads the rest and fails closed field by field. If not even the name can be read, a fail-closed
//! placeholder takes the policy's place (see [`super::placeholder`]).

use std::fmt;
use std::sync::{Arc, OnceLock};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use crate::diagnostic::Diagnostic;
use crate::policy::{Context, ParsedPolicy};

/// The kinds of policies that the mesh enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// security.istio.io AuthorizationPolicy.
    Authorization,
    /// security.istio.io PeerAuthentication.
    PeerAuthentication,
    /// networking.k8s.io NetworkPolicy.
    Network,
}

impl PolicyKind {
    /// `kind` as written in manifests.
    pub const fn as_str(self) -> &'static str {
        match self {
            PolicyKind::Authorization => "AuthorizationPolicy",
            PolicyKind::PeerAuthentication => "PeerAuthentication",
            PolicyKind::Network => "NetworkPolicy",
        }
    }

    /// The kind by its name, in any letter case, unless the group belongs to another product. An
    /// unknown version or group may be a typing error, so the document still counts as a policy.
    pub(super) fn of(api_version: &str, kind: &str) -> Option<Self> {
        let named = |known: &Self| known.as_str().eq_ignore_ascii_case(kind);
        let found = ALL.into_iter().find(named)?;
        (!is_of_another_product(&group(api_version))).then_some(found)
    }

    /// The kind by its group, for a document whose kind does not exist in its group: in a group of
    /// policies it can only be a misspelt policy.
    pub(super) fn by_group(api_version: &str, kind: &str, document: &Value) -> Option<Self> {
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
}

/// All kinds.
const ALL: [PolicyKind; 3] = [
    PolicyKind::Authorization,
    PolicyKind::PeerAuthentication,
    PolicyKind::Network,
];

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
pub(super) fn group(api_version: &str) -> String {
    let group = match api_version.split_once('/') {
        Some((group, _)) => group,
        None if api_version.contains('.') => api_version,
        None => "",
    };
    group.trim().to_ascii_lowercase()
}

/// Applies to requests, not to connections: the one other kind of Istio's group.
fn is_request_authentication(kind: &str) -> bool {
    let kind = super::kind::item_of_list(kind).unwrap_or(kind);
    kind.eq_ignore_ascii_case("RequestAuthentication")
}

/// A policy as a raw document.
#[derive(Clone)]
pub struct Policy {
    /// Its kind.
    pub kind: PolicyKind,
    /// Name and namespace always; the rest of `metadata` only if all of it is valid.
    pub metadata: ObjectMeta,
    /// The whole document, with `apiVersion`, `kind`, `metadata` and `spec`.
    pub document: Map<String, Value>,
    /// Errors outside of the spec.
    diagnostics: Vec<Diagnostic>,
    is_placeholder: bool,
    /// The parsed policy. The document never changes, so it is parsed once for all models.
    parsed: OnceLock<(Arc<Context>, Arc<ParsedPolicy>)>,
}

impl Policy {
    /// A policy whose name and namespace can be read.
    pub(super) fn new(kind: PolicyKind, document: Map<String, Value>) -> Self {
        let metadata = document.get("metadata").cloned().unwrap_or_default();
        let (metadata, error) = match super::kind::read::<ObjectMeta>(metadata) {
            Ok(metadata) => (metadata, None),
            Err(error) => (name_of(&document), Some(*error)),
        };
        let in_metadata = |mut error: Diagnostic| {
            error.field = match &*error.field {
                "" => "metadata".to_owned(),
                field => format!("metadata.{field}"),
            };
            error
        };
        Self {
            kind,
            metadata,
            document,
            diagnostics: error.map(in_metadata).into_iter().collect(),
            is_placeholder: false,
            parsed: OnceLock::new(),
        }
    }

    /// A placeholder for a policy without a usable name. The rest of the document applies.
    pub(super) fn unnamed(
        kind: PolicyKind,
        document: Map<String, Value>,
        name: String,
        reason: &Diagnostic,
    ) -> Self {
        let mut policy = Self::new(kind, document);
        // The invalid name is reported already, or is why the metadata cannot be read.
        policy.diagnostics.clear();
        policy.metadata.name = Some(name);
        policy.into_placeholder(
            reason,
            "denies what the policy selects, as an invalid policy does",
        )
    }

    /// A placeholder for a policy whose selector cannot be read: it denies a whole namespace.
    pub(super) fn deny_all(
        kind: PolicyKind,
        namespace: &str,
        name: &str,
        reason: &Diagnostic,
    ) -> Self {
        let (group, spec) = match kind {
            PolicyKind::Authorization => (
                "security.istio.io/v1",
                json!({ "action": "DENY", "rules": [{}] }),
            ),
            PolicyKind::PeerAuthentication => (
                "security.istio.io/v1",
                json!({ "mtls": { "mode": "STRICT" } }),
            ),
            PolicyKind::Network => (
                "networking.k8s.io/v1",
                json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
            ),
        };
        let document = [
            ("apiVersion", group.into()),
            ("kind", kind.as_str().into()),
            ("metadata", json!({ "name": name, "namespace": namespace })),
            ("spec", spec),
        ];
        let document = document.map(|(key, value)| (key.to_owned(), value));
        let what = match kind {
            PolicyKind::PeerAuthentication => "plaintext to",
            _ => "everything to",
        };
        let effect = format!("denies {what} namespace {namespace}");
        Self::new(kind, document.into_iter().collect()).into_placeholder(reason, &effect)
    }

    fn into_placeholder(mut self, reason: &Diagnostic, effect: &str) -> Self {
        let why = &reason.message;
        self.is_placeholder = true;
        self.diagnostics.push(Diagnostic::new(
            reason.field.clone(),
            "policy_stand_in",
            format!("{why}; until this is fixed, a fail-closed placeholder {effect}"),
        ));
        self
    }

    /// It is a fail-closed placeholder, not a version of the policy.
    pub(crate) fn is_placeholder(&self) -> bool {
        self.is_placeholder
    }

    /// Errors outside of the spec.
    pub(crate) fn diagnostics(&self) -> &[Diagnostic] {
        &self.diagnostics
    }

    /// The policy parsed in this context; cached for the first context.
    pub(crate) fn read(&self, context: &Arc<Context>) -> Arc<ParsedPolicy> {
        let read = || (context.clone(), Arc::new(ParsedPolicy::new(self, context)));
        let (known, parsed) = self.parsed.get_or_init(read);
        match known == context {
            true => parsed.clone(),
            false => read().1,
        }
    }
}

fn name_of(document: &Map<String, Value>) -> ObjectMeta {
    let text = |key: &str| {
        let value = document.get("metadata")?.get(key)?;
        value.as_str().map(str::to_owned)
    };
    ObjectMeta {
        name: text("name"),
        namespace: text("namespace"),
        ..ObjectMeta::default()
    }
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.metadata.name == other.metadata.name
            && self.document == other.document
            && self.diagnostics == other.diagnostics
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("kind", &self.kind)
            .field("document", &self.document)
            .finish_non_exhaustive()
    }
}
