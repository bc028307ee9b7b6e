//! NetworkPolicy, its ingress side.
//!
//! The CNI enforces NetworkPolicies on the packets it sees. Of a connection through the mesh it
//! sees port 15008 and the address of a pod; what it must not see is what the policy speaks of.
//! So the receiving daemon asks again, of the application's own port.
//!
//! The rules are Kubernetes':
//!
//! * A pod that no policy selects takes anything. One that a policy selects takes only what a rule
//!   of some policy admits: policies add up, they never subtract.
//! * A rule without `from` admits anyone, one without `ports` admits to every port; no rule at all
//!   admits nobody. Within one peer `podSelector` and `namespaceSelector` both hold.
//! * Pods are recognised by their address, not by what they say of themselves. Host-network pods,
//!   nodes and what is outside the cluster are matched by `ipBlock` only.
//! * A pod always reaches itself.
//!
//! A policy with a fault admits nothing, and selects what it says it selects; all pods of its
//! namespace, if even that cannot be read. Egress is not enforced, and the policy's report says so.

mod read;
mod rule;

use std::collections::BTreeMap;
use std::sync::Arc;

use super::selector::Selector;
use super::{Denial, InboundConnection};
use crate::model::{Model, Workload};

pub(crate) use read::read;
use rule::{Rule, Source};

/// As many policies are named in a denial; the rest is counted.
const NAMED_IN_DENIAL: usize = 4;

/// One NetworkPolicy, read by itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NetworkPolicy {
    namespace: Arc<str>,
    name: Arc<str>,
    /// `None` for all pods of the namespace.
    pods: Option<Selector>,
    ingress: Ingress,
}

/// What a policy means for the ingress of the pods it selects.
#[derive(Debug, PartialEq, Eq)]
enum Ingress {
    /// Nothing: it is about egress.
    Unrestricted,
    /// What a rule admits; without rules, nothing.
    Only(Vec<Rule>),
}

impl NetworkPolicy {
    /// It says something about ingress. The other ones select no pod.
    pub(crate) fn restricts_ingress(&self) -> bool {
        matches!(self.ingress, Ingress::Only(_))
    }

    /// It selects all pods of its namespace.
    pub(crate) fn selects_all(&self) -> bool {
        self.pods.as_ref().is_none_or(|pods| pods.0.is_empty())
    }

    /// A label that every pod it selects has, so that not every pod need be asked; `None` if any
    /// pod of its namespace may be selected.
    pub(crate) fn required_label(&self) -> Option<(&str, &str)> {
        self.pods.as_ref()?.required_label()
    }

    /// Whether it restricts the ingress of a pod of its namespace with these labels.
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.restricts_ingress() && self.pods.as_ref().is_none_or(|pods| pods.selects(labels))
    }

    fn admits(&self, source: &Source<'_>, port: u16, workload: &Workload) -> bool {
        match &self.ingress {
            Ingress::Unrestricted => false,
            Ingress::Only(rules) => rules
                .iter()
                .any(|rule| rule.admits(source, port, &workload.ports, &self.namespace)),
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
    /// Puts together the policies that select a workload.
    pub(crate) fn new(policies: Vec<Arc<NetworkPolicy>>) -> Self {
        let denial = denial(&policies).into();
        Self { policies, denial }
    }

    /// Whether any of the policies admits the connection. Does not allocate.
    ///
    /// # Errors
    ///
    /// None of them does; the denial names them.
    pub(crate) fn admits(
        &self,
        connection: &InboundConnection<'_>,
        workload: &Workload,
        model: &Model,
    ) -> Result<(), Denial> {
        let source = Source::new(connection, model);
        let port = connection.destination.port();
        let admitted = source.is(workload)
            || self
                .policies
                .iter()
                .any(|policy| policy.admits(&source, port, workload));
        match admitted {
            true => Ok(()),
            false => Err(Denial {
                policy: self.denial.clone(),
            }),
        }
    }
}

/// Made once, so that a denial costs no allocation.
fn denial(policies: &[Arc<NetworkPolicy>]) -> String {
    let names = policies.iter().take(NAMED_IN_DENIAL);
    let names = names.map(|policy| format!("{}/{}", policy.namespace, policy.name));
    let names = names.collect::<Vec<_>>().join(", ");
    let more = match policies.len().saturating_sub(NAMED_IN_DENIAL) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("NetworkPolicy: no ingress rule matched ({names}{more})")
}

#[cfg(test)]
mod tests;
