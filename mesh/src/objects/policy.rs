//! Policies, kept as they are written.
//!
//! Other kinds are typed, and one that does not fit its type is left out. A policy that is left out
//! no longer denies. So of a policy only the name must be readable; all else is read by the policy
//! compiler, which knows for each field what to make of it when it cannot be understood.

use std::fmt;
use std::sync::{Arc, OnceLock};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value};

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

    /// Any version of a kind is that kind: one that is not known yet must not go unnoticed.
    pub(super) fn of(api_version: &str, kind: &str) -> Option<Self> {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        match (group, kind) {
            ("security.istio.io", "AuthorizationPolicy") => Some(PolicyKind::Authorization),
            ("security.istio.io", "PeerAuthentication") => Some(PolicyKind::PeerAuthentication),
            ("networking.k8s.io" | "extensions", "NetworkPolicy") => Some(PolicyKind::Network),
            _ => None,
        }
    }
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
    metadata_fault: Option<Box<BadField>>,
    /// What the document means. An object is never changed, so it is worked out once, however many
    /// models it is part of.
    meaning: OnceLock<(Arc<Context>, Arc<ReadPolicy>)>,
}

impl Policy {
    pub(super) fn new(kind: PolicyKind, document: Map<String, Value>) -> Self {
        let metadata = document.get("metadata").cloned().unwrap_or_default();
        let (metadata, fault) = match super::kind::read::<ObjectMeta>(metadata) {
            Ok(metadata) => (metadata, None),
            Err(bad) => (name_of(&document), Some(Box::new(bad))),
        };
        Self {
            kind,
            metadata,
            document,
            metadata_fault: fault,
            meaning: OnceLock::new(),
        }
    }

    /// The field of `metadata` that is not what it should be, and why.
    pub(crate) fn metadata_fault(&self) -> Option<(&str, &str)> {
        self.metadata_fault
            .as_ref()
            .map(|bad| (&*bad.field, &*bad.message))
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
        self.kind == other.kind && self.document == other.document
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
