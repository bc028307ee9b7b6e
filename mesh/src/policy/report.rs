//! What became of each policy.

use serde::Serialize;

use crate::model::WorkloadUid;
use crate::problem::ObjectRef;

/// One policy as the mesh took it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PolicyReport {
    /// Kind, namespace and name.
    #[serde(flatten)]
    pub object: ObjectRef,
    /// Whether it is in force.
    pub state: PolicyState,
    /// What is wrong with it or is to be known of it, in the order of its fields.
    pub messages: Vec<PolicyMessage>,
    /// The workloads it holds for, sorted.
    pub selects: Vec<WorkloadUid>,
    /// It is on trial: counted and logged, not enforced.
    pub dry_run: bool,
    /// `ALLOW` or `DENY` for an AuthorizationPolicy (or what it says instead), the mode for a
    /// PeerAuthentication, `ALLOW` for a NetworkPolicy.
    pub action: Box<str>,
    /// How far it reaches.
    pub scope: PolicyScope,
}

/// Whether a policy is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyState {
    /// As it is written, but for what the messages say.
    Accepted,
    /// Part of it could not be understood, so it denies more than it says.
    Invalid,
    /// It belongs elsewhere (a waypoint's targetRefs) or is not supported here.
    NotEnforcedHere,
}

/// Something to be said of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct PolicyMessage {
    /// Path of the field, for example `spec.rules[0].from[0].source.ipBlocks[0]`; empty for the whole.
    pub field: String,
    /// Stable code, snake case.
    pub code: &'static str,
    /// One sentence for the author.
    pub message: String,
}

/// How far a policy reaches; Istio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum PolicyScope {
    /// All workloads: it is in the root namespace and selects none by label.
    Global,
    /// All workloads of its namespace.
    Namespace,
    /// Those its selector selects.
    WorkloadSelector,
}
