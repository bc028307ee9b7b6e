//! The next step of each pod: a pure function of desired and actual state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh::{Mode, Model, WorkloadUid};
use spiffe::SpiffeId;

use crate::capture::Redirection;

/// What enrolment needs of a meshed pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DesiredPod {
    pub(super) kube_uid: Arc<str>,
    pub(super) identity: SpiffeId,
    pub(super) ips: Vec<IpAddr>,
    pub(super) redirection: Redirection,
}

/// The pods of this node according to the model.
#[derive(Clone, Debug, Default)]
pub(super) struct DesiredState {
    /// Pods that opted in.
    pub(super) meshed: BTreeMap<WorkloadUid, Arc<DesiredPod>>,
    /// Pods that did not, with the Kubernetes uid by which their namespace is found.
    pub(super) plain: BTreeMap<WorkloadUid, Arc<str>>,
}

impl DesiredState {
    /// The pods of `node` in a model. Pods on the host's network have no namespace of their own and
    /// are left out.
    pub(super) fn from_model(model: &Model, node: &str) -> Self {
        let node_addresses: BTreeSet<IpAddr> = model
            .node(node)
            .map(|node| node.addresses.iter().copied().collect())
            .unwrap_or_default();
        let mut state = Self::default();
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
                    let desired = DesiredPod {
                        kube_uid: workload.kube_uid.clone(),
                        identity: workload.identity.clone(),
                        ips: workload.ips.clone(),
                        redirection,
                    };
                    state.meshed.insert(workload.uid.clone(), Arc::new(desired));
                }
                Mode::Plain => {
                    state
                        .plain
                        .insert(workload.uid.clone(), workload.kube_uid.clone());
                }
            }
        }
        state
    }
}

/// How far a pod's enrolment has progressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not in the mesh yet.
    Pending,
    /// Captured and served.
    Enrolled,
    /// Opted out, with connections from before.
    Leaving,
    /// Not in the mesh, and verified to have no rules of the daemon in its namespace.
    Clean,
}

/// The actual state of one pod.
#[derive(Clone, Debug)]
pub(super) struct ActualPod {
    pub(super) phase: Phase,
    /// A step is running.
    pub(super) busy: bool,
    /// The last step failed and its backoff has not passed.
    pub(super) waiting: bool,
    /// The desired state when the last step failed. After a change the pod does not wait.
    pub(super) failed_as: Option<Arc<DesiredPod>>,
    /// A verification is due.
    pub(super) due: bool,
    /// The desired state with which it was enrolled or last verified.
    pub(super) enrolled_as: Option<Arc<DesiredPod>>,
}

/// What to do for one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// The pod was deleted: reset its connections and drop its record.
    Forget,
    /// Cancel the wait for the last connections of a leaving pod, which opted in again or was
    /// deleted.
    Interrupt,
    /// Find its namespace, open listeners, redirect.
    Enrol,
    /// Verify its capture, and repair it.
    Verify,
    /// Stop redirecting, wait for established connections, remove the rules.
    Leave,
    /// Remove the rules of an earlier process from the namespace of a pod that is not in the mesh.
    Sweep,
}

/// The next step of every pod that needs one. Steps that free addresses for other pods come first.
pub(super) fn plan(
    desired_state: &DesiredState,
    actual: &BTreeMap<WorkloadUid, ActualPod>,
) -> Vec<(WorkloadUid, Action)> {
    let mut steps: Vec<_> = actual
        .iter()
        .filter_map(|(uid, actual)| Some((uid.clone(), existing(desired_state, uid, actual)?)))
        .collect();
    let new = desired_state
        .meshed
        .keys()
        .map(|uid| (uid, Action::Enrol))
        .chain(desired_state.plain.keys().map(|uid| (uid, Action::Sweep)));
    steps.extend(
        new.filter(|(uid, _)| !actual.contains_key(*uid))
            .map(|(uid, action)| (uid.clone(), action)),
    );
    steps.retain(|(uid, action)| {
        *action != Action::Enrol || !address_is_taken(desired_state, actual, uid)
    });
    steps.sort_by_key(|(_, action)| !matches!(action, Action::Forget | Action::Interrupt));
    steps
}

fn existing(desired_state: &DesiredState, uid: &WorkloadUid, actual: &ActualPod) -> Option<Action> {
    let desired = desired_state.meshed.get(uid);
    let gone = desired.is_none() && !desired_state.plain.contains_key(uid);
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

/// Whether a deleted pod still holds an address of this one. The old pod's connections must end
/// before the new pod is enrolled, or bytes for the one could reach the other.
fn address_is_taken(
    desired_state: &DesiredState,
    actual: &BTreeMap<WorkloadUid, ActualPod>,
    uid: &WorkloadUid,
) -> bool {
    let Some(desired) = desired_state.meshed.get(uid) else {
        return false;
    };
    actual
        .iter()
        .filter(|(other, _)| {
            *other != uid
                && !desired_state.meshed.contains_key(*other)
                && !desired_state.plain.contains_key(*other)
        })
        .filter_map(|(_, actual)| actual.enrolled_as.as_ref())
        .any(|old| old.ips.iter().any(|ip| desired.ips.contains(ip)))
}

#[cfg(test)]
mod tests;
