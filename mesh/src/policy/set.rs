//! The policies of one workload, and the decision.

use std::sync::{Arc, LazyLock};

use serde::{Serialize, Serializer};

use super::authorization::Authorization;
use super::network::IngressRules;
use super::peer::PeerMode;
use super::rule::Facts;
use super::{Decision, Denial, InboundConnection};
use crate::model::{Model, Workload};

/// There are ALLOW policies, and none of them matched.
static NO_ALLOW: LazyLock<Denial> = LazyLock::new(|| Denial {
    policy: "AuthorizationPolicy: no ALLOW matched".into(),
});

/// The policies that select a workload, ready to decide. Workloads that the same policies select
/// share one set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet(Option<Arc<Selected>>);

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Selected {
    pub(super) peer: PeerMode,
    /// The AuthorizationPolicies of the mesh, the namespace and the selectors. The first two are
    /// shared by all they hold for.
    pub(super) layers: Vec<Arc<Layer>>,
    pub(super) ingress: Option<IngressRules>,
}

/// AuthorizationPolicies by what they do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Layer {
    pub(super) deny: Vec<Arc<Authorization>>,
    pub(super) allow: Vec<Arc<Authorization>>,
    pub(super) deny_on_trial: Vec<Arc<Authorization>>,
    pub(super) allow_on_trial: Vec<Arc<Authorization>>,
}

impl PolicySet {
    pub(super) fn new(selected: Selected) -> Self {
        let idle = selected.peer.is_permissive()
            && selected.layers.is_empty()
            && selected.ingress.is_none();
        // Made now, not by the first connection that is refused.
        LazyLock::force(&NO_ALLOW);
        Self((!idle).then(|| Arc::new(selected)))
    }

    /// No policy has anything to say of the workload: everything is allowed.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// They are one allocation.
    #[cfg(test)]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// The AuthorizationPolicies among them, as in [`Denial::policy`].
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let layers = self.0.iter().flat_map(|selected| &selected.layers);
        layers
            .flat_map(|l| [&l.deny, &l.allow, &l.deny_on_trial, &l.allow_on_trial])
            .flatten()
            .map(|policy| &*policy.denial.policy)
    }
}

impl Serialize for PolicySet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl Model {
    /// Whether this connection may reach this workload. Takes no lock and does not allocate.
    ///
    /// `workload` must be today's: take it from this very model, not from where the connection
    /// began, because it carries the policies that select it.
    pub fn authorize(&self, workload: &Workload, connection: &InboundConnection<'_>) -> Decision {
        match &workload.policies.0 {
            None => Decision::default(),
            Some(selected) => selected.decide(self, workload, connection),
        }
    }
}

impl Selected {
    fn decide(
        &self,
        model: &Model,
        workload: &Workload,
        connection: &InboundConnection<'_>,
    ) -> Decision {
        let facts = Facts::new(connection);
        let denial = self
            .peer_denial(connection)
            .or_else(|| self.rule_denial(&facts))
            .or_else(|| self.ingress_denial(model, workload, connection));
        let dry_run = match denial {
            None => self.trial_denial(&facts),
            Some(_) => None,
        };
        Decision { denial, dry_run }
    }

    fn peer_denial(&self, connection: &InboundConnection<'_>) -> Option<Denial> {
        match connection.source_identity {
            None => self.peer.denial(connection.destination.port()).cloned(),
            Some(_) => None,
        }
    }

    fn rule_denial(&self, facts: &Facts<'_>) -> Option<Denial> {
        if let Some(policy) = self.first(|layer| &layer.deny, facts) {
            return Some(policy.denial.clone());
        }
        let any = self.layers.iter().any(|layer| !layer.allow.is_empty());
        let allowed = !any || self.first(|layer| &layer.allow, facts).is_some();
        (!allowed).then(|| NO_ALLOW.clone())
    }

    fn ingress_denial(
        &self,
        model: &Model,
        workload: &Workload,
        connection: &InboundConnection<'_>,
    ) -> Option<Denial> {
        let ingress = self.ingress.as_ref()?;
        ingress.admits(connection, workload, model).err()
    }

    /// What the policies on trial would refuse of what is allowed. ALLOW policies that are in
    /// force have matched already, and one match is enough: then those on trial refuse nothing.
    fn trial_denial(&self, facts: &Facts<'_>) -> Option<Denial> {
        if let Some(policy) = self.first(|layer| &layer.deny_on_trial, facts) {
            return Some(policy.denial.clone());
        }
        let any = |list: fn(&Layer) -> &Vec<Arc<Authorization>>| {
            self.layers.iter().any(|layer| !list(layer).is_empty())
        };
        let refused = any(|layer| &layer.allow_on_trial)
            && !any(|layer| &layer.allow)
            && self.first(|layer| &layer.allow_on_trial, facts).is_none();
        refused.then(|| NO_ALLOW.clone())
    }

    /// The first policy of these lists that matches.
    fn first(
        &self,
        list: impl Fn(&Layer) -> &Vec<Arc<Authorization>>,
        facts: &Facts<'_>,
    ) -> Option<&Arc<Authorization>> {
        let policies = self.layers.iter().flat_map(|layer| list(layer));
        policies.into_iter().find(|policy| policy.matches(facts))
    }
}
