//! The result of the policies for one connection: which policy denies it, if any.

use std::fmt;
use std::sync::{Arc, LazyLock};

/// There are ALLOW policies, and none of them matched.
pub(super) static NO_ALLOW: LazyLock<Denial> = LazyLock::new(|| Denial {
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
