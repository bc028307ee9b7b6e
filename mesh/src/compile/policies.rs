//! Which policies apply to which pod, and the report of each policy.

use std::sync::Arc;

use crate::diagnostic::Diagnostic;
use crate::id::ObjectRef;
use crate::id::WorkloadUid;
use crate::policy::{Assigner, ParsedPolicy, PolicyReport, SelectedWorkloads};

use super::extract::ExtractedObjects;
use super::{Extracted, Map};

/// Sets the policies of every pod. Needs the mode of every pod.
pub(super) fn assign(objects: &mut ExtractedObjects) -> Vec<Arc<PolicyReport>> {
    let policies: Vec<Arc<ParsedPolicy>> =
        objects.policies.iter().map(|p| p.value.clone()).collect();
    if policies.is_empty() {
        return Vec::new();
    }
    let mut assigner = Assigner::new(&policies, objects.network_policy);
    let mut lists = Lists::default();
    lists.selectors.resize_with(policies.len(), Vec::new);
    let mut order: Vec<usize> = (0..objects.pods.len()).collect();
    order.sort_unstable_by(|a, b| {
        let uid = |i: &usize| &objects.pods[*i].value.workload.uid;
        uid(a).cmp(uid(b))
    });
    for i in order {
        let workload = &mut objects.pods[i].value.workload;
        let meshed = workload.is_meshed();
        let uid = &workload.uid;
        let set = assigner.assign(&workload.namespace, &workload.labels, |policy| {
            if meshed {
                lists.selectors[policy].push(uid.clone());
            }
        });
        if meshed {
            lists.add(&workload.namespace, uid);
        }
        workload.policies = set;
    }
    reports(objects, &lists.finish())
}

fn reports(objects: &ExtractedObjects, lists: &Finished) -> Vec<Arc<PolicyReport>> {
    let mut rejected: Map<&ObjectRef, Vec<&Diagnostic>> = Map::default();
    for diagnostic in &objects.rejected {
        if let Some(object) = &diagnostic.object {
            rejected.entry(object).or_default().push(diagnostic);
        }
    }
    let report = |(i, policy): (usize, &Extracted<Arc<ParsedPolicy>>)| {
        let diagnostics = rejected
            .get(&policy.reference)
            .map_or(&[][..], Vec::as_slice);
        let object = policy.reference.clone();
        Arc::new(
            policy
                .value
                .report(object, i, lists, diagnostics, objects.network_policy),
        )
    };
    objects.policies.iter().enumerate().map(report).collect()
}

/// Workloads by scope, in the order of their uids.
#[derive(Default)]
struct Lists {
    all: Vec<WorkloadUid>,
    namespaces: Map<Arc<str>, Vec<WorkloadUid>>,
    /// By policy.
    selectors: Vec<Vec<WorkloadUid>>,
}

struct Finished {
    all: Arc<[WorkloadUid]>,
    namespaces: Map<Arc<str>, Arc<[WorkloadUid]>>,
    selectors: Vec<Arc<[WorkloadUid]>>,
}

impl Lists {
    fn add(&mut self, namespace: &Arc<str>, uid: &WorkloadUid) {
        self.all.push(uid.clone());
        match self.namespaces.get_mut(namespace) {
            Some(list) => list.push(uid.clone()),
            None => drop(self.namespaces.insert(namespace.clone(), vec![uid.clone()])),
        }
    }

    fn finish(self) -> Finished {
        Finished {
            all: self.all.into(),
            namespaces: self
                .namespaces
                .into_iter()
                .map(|(name, list)| (name, list.into()))
                .collect(),
            selectors: self.selectors.into_iter().map(Into::into).collect(),
        }
    }
}

impl SelectedWorkloads for Finished {
    fn all(&self) -> Arc<[WorkloadUid]> {
        self.all.clone()
    }

    fn of_namespace(&self, namespace: &str) -> Arc<[WorkloadUid]> {
        self.namespaces.get(namespace).cloned().unwrap_or_default()
    }

    fn of_selector(&self, policy: usize) -> Arc<[WorkloadUid]> {
        self.selectors[policy].clone()
    }
}
