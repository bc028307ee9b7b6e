//! Access policies: which connections a workload accepts.
//!
//! The receiving node decides for each connection, and again whenever the model changes:
//! [`Model::authorize`](crate::Model::authorize). It checks in this order, and the first denial is
//! the result:
//!
//! 1. PeerAuthentication: is plaintext accepted on this port?
//! 2. AuthorizationPolicy, DENY: does a rule of any policy match?
//! 3. AuthorizationPolicy, ALLOW: if there are any, does a rule of one of them match?
//! 4. NetworkPolicy: if any select the workload, does an ingress rule admit the source pod on the
//!    application's port? The CNI cannot check this: it only sees the port of the tunnel.
//!
//! Policies are parsed when they change. Each workload holds the set of policies that select it. A
//! decision takes neither a lock nor an allocation; for a workload without policies it tests one
//! pointer.
//!
//! Invalid input never widens access. An invalid ALLOW rule does not match, an invalid DENY
//! constraint does, and an invalid selector selects the whole namespace.
//! [`Model::policies`](crate::Model::policies) reports the state of each policy.
//!
//! | question | file |
//! |---|---|
//! | which policies apply to a workload? | `assign.rs`, `selector.rs` |
//! | what is the order of the checks? | `decision.rs` |
//! | does an AuthorizationPolicy rule match? | `authorization/matching.rs` |
//! | does a NetworkPolicy rule match (ports, selectors, `ipBlock`)? | `network/ingress_rule.rs` |
//! | is plaintext accepted? | `peer_authentication.rs` |
//! | how is a document read? | `envelope.rs`, `authorization/rules.rs`, `network/spec.rs` |

mod assign;
mod authorization;
mod cidr;
mod connection;
mod decision;
mod document;
mod dump;
mod envelope;
mod evaluate;
mod network;
mod object;
mod pattern;
mod peer_authentication;
mod report;
mod selector;
mod set;
mod trust_domains;

pub(crate) use assign::Assigner;
pub(crate) use connection::{ConnectionAttributes, DestinationPod, SourcePod};
pub use decision::{Decision, Denial};
pub use dump::PolicyRules;
pub(crate) use envelope::{Context, ParsedPolicy};
pub use object::{Policy, PolicyKind};
pub(crate) use report::SelectedWorkloads;
pub use report::{PolicyReport, PolicyScope, PolicyState};
pub use set::PolicySet;

#[cfg(test)]
mod tests;
