//! The policies that apply to one workload.

use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::authorization::Authorization;
use super::decision;
use super::network::IngressRules;
use super::peer_authentication::PeerMode;

/// The policies that select a workload. Workloads that the same policies select share one set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet(Option<Arc<EffectivePolicies>>);

/// The policies of a set, combined per kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EffectivePolicies {
    pub(super) peer: PeerMode,
    /// The AuthorizationPolicies of the mesh, the namespace and the selectors. Sets share the first
    /// two levels.
    pub(super) levels: Vec<Arc<PolicyLevel>>,
    pub(super) ingress: Option<IngressRules>,
}

/// AuthorizationPolicies of one level, by action.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PolicyLevel {
    pub(super) deny: Vec<Arc<Authorization>>,
    pub(super) allow: Vec<Arc<Authorization>>,
    pub(super) deny_dry_run: Vec<Arc<Authorization>>,
    pub(super) allow_dry_run: Vec<Arc<Authorization>>,
}

impl PolicySet {
    pub(super) fn new(policies: EffectivePolicies) -> Self {
        let allows_everything = policies.peer.is_permissive()
            && policies.levels.is_empty()
            && policies.ingress.is_none();
        decision::prepare();
        Self((!allows_everything).then(|| Arc::new(policies)))
    }

    /// Whether every connection is allowed.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    pub(super) fn policies(&self) -> Option<&EffectivePolicies> {
        self.0.as_deref()
    }

    /// Whether both are the same allocation.
    #[cfg(test)]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The AuthorizationPolicies of the set, as in [`Denial::policy`](super::Denial::policy).
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let levels = self.0.iter().flat_map(|policies| &policies.levels);
        levels
            .flat_map(|l| [&l.deny, &l.allow, &l.deny_dry_run, &l.allow_dry_run])
            .flatten()
            .map(|policy| &*policy.denial.policy)
    }
}

impl Serialize for PolicySet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}
