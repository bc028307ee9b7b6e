//! How the policies of a workload are evaluated for one connection: their order, and dry-run.

use std::sync::Arc;

use super::authorization::Authorization;
use super::connection::ConnectionAttributes;
use super::decision::{Decision, Denial, NO_ALLOW};
use super::set::{EffectivePolicies, PolicyLevel, PolicySet};

impl PolicySet {
    /// Decides about a connection. Takes no lock and does not allocate.
    pub(crate) fn decide(&self, connection: &ConnectionAttributes<'_>) -> Decision {
        match self.policies() {
            None => Decision::default(),
            Some(policies) => policies.decide(connection),
        }
    }
}

impl EffectivePolicies {
    fn decide(&self, connection: &ConnectionAttributes<'_>) -> Decision {
        let denial = self
            .peer_denial(connection)
            .or_else(|| self.authorization_denial(connection))
            .or_else(|| self.ingress_denial(connection));
        let dry_run = match denial {
            None => self.dry_run_denial(connection),
            Some(_) => None,
        };
        Decision { denial, dry_run }
    }

    fn peer_denial(&self, connection: &ConnectionAttributes<'_>) -> Option<Denial> {
        match connection.source {
            None => self.peer.denial(connection.destination.port()).cloned(),
            Some(_) => None,
        }
    }

    fn authorization_denial(&self, connection: &ConnectionAttributes<'_>) -> Option<Denial> {
        if let Some(policy) = self.first_match(|level| &level.deny, connection) {
            return Some(policy.denial.clone());
        }
        let has_allow = self.levels.iter().any(|level| !level.allow.is_empty());
        let allowed = !has_allow || self.first_match(|level| &level.allow, connection).is_some();
        (!allowed).then(|| NO_ALLOW.clone())
    }

    fn ingress_denial(&self, connection: &ConnectionAttributes<'_>) -> Option<Denial> {
        self.ingress.as_ref()?.check(connection).err()
    }

    /// The denial of the dry-run policies for an allowed connection. If there are enforced ALLOW
    /// policies, one of them has matched already; one match is enough, so dry-run ALLOW policies
    /// deny nothing then.
    fn dry_run_denial(&self, connection: &ConnectionAttributes<'_>) -> Option<Denial> {
        if let Some(policy) = self.first_match(|level| &level.deny_dry_run, connection) {
            return Some(policy.denial.clone());
        }
        let has = |list: fn(&PolicyLevel) -> &Vec<Arc<Authorization>>| {
            self.levels.iter().any(|level| !list(level).is_empty())
        };
        let denied = has(|level| &level.allow_dry_run)
            && !has(|level| &level.allow)
            && self
                .first_match(|level| &level.allow_dry_run, connection)
                .is_none();
        denied.then(|| NO_ALLOW.clone())
    }

    /// The first policy of these lists that matches the connection.
    fn first_match(
        &self,
        list: impl Fn(&PolicyLevel) -> &Vec<Arc<Authorization>>,
        connection: &ConnectionAttributes<'_>,
    ) -> Option<&Arc<Authorization>> {
        let policies = self.levels.iter().flat_map(|level| list(level));
        policies
            .into_iter()
            .find(|policy| policy.matches(connection))
    }
}
