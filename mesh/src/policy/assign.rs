//! Which policies apply to which workload.
//!
//! Policies are indexed by namespace and by one label that their selector requires, so a workload is
//! compared with the few candidates and not with all policies. Workloads that the same policies
//! select share one set.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::PolicySet;
use super::authorization::{Action, Authorization};
use super::envelope::{Body, ParsedPolicy};
use super::network::{IngressRules, NetworkPolicy};
use super::peer_authentication::{PeerAuthentication, PeerMode};
use super::report::PolicyScope;
use super::set::{EffectivePolicies, PolicyLevel};

type Labels = BTreeMap<String, String>;

/// Finds the policies of each workload.
pub(crate) struct Assigner<'a> {
    policies: &'a [Arc<ParsedPolicy>],
    /// Policies of the root namespace without a selector.
    mesh: Group,
    /// AuthorizationPolicies of the root namespace with a selector.
    root: ByLabel<'a>,
    namespaces: FxHashMap<&'a str, InNamespace<'a>>,
    sets: FxHashMap<(Option<&'a str>, Vec<usize>), PolicySet>,
}

/// Policies without a selector, by index.
#[derive(Default)]
struct Group {
    members: Vec<usize>,
    level: Option<Arc<PolicyLevel>>,
}

#[derive(Default)]
struct InNamespace<'a> {
    all: Group,
    selectors: ByLabel<'a>,
}

/// An index of policies with a selector.
#[derive(Default)]
struct ByLabel<'a> {
    /// By a label that their selector requires.
    by_label: FxHashMap<(&'a str, &'a str), Vec<usize>>,
    /// Policies whose selector requires no single value of any label.
    others: Vec<usize>,
}

impl<'a> Assigner<'a> {
    /// Indexes the policies. Their order must not depend on the order of reading: a denial names the
    /// first policy that denies.
    pub(crate) fn new(policies: &'a [Arc<ParsedPolicy>], network_policy: bool) -> Self {
        let mut new = Self {
            policies,
            mesh: Group::default(),
            root: ByLabel::default(),
            namespaces: FxHashMap::default(),
            sets: FxHashMap::default(),
        };
        for (i, policy) in policies.iter().enumerate() {
            if !policy.is_enforced(network_policy) {
                continue;
            }
            let namespace = &*policy.scope.namespace;
            match policy.scope.kind {
                PolicyScope::Global => new.mesh.members.push(i),
                PolicyScope::WorkloadSelector
                    if policy.scope.is_in_root && policy.is_mesh_wide() =>
                {
                    new.root.insert(i, policy);
                }
                PolicyScope::Namespace => {
                    let namespace = new.namespaces.entry(namespace).or_default();
                    namespace.all.members.push(i);
                }
                PolicyScope::WorkloadSelector => {
                    let namespace = new.namespaces.entry(namespace).or_default();
                    namespace.selectors.insert(i, policy);
                }
            }
        }
        new.mesh.level = level(policies, &new.mesh.members);
        for namespace in new.namespaces.values_mut() {
            namespace.all.level = level(policies, &namespace.all.members);
        }
        new
    }

    /// The policies of a workload. Calls `selected` with the index of each policy that has a selector.
    pub(crate) fn assign(
        &mut self,
        namespace: &str,
        labels: &Labels,
        mut selected: impl FnMut(usize),
    ) -> PolicySet {
        let known = self.namespaces.get_key_value(namespace);
        let mut matching = Vec::new();
        self.root.select(self.policies, labels, &mut matching);
        if let Some((_, namespace)) = known {
            namespace
                .selectors
                .select(self.policies, labels, &mut matching);
        }
        matching.sort_unstable();
        matching.iter().for_each(|i| selected(*i));
        let in_namespace = known.filter(|(_, namespace)| !namespace.all.members.is_empty());
        let key = (in_namespace.map(|(name, _)| *name), matching);
        if let Some(set) = self.sets.get(&key) {
            return set.clone();
        }
        let set = self.set(known.map(|(_, namespace)| &namespace.all), &key.1);
        self.sets.insert(key, set.clone());
        set
    }

    fn set(&self, namespace: Option<&Group>, matching: &[usize]) -> PolicySet {
        let in_namespace = namespace.map_or(&[][..], |group| &group.members);
        let members = [&self.mesh.members, in_namespace, matching];
        let mut peers: Vec<&Arc<PeerAuthentication>> = Vec::new();
        let mut network: Vec<Arc<NetworkPolicy>> = Vec::new();
        for i in members.into_iter().flatten() {
            match &self.policies[*i].body {
                Body::Peer(peer) => peers.push(peer),
                Body::Network(policy) => network.push(policy.clone()),
                Body::Authorization(_) => {}
            }
        }
        let levels = [
            self.mesh.level.clone(),
            namespace.and_then(|group| group.level.clone()),
            level(self.policies, matching),
        ];
        let ingress = (!network.is_empty()).then(|| IngressRules::new(network));
        PolicySet::new(EffectivePolicies {
            peer: PeerMode::of(&peers),
            levels: levels.into_iter().flatten().collect(),
            ingress,
        })
    }
}

/// The AuthorizationPolicies among these, by action; `None` if there are none.
fn level(policies: &[Arc<ParsedPolicy>], members: &[usize]) -> Option<Arc<PolicyLevel>> {
    let mut level = PolicyLevel::default();
    for i in members {
        if let Body::Authorization(policy) = &policies[*i].body {
            let policy: &Arc<Authorization> = policy;
            let list = match (policy.action, policy.dry_run) {
                (Action::Allow, false) => &mut level.allow,
                (Action::Allow, true) => &mut level.allow_dry_run,
                (_, false) => &mut level.deny,
                (_, true) => &mut level.deny_dry_run,
            };
            list.push(policy.clone());
        }
    }
    (level != PolicyLevel::default()).then(|| Arc::new(level))
}

impl ParsedPolicy {
    /// Whether it is evaluated for connections.
    pub(super) fn is_enforced(&self, network_policy: bool) -> bool {
        match &self.body {
            Body::Authorization(policy) => policy.enforced,
            Body::Peer(policy) => policy.enforced,
            Body::Network(policy) => network_policy && policy.restricts_ingress(),
        }
    }

    /// Whether its selector matches pods of all namespaces when it is in the root namespace.
    fn is_mesh_wide(&self) -> bool {
        matches!(self.body, Body::Authorization(_))
    }

    fn selects(&self, labels: &Labels) -> bool {
        match &self.body {
            Body::Network(policy) => policy.selects(labels),
            _ => self.scope.selector.selects(labels),
        }
    }

    fn required_label(&self) -> Option<(&str, &str)> {
        match &self.body {
            Body::Network(policy) => policy.required_label(),
            _ => self.scope.selector.required_label(),
        }
    }
}

impl<'a> ByLabel<'a> {
    fn insert(&mut self, i: usize, policy: &'a ParsedPolicy) {
        match policy.required_label() {
            Some(label) => self.by_label.entry(label).or_default().push(i),
            None => self.others.push(i),
        }
    }

    fn select(&self, policies: &[Arc<ParsedPolicy>], labels: &Labels, found: &mut Vec<usize>) {
        let by_label = labels
            .iter()
            .filter_map(|(key, value)| self.by_label.get(&(&**key, &**value)));
        let candidates = by_label.flatten().chain(&self.others);
        found.extend(candidates.filter(|i| policies[**i].selects(labels)));
    }
}
