//! The report of each policy: is it enforced, for which workloads, and what is wrong with it?

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::dump::PolicyRules;
use super::envelope::{Body, ParsedPolicy};
use crate::diagnostic::{Diagnostic, Origin};
use crate::id::ObjectRef;
use crate::id::WorkloadUid;

/// The state of one policy. Serialized in the shape of Istio's ztunnel (`name`, `namespace`, `scope`,
/// `action`, `rules`, `dryRun`) with additional fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyReport {
    /// Kind, namespace and name.
    #[serde(flatten)]
    pub object: ObjectRef,
    /// Whether it is in force.
    pub state: PolicyState,
    /// Its errors and notes.
    #[serde(serialize_with = "without_object")]
    pub messages: Vec<Diagnostic>,
    /// The meshed workloads that it applies to, sorted. Policies with the same scope share the list.
    pub selects: Arc<[WorkloadUid]>,
    /// Its denials are counted and logged, not enforced.
    pub dry_run: bool,
    /// `Allow`, `Deny`, `Custom` or `Audit`; the mode for a PeerAuthentication. An
    /// AuthorizationPolicy with an unknown action has `Deny`, an invalid PeerAuthentication
    /// `Strict`.
    pub action: &'static str,
    /// Which workloads it applies to.
    pub scope: PolicyScope,
    /// The rules of an AuthorizationPolicy as they are evaluated.
    pub rules: PolicyRules,
}

/// Whether a policy is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyState {
    /// Enforced as written, except for what the messages list.
    Accepted,
    /// Part of it cannot be understood. It denies more than it specifies, or the last good version is
    /// enforced; the messages name which.
    Invalid,
    /// It is for a waypoint (targetRefs) or not supported here.
    NotEnforcedHere,
}

/// Which workloads a policy applies to; Istio's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum PolicyScope {
    /// All workloads: it is in the root namespace and has no selector.
    Global,
    /// All workloads of its namespace.
    Namespace,
    /// The workloads that its selector selects.
    WorkloadSelector,
}

/// The meshed workloads of each scope.
pub(crate) trait SelectedWorkloads {
    /// All workloads.
    fn all(&self) -> Arc<[WorkloadUid]>;
    /// All workloads of a namespace.
    fn of_namespace(&self, namespace: &str) -> Arc<[WorkloadUid]>;
    /// The workloads that the selector of this policy selects.
    fn of_selector(&self, policy: usize) -> Arc<[WorkloadUid]>;
}

impl ParsedPolicy {
    /// Builds the report. `diagnostics` are those of newer versions that the source rejected in favour
    /// of this last good one.
    pub(crate) fn report(
        &self,
        object: ObjectRef,
        index: usize,
        workloads: &impl SelectedWorkloads,
        diagnostics: &[&Diagnostic],
        network_policy: bool,
    ) -> PolicyReport {
        let enforced = self.is_enforced(network_policy);
        let rejected = diagnostics.iter().any(|d| d.code != "duplicate_object");
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
            selects: match (enforced, self.scope.kind) {
                (false, _) => Arc::default(),
                (true, PolicyScope::Global) => workloads.all(),
                (true, PolicyScope::Namespace) => workloads.of_namespace(&self.scope.namespace),
                (true, PolicyScope::WorkloadSelector) => workloads.of_selector(index),
            },
            dry_run,
            action,
            scope: self.scope.kind,
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
