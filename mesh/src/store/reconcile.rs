//! Builds the next model: keeps the old allocation of every equal entry, and lists the changes.

mod policies;

use std::hash::Hash;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::id::WorkloadUid;
use crate::model::{Endpoint, EndpointKey, EndpointTarget, Model, Service, Workload};

use super::Changes;

type Map<K, V> = FxHashMap<K, V>;
type Workloads = Map<WorkloadUid, Arc<Workload>>;

/// Replaces every entry of `new` that equals its old version by that version, and moves load counters.
/// Workloads come first, because services and the address index point to them.
pub(super) fn reconcile(old: &Model, mut new: Model) -> (Model, Changes) {
    let mut changes = Changes::default();
    reconcile_workloads(old, &mut new.workloads, &mut changes);
    for workload in new.by_ip.values_mut() {
        *workload = current(&new.workloads, workload);
    }
    for (name, service) in &mut new.services {
        *service = reconcile_service(old.services.get(name), service, &new.workloads);
    }
    let external = &mut new.external;
    let by_external = external.by_address.values_mut();
    let by_external = by_external.chain(external.by_node_port.values_mut());
    for service in new.by_vip.values_mut().chain(by_external) {
        *service = new.services.get(&service.key()).unwrap_or(service).clone();
    }
    keep_equal(&old.nodes, &mut new.nodes);
    keep_equal(&old.namespaces, &mut new.namespaces);
    changes.services = different(&old.services, &new.services);
    changes.nodes = different(&old.nodes, &new.nodes);
    changes.namespaces = different(&old.namespaces, &new.namespaces);
    changes.policies = policies::reconcile(&old.policies, &mut new.policies);
    // The owners of all other addresses follow from the workloads and services.
    changes.refusals_changed = old.refused_addresses != new.refused_addresses;
    (new, changes)
}

fn reconcile_workloads(old: &Model, new: &mut Workloads, changes: &mut Changes) {
    for (uid, workload) in new.iter_mut() {
        match old.workloads.get(uid) {
            Some(known) if known == workload => *workload = known.clone(),
            Some(known) => {
                changes.changed.push(uid.clone());
                let load = known.load.clone();
                *workload = Arc::new(Workload {
                    load,
                    ..Workload::clone(workload)
                });
            }
            None => changes.added.push(uid.clone()),
        }
    }
    changes.removed = old
        .workloads
        .keys()
        .filter(|uid| !new.contains_key(*uid))
        .cloned()
        .collect();
    changes.added.sort_unstable();
    changes.changed.sort_unstable();
    changes.removed.sort_unstable();
}

fn current(workloads: &Workloads, workload: &Arc<Workload>) -> Arc<Workload> {
    workloads.get(&workload.uid).unwrap_or(workload).clone()
}

fn reconcile_service(
    old: Option<&Arc<Service>>,
    new: &Arc<Service>,
    workloads: &Workloads,
) -> Arc<Service> {
    // Equal services have equal workloads, and equal workloads are the old allocations already.
    if let Some(old) = old.filter(|old| *old == new) {
        return old.clone();
    }
    let known: Map<EndpointKey, &Arc<Endpoint>> = old
        .iter()
        .flat_map(|old| &old.endpoints)
        .map(|e| (e.key(), e))
        .collect();
    let endpoints = new
        .endpoints
        .iter()
        .map(|endpoint| match known.get(&endpoint.key()) {
            Some(known) if *known == endpoint => Arc::clone(known),
            known => Arc::new(reconcile_endpoint(
                known.map(|known| &***known),
                endpoint,
                workloads,
            )),
        });
    let endpoints = endpoints.collect();
    Arc::new(Service {
        endpoints,
        ..Service::clone(new)
    })
}

fn reconcile_endpoint(old: Option<&Endpoint>, new: &Endpoint, workloads: &Workloads) -> Endpoint {
    let target = match &new.target {
        EndpointTarget::Workload(workload) => {
            EndpointTarget::Workload(current(workloads, workload))
        }
        EndpointTarget::Address { ip, load } => {
            let load = old.map_or(load, Endpoint::load).clone();
            EndpointTarget::Address { ip: *ip, load }
        }
    };
    Endpoint {
        target,
        ..new.clone()
    }
}

fn keep_equal<K: Eq + Hash, V: PartialEq>(old: &Map<K, Arc<V>>, new: &mut Map<K, Arc<V>>) {
    for (key, value) in new {
        if let Some(old) = old.get(key).filter(|old| **old == *value) {
            *value = old.clone();
        }
    }
}

/// The keys whose entries are not the same allocation in both.
fn different<K: Clone + Eq + Hash + Ord, V>(old: &Map<K, Arc<V>>, new: &Map<K, Arc<V>>) -> Vec<K> {
    let same = |key, value| old.get(key).is_some_and(|old| Arc::ptr_eq(old, value));
    let changed = new
        .iter()
        .filter(|(key, value)| !same(*key, *value))
        .map(|(key, _)| key);
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    let mut keys: Vec<K> = changed.chain(gone).cloned().collect();
    keys.sort_unstable();
    keys
}
