//! A policy object: the raw document, and the parsed policy as a cache.
//!
//! Other kinds are typed, and an object that does not fit its type is left out. A policy that is
//! left out no longer denies. So only the name of a policy must be readable; the policy compiler
//! reads the rest and fails closed field by field. If not even the name can be read, a fail-closed
//! placeholder takes the policy's place (see `objects/deny_placeholder.rs`).

use std::fmt;
use std::sync::{Arc, OnceLock};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use super::envelope::{Context, ParsedPolicy};
use crate::deserialize::deserialize;
use crate::diagnostic::Diagnostic;

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
    /// All kinds.
    pub(crate) const ALL: [Self; 3] = [
        PolicyKind::Authorization,
        PolicyKind::PeerAuthentication,
        PolicyKind::Network,
    ];

    /// `kind` as written in manifests.
    pub const fn as_str(self) -> &'static str {
        match self {
            PolicyKind::Authorization => "AuthorizationPolicy",
            PolicyKind::PeerAuthentication => "PeerAuthentication",
            PolicyKind::Network => "NetworkPolicy",
        }
    }
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
    pub(crate) fn new(kind: PolicyKind, document: Map<String, Value>) -> Self {
        let metadata = document.get("metadata").cloned().unwrap_or_default();
        let (metadata, error) = match deserialize::<ObjectMeta>(metadata) {
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
    pub(crate) fn unnamed(
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
    pub(crate) fn deny_all(
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
