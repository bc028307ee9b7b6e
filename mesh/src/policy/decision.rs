//! The decision about one connection: which policy denies it, if any.

use std::fmt;
use std::sync::{Arc, LazyLock};

use super::authorization::Authorization;
use super::connection::ConnectionAttributes;
use super::set::{EffectivePolicies, PolicyLevel, PolicySet};

/// There are ALLOW policies, and none of them matched.
static NO_ALLOW: LazyLock<Denial> = LazyLock::new(|| Denial {
    policy: "AuthorizationPolicy: no ALLOW matched".into(),
});

/// The result of the policies for one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Why the connection is denied; `None` if it is allowed.
    pub denial: Option<Denial>,
    /// Why an allowed connection would be denied if the dry-run policies (`istio.io/dry-run`) were
    /// enforced.
    pub dry_run: Option<Denial>,
}

impl Decision {
    /// Whether no enforced policy denies the connection.
    pub fn is_allowed(&self) -> bool {
        self.denial.is_none()
    }
}

/// The policy that denies a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Denial {
    /// For the operator: `AuthorizationPolicy shop/deny-9090`, `AuthorizationPolicy: no ALLOW
    /// matched`, `PeerAuthentication istio-system/default`, `NetworkPolicy: no ingress rule matched
    /// (shop/only-web)`. As a metric label it is bounded by the configuration, not by traffic: one
    /// value per AuthorizationPolicy and PeerAuthentication, and one per combination of
    /// NetworkPolicies that select a pod together, of which four are named and the rest is counted.
    pub policy: Arc<str>,
}

impl Denial {
    /// Stable reason code of every denial.
    pub const CODE: &'static str = "policy_denied";
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.policy)
    }
}

/// Allocates the static denials now, so that the first denied connection does not.
pub(super) fn prepare() {
    LazyLock::force(&NO_ALLOW);
}

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
