//! NetworkPolicy, its ingress side.
//!
//! The CNI enforces NetworkPolicies on the packets it sees. Of a connection through the mesh it sees
//! port 15008 and the address of a pod, not the application's port that the policy is about. So the
//! receiving node checks again, for the application's own port.
//!
//! The rules are those of Kubernetes:
//!
//! * A pod that no policy selects accepts everything. A pod that a policy selects accepts only what a
//!   rule of some policy admits: policies add up, they never subtract.
//! * A rule without `from` admits every source, one without `ports` every port; no rule at all admits
//!   nothing. Within one peer `podSelector` and `namespaceSelector` must both match.
//! * Pods are recognised by their address, not by their identity. Only `ipBlock` matches host-network
//!   pods, nodes and sources outside the cluster.
//! * A pod always reaches itself.
//!
//! An invalid policy admits nothing and selects what its selector names, or all pods of its namespace
//! if the selector is invalid too. Egress is not enforced, which the policy's report states.

mod ingress_rule;
mod spec;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Denial;
use super::connection::ConnectionAttributes;
use super::selector::Selector;

use ingress_rule::Rule;
pub(crate) use spec::read;

/// The number of policies that a denial names; the rest is counted.
const MAX_NAMED_POLICIES: usize = 4;

/// One NetworkPolicy, parsed by itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NetworkPolicy {
    namespace: Arc<str>,
    name: Arc<str>,
    /// `None` for all pods of the namespace.
    pods: Option<Selector>,
    ingress: Ingress,
}

/// The effect of a policy on the ingress of the pods it selects.
#[derive(Debug, PartialEq, Eq)]
enum Ingress {
    /// None: it restricts egress only.
    Unrestricted,
    /// Admits what a rule admits; nothing without rules.
    Only(Vec<Rule>),
}

impl NetworkPolicy {
    /// Whether it restricts ingress. A policy that does not selects no pod.
    pub(crate) fn restricts_ingress(&self) -> bool {
        matches!(self.ingress, Ingress::Only(_))
    }

    /// Whether it selects all pods of its namespace.
    pub(crate) fn selects_all(&self) -> bool {
        self.pods.as_ref().is_none_or(|pods| pods.0.is_empty())
    }

    /// A label that every selected pod has; `None` if there is no such label.
    pub(crate) fn required_label(&self) -> Option<(&str, &str)> {
        self.pods.as_ref()?.required_label()
    }

    /// Whether it restricts the ingress of a pod of its namespace with these labels.
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.restricts_ingress() && self.pods.as_ref().is_none_or(|pods| pods.selects(labels))
    }

    fn admits(&self, connection: &ConnectionAttributes<'_>) -> bool {
        match &self.ingress {
            Ingress::Unrestricted => false,
            Ingress::Only(rules) => rules
                .iter()
                .any(|rule| rule.admits(connection, &self.namespace)),
        }
    }
}

/// All the policies that restrict the ingress of one workload. Never empty.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct IngressRules {
    policies: Vec<Arc<NetworkPolicy>>,
    denial: Arc<str>,
}

impl IngressRules {
    /// Combines the policies that select a workload.
    pub(crate) fn new(policies: Vec<Arc<NetworkPolicy>>) -> Self {
        let denial = denial(&policies).into();
        Self { policies, denial }
    }

    /// Checks whether one of the policies admits the connection. Does not allocate.
    ///
    /// # Errors
    ///
    /// None of them does; the denial names them.
    pub(crate) fn check(&self, connection: &ConnectionAttributes<'_>) -> Result<(), Denial> {
        let mut policies = self.policies.iter();
        match connection.is_from_destination() || policies.any(|p| p.admits(connection)) {
            true => Ok(()),
            false => Err(Denial {
                policy: self.denial.clone(),
            }),
        }
    }
}

/// The text of a denial. Built once, so that a denied connection does not allocate.
fn denial(policies: &[Arc<NetworkPolicy>]) -> String {
    let names = policies.iter().take(MAX_NAMED_POLICIES);
    let names = names.map(|policy| format!("{}/{}", policy.namespace, policy.name));
    let names = names.collect::<Vec<_>>().join(", ");
    let more = match policies.len().saturating_sub(MAX_NAMED_POLICIES) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("NetworkPolicy: no ingress rule matched ({names}{more})")
}

#[cfg(test)]
mod tests;
