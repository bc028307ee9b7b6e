//! Which policies hold for which workload.
//!
//! Policies are looked up by namespace and by one label that their selector asks for, so a workload
//! is compared with the few that might select it and not with all. Workloads that the same policies
//! select share one set.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::PolicySet;
use super::authorization::{Action, Authorization};
use super::network::{IngressRules, NetworkPolicy};
use super::peer::{PeerAuthentication, PeerMode};
use super::read::{Body, ReadPolicy};
use super::report::PolicyScope;
use super::set::{Layer, Selected};

type Labels = BTreeMap<String, String>;

/// Gives each workload its policies.
pub(crate) struct Assigner<'a> {
    policies: &'a [Arc<ReadPolicy>],
    /// Those without selector in the root namespace.
    mesh: Group,
    /// Those with one.
    root: ByLabel<'a>,
    namespaces: FxHashMap<&'a str, InNamespace<'a>>,
    sets: FxHashMap<(Option<&'a str>, Vec<usize>), PolicySet>,
}

/// Indices of policies, and what they say together.
#[derive(Default)]
struct Group {
    members: Vec<usize>,
    layer: Option<Arc<Layer>>,
}

#[derive(Default)]
struct InNamespace<'a> {
    all: Group,
    selectors: ByLabel<'a>,
}

/// Policies with a selector.
#[derive(Default)]
struct ByLabel<'a> {
    /// By a label that everything has which they select.
    labelled: FxHashMap<(&'a str, &'a str), Vec<usize>>,
    /// Those whose selector asks for no label of a certain value.
    others: Vec<usize>,
}

impl<'a> Assigner<'a> {
    /// `policies` in an order that does not depend on how they were read: the first that denies is
    /// the one that is named.
    pub(crate) fn new(policies: &'a [Arc<ReadPolicy>], network_policy: bool) -> Self {
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
            let namespace = &*policy.reach.namespace;
            match policy.reach.scope {
                PolicyScope::Global => new.mesh.members.push(i),
                PolicyScope::WorkloadSelector if policy.reach.in_root && policy.is_mesh_wide() => {
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
        new.mesh.layer = layer(policies, &new.mesh.members);
        for namespace in new.namespaces.values_mut() {
            namespace.all.layer = layer(policies, &namespace.all.members);
        }
        new
    }

    /// The policies that hold for a workload; those with a selector are told to `selected`.
    pub(crate) fn assign(
        &mut self,
        namespace: &str,
        labels: &Labels,
        mut selected: impl FnMut(usize),
    ) -> PolicySet {
        let known = self.namespaces.get_key_value(namespace);
        let mut own = Vec::new();
        self.root.select(self.policies, labels, &mut own);
        if let Some((_, namespace)) = known {
            namespace.selectors.select(self.policies, labels, &mut own);
        }
        own.sort_unstable();
        own.iter().for_each(|i| selected(*i));
        let has_own = known.filter(|(_, namespace)| !namespace.all.members.is_empty());
        let key = (has_own.map(|(name, _)| *name), own);
        if let Some(set) = self.sets.get(&key) {
            return set.clone();
        }
        let set = self.set(known.map(|(_, namespace)| &namespace.all), &key.1);
        self.sets.insert(key, set.clone());
        set
    }

    fn set(&self, namespace: Option<&Group>, own: &[usize]) -> PolicySet {
        let in_namespace = namespace.map_or(&[][..], |group| &group.members);
        let members = [&self.mesh.members, in_namespace, own];
        let mut peers: Vec<&Arc<PeerAuthentication>> = Vec::new();
        let mut network: Vec<Arc<NetworkPolicy>> = Vec::new();
        for i in members.into_iter().flatten() {
            match &self.policies[*i].body {
                Body::Peer(peer) => peers.push(peer),
                Body::Network(policy) => network.push(policy.clone()),
                Body::Authorization(_) => {}
            }
        }
        let layers = [
            self.mesh.layer.clone(),
            namespace.and_then(|group| group.layer.clone()),
            layer(self.policies, own),
        ];
        let ingress = (!network.is_empty()).then(|| IngressRules::new(network));
        PolicySet::new(Selected {
            peer: PeerMode::of(&peers),
            layers: layers.into_iter().flatten().collect(),
            ingress,
        })
    }
}

fn layer(policies: &[Arc<ReadPolicy>], members: &[usize]) -> Option<Arc<Layer>> {
    let mut layer = Layer::default();
    for i in members {
        if let Body::Authorization(policy) = &policies[*i].body {
            let policy: &Arc<Authorization> = policy;
            let list = match (policy.action, policy.dry_run) {
                (Action::Allow, false) => &mut layer.allow,
                (Action::Allow, true) => &mut layer.allow_on_trial,
                (_, false) => &mut layer.deny,
                (_, true) => &mut layer.deny_on_trial,
            };
            list.push(policy.clone());
        }
    }
    (layer != Layer::default()).then(|| Arc::new(layer))
}

impl ReadPolicy {
    /// It is asked of connections.
    pub(super) fn is_enforced(&self, network_policy: bool) -> bool {
        match &self.body {
            Body::Authorization(policy) => policy.enforced,
            Body::Peer(policy) => policy.enforced,
            Body::Network(policy) => network_policy && policy.restricts_ingress(),
        }
    }

    /// In the root namespace its selector is asked of the pods of all namespaces.
    fn is_mesh_wide(&self) -> bool {
        matches!(self.body, Body::Authorization(_))
    }

    fn selects(&self, labels: &Labels) -> bool {
        match &self.body {
            Body::Network(policy) => policy.selects(labels),
            _ => self.reach.selector.selects(labels),
        }
    }

    fn required_label(&self) -> Option<(&str, &str)> {
        match &self.body {
            Body::Network(policy) => policy.required_label(),
            _ => self.reach.selector.required_label(),
        }
    }
}

impl<'a> ByLabel<'a> {
    fn insert(&mut self, i: usize, policy: &'a ReadPolicy) {
        match policy.required_label() {
            Some(label) => self.labelled.entry(label).or_default().push(i),
            None => self.others.push(i),
        }
    }

    fn select(&self, policies: &[Arc<ReadPolicy>], labels: &Labels, found: &mut Vec<usize>) {
        let by_label = labels
            .iter()
            .filter_map(|(key, value)| self.labelled.get(&(&**key, &**value)));
        let candidates = by_label.flatten().chain(&self.others);
        found.extend(candidates.filter(|i| policies[**i].selects(labels)));
    }
}
