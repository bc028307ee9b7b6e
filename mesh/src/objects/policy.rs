//! Policies, kept as they are written.
//!
//! Other kinds are typed, and one that does not fit its type is left out. A policy that is left out
//! no longer denies. So of a policy only the name must be readable; all else is read by the policy
//! compiler, which knows for each field what to make of it when it cannot be understood.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value};

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
}

/// A policy as it is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Which kind it is.
    pub kind: PolicyKind,
    /// `metadata` as far as it can be read: name and namespace always, the rest only if all of it
    /// is what it should be.
    pub metadata: ObjectMeta,
    /// The whole document, with `apiVersion`, `kind`, `metadata` and `spec`.
    pub document: Map<String, Value>,
}
