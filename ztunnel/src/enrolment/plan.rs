//! What is to be done next: a pure function of what should be and what is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh::{Mode, Model, WorkloadUid};
use spiffe::SpiffeId;

use crate::capture::Redirection;

/// An opted-in pod of this node, as far as enrolment needs to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Desired {
    pub(super) kube_uid: Arc<str>,
    pub(super) identity: SpiffeId,
    pub(super) ips: Vec<IpAddr>,
    pub(super) redirection: Redirection,
}

/// The pods of this node.
#[derive(Clone, Debug, Default)]
pub(super) struct World {
    /// Those that opted in.
    pub(super) meshed: BTreeMap<WorkloadUid, Arc<Desired>>,
    /// Those that did not, with the uid by which their namespace is found.
    pub(super) plain: BTreeMap<WorkloadUid, Arc<str>>,
}

impl World {
    /// The pods that a model places on `node`. Pods of the host's network have no namespace of
    /// their own and are not among them.
    pub(super) fn of(model: &Model, node: &str) -> Self {
        let node_addresses: BTreeSet<IpAddr> = model
            .node(node)
            .map(|node| node.addresses.iter().copied().collect())
            .unwrap_or_default();
        let mut world = Self::default();
        for workload in model
            .workloads()
            .filter(|workload| &*workload.node == node && !workload.host_network)
        {
            match workload.mode {
                Mode::Mesh => {
                    let redirection = Redirection {
                        node_addresses: node_addresses.clone(),
                        probe_ports: workload.probe_ports.iter().copied().collect(),
                    };
                    let desired = Desired {
                        kube_uid: workload.kube_uid.clone(),
                        identity: workload.identity.clone(),
                        ips: workload.ips.clone(),
                        redirection,
                    };
                    world.meshed.insert(workload.uid.clone(), Arc::new(desired));
                }
                Mode::Plain => {
                    world
                        .plain
                        .insert(workload.uid.clone(), workload.kube_uid.clone());
                }
            }
        }
        world
    }
}

/// How far a pod has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not in the mesh yet.
    Pending,
    /// Captured and served.
    Enrolled,
    /// On its way out.
    Leaving,
    /// Not in the mesh, and seen to have nothing of ours in its namespace.
    Clean,
}

/// One pod as it is.
#[derive(Clone, Debug)]
pub(super) struct Actual {
    pub(super) phase: Phase,
    /// A step is under way.
    pub(super) busy: bool,
    /// The last step failed so recently that the next must wait.
    pub(super) waiting: bool,
    /// What the pod was when the last step failed: one that has changed since need not wait.
    pub(super) failed_as: Option<Arc<Desired>>,
    /// It is time to verify.
    pub(super) due: bool,
    /// What it was enrolled as.
    pub(super) enrolled_as: Option<Arc<Desired>>,
}

/// One step for one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The pod is gone, or is another: end its connections and forget it.
    Forget,
    /// End the wait for the last connections of a pod that leaves: it has changed its mind, or is
    /// gone.
    Interrupt,
    /// Find its namespace, listen in it, capture.
    Enrol,
    /// Look whether everything stands, and repair.
    Verify,
    /// Stop capturing, keep what is established, clean up after it.
    Leave,
    /// Remove what an earlier process may have left in the namespace of a pod that is not in the
    /// mesh.
    Sweep,
}

/// The next step of every pod that needs one, those first that make room for others.
pub(super) fn plan(
    world: &World,
    actual: &BTreeMap<WorkloadUid, Actual>,
) -> Vec<(WorkloadUid, Action)> {
    let mut steps: Vec<_> = actual
        .iter()
        .filter_map(|(uid, actual)| Some((uid.clone(), existing(world, uid, actual)?)))
        .collect();
    let new = world
        .meshed
        .keys()
        .map(|uid| (uid, Action::Enrol))
        .chain(world.plain.keys().map(|uid| (uid, Action::Sweep)));
    steps.extend(
        new.filter(|(uid, _)| !actual.contains_key(*uid))
            .map(|(uid, action)| (uid.clone(), action)),
    );
    steps.retain(|(uid, action)| *action != Action::Enrol || !address_is_taken(world, actual, uid));
    steps.sort_by_key(|(_, action)| !matches!(action, Action::Forget | Action::Interrupt));
    steps
}

fn existing(world: &World, uid: &WorkloadUid, actual: &Actual) -> Option<Action> {
    let desired = world.meshed.get(uid);
    let gone = desired.is_none() && !world.plain.contains_key(uid);
    if actual.busy {
        let unwanted = actual.phase == Phase::Leaving && (gone || desired.is_some());
        return unwanted.then_some(Action::Interrupt);
    }
    if gone {
        return Some(Action::Forget);
    }
    if actual.waiting && actual.failed_as.as_ref() == desired {
        return None;
    }
    match (actual.phase, desired) {
        (Phase::Pending | Phase::Clean | Phase::Leaving, Some(_)) => Some(Action::Enrol),
        (Phase::Enrolled, Some(desired)) => {
            let changed = actual.enrolled_as.as_ref() != Some(desired);
            (changed || actual.due).then_some(Action::Verify)
        }
        (Phase::Enrolled | Phase::Leaving, None) => Some(Action::Leave),
        (Phase::Pending, None) => Some(Action::Sweep),
        (Phase::Clean, None) => None,
    }
}

/// Whether a pod that no longer exists still holds an address of this one. The old pod's
/// connections end before the new one's begin, or bytes meant for the one could reach the other.
fn address_is_taken(
    world: &World,
    actual: &BTreeMap<WorkloadUid, Actual>,
    uid: &WorkloadUid,
) -> bool {
    let Some(desired) = world.meshed.get(uid) else {
        return false;
    };
    actual
        .iter()
        .filter(|(other, _)| {
            *other != uid && !world.meshed.contains_key(*other) && !world.plain.contains_key(*other)
        })
        .filter_map(|(_, actual)| actual.enrolled_as.as_ref())
        .any(|old| old.ips.iter().any(|ip| desired.ips.contains(ip)))
}

#[cfg(test)]
mod tests;
