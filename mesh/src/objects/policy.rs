//! Policies, kept as they are written.
//!
//! Other kinds are typed, and one that does not fit its type is left out. A policy that is left out
//! no longer denies. So of a policy only the name must be readable; all else is read by the policy
//! compiler, which knows for each field what to make of it when it cannot be understood. Where not
//! even the name can be read, something stands for the policy that denies.

use std::fmt;
use std::sync::{Arc, OnceLock};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value, json};

use super::kind::BadField;
use crate::policy::{Context, ReadPolicy};

/// Which kind of policy.
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

    /// A document of this kind by its name, in any spelling, unless its group is known to be
    /// somebody else's. A version or group that is not known may be a slip of the pen, and must not
    /// go unnoticed.
    pub(super) fn of(api_version: &str, kind: &str) -> Option<Self> {
        let named = |known: &Self| known.as_str().eq_ignore_ascii_case(kind);
        let found = ALL.into_iter().find(named)?;
        (!is_of_another_product(&group(api_version))).then_some(found)
    }

    /// A document whose kind is none that its group has: in a group of policies it can only be a
    /// policy.
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

/// Those who have a kind of the same name in their own group, or in groups below it. It is another
/// kind, that is theirs to enforce.
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

/// The group of an `apiVersion`, of which the version may have been forgotten.
pub(super) fn group(api_version: &str) -> String {
    let group = match api_version.split_once('/') {
        Some((group, _)) => group,
        None if api_version.contains('.') => api_version,
        None => "",
    };
    group.trim().to_ascii_lowercase()
}

/// Of requests, not of connections: the one other kind of Istio's group.
fn is_request_authentication(kind: &str) -> bool {
    let kind = super::kind::item_of_list(kind).unwrap_or(kind);
    kind.eq_ignore_ascii_case("RequestAuthentication")
}

/// A policy as it is written.
#[derive(Clone)]
pub struct Policy {
    /// Which kind it is.
    pub kind: PolicyKind,
    /// `metadata` as far as it can be read: name and namespace always, the rest only if all of it
    /// is what it should be.
    pub metadata: ObjectMeta,
    /// The whole document, with `apiVersion`, `kind`, `metadata` and `spec`.
    pub document: Map<String, Value>,
    faults: Vec<BadField>,
    is_stand_in: bool,
    /// What the document means. An object is never changed, so it is worked out once, however many
    /// models it is part of.
    meaning: OnceLock<(Arc<Context>, Arc<ReadPolicy>)>,
}

impl Policy {
    /// A policy whose name and namespace can be read.
    pub(super) fn new(kind: PolicyKind, document: Map<String, Value>) -> Self {
        let metadata = document.get("metadata").cloned().unwrap_or_default();
        let (metadata, fault) = match super::kind::read::<ObjectMeta>(metadata) {
            Ok(metadata) => (metadata, None),
            Err(bad) => (name_of(&document), Some(bad)),
        };
        let in_metadata = |mut bad: BadField| {
            bad.field = match &*bad.field {
                "" => "metadata".to_owned(),
                field => format!("metadata.{field}"),
            };
            bad
        };
        Self {
            kind,
            metadata,
            document,
            faults: fault.map(in_metadata).into_iter().collect(),
            is_stand_in: false,
            meaning: OnceLock::new(),
        }
    }

    /// What stands for a policy that has no name one could call it by. All else of it holds.
    pub(super) fn unnamed(
        kind: PolicyKind,
        document: Map<String, Value>,
        name: String,
        reason: &BadField,
    ) -> Self {
        let mut policy = Self::new(kind, document);
        // Its own is as unfit, or the reason why the metadata cannot be read.
        policy.faults.clear();
        policy.metadata.name = Some(name);
        policy.stands_for(reason, "denies what it selects as one with a mistake does")
    }

    /// What stands for a policy of which it cannot be read what it selects: it denies all of a
    /// namespace.
    pub(super) fn deny_all(
        kind: PolicyKind,
        namespace: &str,
        name: &str,
        reason: &BadField,
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
        Self::new(kind, document.into_iter().collect()).stands_for(reason, &effect)
    }

    fn stands_for(mut self, reason: &BadField, effect: &str) -> Self {
        let why = &reason.message;
        self.is_stand_in = true;
        self.faults.push(BadField {
            field: reason.field.clone(),
            code: "policy_stand_in",
            message: format!(
                "{why}; until that is mended, this stands for the policy and {effect}"
            ),
        });
        self
    }

    /// It stands for one that cannot be read, and is no version of it.
    pub(crate) fn is_stand_in(&self) -> bool {
        self.is_stand_in
    }

    /// What of it is not what it should be, beside its spec: field, reason code and why.
    pub(crate) fn faults(&self) -> impl Iterator<Item = (&str, &'static str, &str)> {
        self.faults
            .iter()
            .map(|bad| (&*bad.field, bad.code, &*bad.message))
    }

    /// What it means in this context.
    pub(crate) fn read(&self, context: &Arc<Context>) -> Arc<ReadPolicy> {
        let read = || (context.clone(), Arc::new(ReadPolicy::new(self, context)));
        let (known, meaning) = self.meaning.get_or_init(read);
        match known == context {
            true => meaning.clone(),
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
            && self.faults == other.faults
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
