//! What became of each policy.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::dump::PolicyRules;
use super::read::{Body, ReadPolicy};
use crate::diagnostic::{Diagnostic, Origin};
use crate::id::ObjectRef;
use crate::id::WorkloadUid;

/// One policy as the mesh took it. Serialized in the peer's shape (`name`, `namespace`, `scope`,
/// `action`, `rules`, `dryRun`) with what is ours beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyReport {
    /// Kind, namespace and name.
    #[serde(flatten)]
    pub object: ObjectRef,
    /// Whether it is in force.
    pub state: PolicyState,
    /// What is wrong with it or is to be known of it.
    #[serde(serialize_with = "without_object")]
    pub messages: Vec<Diagnostic>,
    /// The workloads of the mesh that it holds for, sorted. Policies that hold for the same share
    /// the list.
    pub selects: Arc<[WorkloadUid]>,
    /// It is on trial: counted and logged, not enforced.
    pub dry_run: bool,
    /// What it does: `Allow`, `Deny`, `Custom` or `Audit`; the mode for a PeerAuthentication. An
    /// AuthorizationPolicy whose action is unknown does `Deny`, a PeerAuthentication with a fault
    /// is `Strict`.
    pub action: &'static str,
    /// How far it reaches.
    pub scope: PolicyScope,
    /// The rules of an AuthorizationPolicy as they are asked.
    pub rules: PolicyRules,
}

/// Whether a policy is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyState {
    /// As it is written, but for what the messages say.
    Accepted,
    /// Part of it could not be understood. It denies more than it says, or the last good version is
    /// in force; the messages say which.
    Invalid,
    /// It belongs elsewhere (a waypoint's targetRefs) or is not supported here.
    NotEnforcedHere,
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

/// The workloads that policies hold for, by what selects them.
pub(crate) trait Selects {
    /// All of the mesh.
    fn all(&self) -> Arc<[WorkloadUid]>;
    /// All of a namespace.
    fn of_namespace(&self, namespace: &str) -> Arc<[WorkloadUid]>;
    /// Those that the selector of this policy selects.
    fn of_selector(&self, policy: usize) -> Arc<[WorkloadUid]>;
}

impl ReadPolicy {
    /// `diagnostics` are what the source found in a version of the policy that it did not let replace
    /// the last good one, which this is.
    pub(crate) fn report(
        &self,
        object: ObjectRef,
        index: usize,
        selects: &impl Selects,
        diagnostics: &[&Diagnostic],
        network_policy: bool,
    ) -> PolicyReport {
        let enforced = self.is_enforced(network_policy);
        let rejected = diagnostics.iter().any(|p| p.code != "duplicate_object");
        let (action, dry_run, rules) = match &self.body {
            Body::Authorization(policy) => (
                policy.action.as_str(),
                policy.dry_run,
                PolicyRules::of(policy),
            ),
            Body::Peer(policy) => (policy.mode.as_str(), false, PolicyRules::default()),
            Body::Network(_) => ("Allow", false, PolicyRules::default()),
        };
        PolicyReport {
            object,
            state: match (rejected || self.is_invalid(), enforced) {
                (_, false) if !rejected => PolicyState::NotEnforcedHere,
                (true, _) => PolicyState::Invalid,
                (false, _) => PolicyState::Accepted,
            },
            messages: self.messages(diagnostics, network_policy),
            selects: match (enforced, self.reach.scope) {
                (false, _) => Arc::default(),
                (true, PolicyScope::Global) => selects.all(),
                (true, PolicyScope::Namespace) => selects.of_namespace(&self.reach.namespace),
                (true, PolicyScope::WorkloadSelector) => selects.of_selector(index),
            },
            dry_run,
            action,
            scope: self.reach.scope,
            rules,
        }
    }

    /// The messages of the report, without object and origin: a policy that moves within its file
    /// keeps its report.
    fn messages(&self, rejected: &[&Diagnostic], network_policy: bool) -> Vec<Diagnostic> {
        let rejected = rejected.iter().map(|diagnostic| Diagnostic {
            origin: Origin::default(),
            object: None,
            ..Diagnostic::clone(diagnostic)
        });
        let mut messages: Vec<_> = rejected.chain(self.diagnostics.iter().cloned()).collect();
        if matches!(self.body, Body::Network(_)) && !network_policy {
            let message = "NOT enforced: NetworkPolicies are switched off";
            messages.push(Diagnostic::new("", "not_enforced", message));
        }
        messages
    }
}

/// The messages of a report in the config dump: field, code and message.
fn without_object<S: Serializer>(
    messages: &[Diagnostic],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Message<'a> {
        field: &'a str,
        code: &'a str,
        message: &'a str,
    }
    serializer.collect_seq(messages.iter().map(|diagnostic| Message {
        field: &diagnostic.field,
        code: diagnostic.code,
        message: &diagnostic.message,
    }))
}
