//! Who may talk to whom.
//!
//! The receiving side decides, for each connection and again whenever the model changes:
//! [`Model::authorize`]. It asks four questions in this order, and the first "no" is the answer:
//!
//! 1. PeerAuthentication: is a connection without a proven identity accepted on this port?
//! 2. AuthorizationPolicy, DENY: does a rule of any of them match?
//! 3. AuthorizationPolicy, ALLOW: if there are any, does a rule of one of them match?
//! 4. NetworkPolicy: if any select the workload, does an ingress rule admit the source pod on the
//!    application's port? The CNI cannot ask this: it sees the tunnel's port and nothing else.
//!
//! Policies are read when they change, and each workload then holds the set of those that select
//! it. To decide takes neither a lock nor an allocation; a workload that nothing selects pays for
//! the test of one pointer.
//!
//! What cannot be understood never widens access. An ALLOW rule that is in doubt does not match, a
//! DENY constraint that is in doubt does, and a selector that cannot be read selects the whole
//! namespace. [`Model::policies`] says what became of each policy.

mod aliases;
mod assign;
mod authorization;
mod cidr;
mod document;
mod dump;
mod labels;
mod network;
mod peer;
mod read;
mod report;
mod rule;
mod selector;
mod set;
mod text;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use spiffe::SpiffeId;

use crate::model::{Model, Workload};

pub(crate) use assign::Assigner;
pub use dump::PolicyRules;
pub(crate) use read::{Context, ReadPolicy};
pub(crate) use report::Selects;
pub use report::{PolicyReport, PolicyScope, PolicyState};
pub use set::PolicySet;

/// One connection that asks to reach a workload, as the receiving daemon sees it after
/// decapsulation.
#[derive(Clone, Copy, Debug)]
pub struct InboundConnection<'a> {
    /// Who the source is, proven by mutual TLS; `None` for plaintext.
    pub source_identity: Option<&'a SpiffeId>,
    /// The address of the source pod itself; an IPv4 address is never in its mapped form.
    pub source_ip: IpAddr,
    /// The workload at that address, unless its identity contradicts `source`. NetworkPolicy asks
    /// for its labels.
    pub source_workload: Option<&'a Workload>,
    /// The pod's own address and port: those within the tunnel.
    pub destination: SocketAddr,
}

/// What the policies say of an [`InboundConnection`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Why it is refused; `None` if it is allowed.
    pub denial: Option<Denial>,
    /// Why it would be refused if the policies that are on trial (`istio.io/dry-run`) were in
    /// force. Only said of what is allowed.
    pub dry_run: Option<Denial>,
}

impl Decision {
    /// Nothing refuses it.
    pub fn is_allowed(&self) -> bool {
        self.denial.is_none()
    }
}

/// The policy that refuses a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Denial {
    /// For the operator: `AuthorizationPolicy shop/deny-9090`, `AuthorizationPolicy: no ALLOW
    /// matched`, `PeerAuthentication istio-system/default`, `NetworkPolicy: no ingress rule matched
    /// (shop/only-web)`. As a metric's label it is bounded by what is configured, not by traffic: one
    /// per AuthorizationPolicy and PeerAuthentication, and one per combination of NetworkPolicies that
    /// select some pod together, of which four are named and the rest is counted.
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

impl Model {
    /// What became of each policy, sorted by kind, namespace and name.
    pub fn policies(&self) -> &[Arc<PolicyReport>] {
        &self.policies
    }
}

#[cfg(test)]
mod tests;
