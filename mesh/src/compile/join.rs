//! The second step: facts put together.

use std::net::IpAddr;
use std::sync::Arc;

use crate::diagnostic::Diagnostic;
use crate::id::ServiceName;
use crate::model::{
    AddressRefusal, Distribution, Endpoint, EndpointTarget, Load, Locality, Mode, Model, Namespace,
    Node, Workload,
};

use super::addresses::{self, Ownership};
use super::endpoints::{Draft, Drafts, Finder, Target};
use super::extract::{Facts, PodFacts, ServiceFacts};
use super::{Fact, Map, policies};

/// Puts the facts together.
pub(super) fn join(mut facts: Facts) -> (Model, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    drop_shared_uids(&mut facts, &mut diagnostics);
    let mut model = Model {
        namespaces: by_name(std::mem::take(&mut facts.namespaces), |n: &Namespace| {
            n.name.clone()
        }),
        nodes: by_name(std::mem::take(&mut facts.nodes), |n: &Node| n.name.clone()),
        ..Model::default()
    };
    for pod in &mut facts.pods {
        place(&mut pod.value, &model, &facts.excluded_namespaces);
    }
    let reports = policies::assign(&mut facts);
    let ownership = addresses::settle(
        &facts.pods,
        &facts.services,
        &facts.refused,
        &mut diagnostics,
    );
    let finder = Finder::new(&facts.pods, &facts.slices, &ownership);
    let drafts: Vec<Drafts> = facts
        .services
        .iter()
        .map(|service| finder.find(service, &mut diagnostics))
        .collect();
    enlist(&mut facts.pods, &facts.services, &drafts);
    let workloads: Vec<Arc<Workload>> = facts
        .pods
        .into_iter()
        .map(|pod| Arc::new(pod.value.workload))
        .collect();
    add_services(&mut model, facts.services, drafts, &workloads, &ownership);
    model.by_ip = ownership
        .pods
        .iter()
        .map(|(ip, i)| (*ip, workloads[*i].clone()))
        .collect();
    model.workloads = workloads.into_iter().map(|w| (w.uid.clone(), w)).collect();
    model.refused_addresses = ownership.refused;
    model.policies = reports.into();
    (model, diagnostics)
}

/// A pod's uid leads to its network namespace. If two pods have the same one, either might be
/// given the other's identity: both are left out.
fn drop_shared_uids(facts: &mut Facts, diagnostics: &mut Vec<Diagnostic>) {
    let mut count: Map<Arc<str>, usize> = Map::default();
    for pod in &facts.pods {
        *count
            .entry(pod.value.workload.kube_uid.clone())
            .or_default() += 1;
    }
    let (shared, unique): (Vec<_>, Vec<_>) = std::mem::take(&mut facts.pods)
        .into_iter()
        .partition(|pod| count[&pod.value.workload.kube_uid] > 1);
    facts.pods = unique;
    for pod in shared {
        let uid = &pod.value.workload.kube_uid;
        let message = format!("{uid} is the uid of another pod too; both are left out");
        diagnostics.push(pod.diagnostic("metadata.uid", "duplicate_uid", message));
        if !pod.value.workload.host_network {
            let ips = pod.value.workload.ips.iter();
            facts
                .refused
                .extend(ips.map(|ip| (*ip, AddressRefusal::InvalidWorkload)));
        }
    }
}

fn by_name<T>(facts: Vec<Fact<T>>, name: impl Fn(&T) -> Arc<str>) -> Map<Arc<str>, Arc<T>> {
    facts
        .into_iter()
        .map(|fact| (name(&fact.value), Arc::new(fact.value)))
        .collect()
}

/// Fills in what depends on namespace and node.
fn place(pod: &mut PodFacts, model: &Model, excluded: &[Arc<str>]) {
    let namespace = model.namespace(&pod.workload.namespace).map(|n| n.mode);
    pod.workload.mode = mode(pod, namespace.unwrap_or_default(), excluded);
    if let Some(node) = model.node(&pod.workload.node) {
        pod.workload.locality = node.locality.clone();
    }
}

/// Istio's precedence: the pod's own label wins over its namespace's; some pods never.
fn mode(pod: &PodFacts, namespace: Mode, excluded: &[Arc<str>]) -> Mode {
    let never =
        pod.workload.host_network || pod.has_sidecar || excluded.contains(&pod.workload.namespace);
    match never {
        true => Mode::Plain,
        false => pod.mode.unwrap_or(namespace),
    }
}

/// Tells each pod of which services it is an endpoint.
fn enlist(pods: &mut [Fact<PodFacts>], services: &[Fact<ServiceFacts>], drafts: &[Drafts]) {
    for (service, drafts) in services.iter().zip(drafts) {
        let name: ServiceName = service.value.service.key();
        for target in drafts.keys() {
            if let Target::Pod(i) = target {
                pods[*i].value.workload.services.push(name.clone());
            }
        }
    }
    for pod in pods {
        pod.value.workload.services.sort_unstable();
    }
}

fn add_services(
    model: &mut Model,
    services: Vec<Fact<ServiceFacts>>,
    drafts: Vec<Drafts>,
    workloads: &[Arc<Workload>],
    ownership: &Ownership,
) {
    let mut finished = Vec::with_capacity(services.len());
    for (Fact { value, .. }, drafts) in services.into_iter().zip(drafts) {
        let mut service = value.service;
        let inherited = model
            .namespace(&service.namespace)
            .and_then(|n| n.distribution);
        service.distribution = value
            .distribution
            .or(inherited)
            .unwrap_or(Distribution::Any);
        let endpoint = |(target, draft)| Arc::new(endpoint(target, draft, workloads, model));
        service.endpoints = drafts.into_iter().map(endpoint).collect();
        service
            .endpoints
            .sort_unstable_by_key(|endpoint| endpoint.key());
        finished.push(Arc::new(service));
    }
    let owned: Map<IpAddr, _> = ownership
        .services
        .iter()
        .map(|(ip, i)| (*ip, finished[*i].clone()))
        .collect();
    model.by_vip = owned;
    model.external = super::external::index(finished.iter(), model.nodes.values());
    model.services = finished.into_iter().map(|s| (s.key(), s)).collect();
}

fn endpoint(target: Target, draft: Draft, workloads: &[Arc<Workload>], model: &Model) -> Endpoint {
    let Draft {
        addresses,
        ports,
        health,
        node,
        zone,
    } = draft;
    match target {
        Target::Pod(i) => {
            let workload = workloads[i].clone();
            let (locality, node) = (workload.locality.clone(), workload.node.clone());
            let target = EndpointTarget::Workload(workload);
            Endpoint {
                target,
                addresses,
                ports,
                health,
                locality,
                node,
            }
        }
        Target::Address(ip) => {
            let known = model.node(&node).map(|n| n.locality.clone());
            let locality = known.unwrap_or(Locality {
                zone,
                ..Locality::default()
            });
            let target = EndpointTarget::Address {
                ip,
                load: Load::default(),
            };
            Endpoint {
                target,
                addresses,
                ports,
                health,
                locality,
                node,
            }
        }
    }
}
