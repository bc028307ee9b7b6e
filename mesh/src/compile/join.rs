//! The second step: combines the extracted objects into the model.

use std::net::IpAddr;
use std::sync::Arc;

use crate::diagnostic::Diagnostic;
use crate::id::ServiceName;
use crate::model::{
    AddressRefusal, Distribution, Endpoint, EndpointTarget, Load, Locality, Model, Namespace, Node,
    Workload,
};

use super::addresses::{self, AddressIndex};
use super::endpoints::{EndpointBuilder, EndpointBuilders, EndpointIndex, Target};
use super::extract::{ExtractedObjects, ExtractedPod, ExtractedService};
use super::{Extracted, Map, opt_in, policies};

/// Builds the model of these objects.
pub(super) fn join(mut objects: ExtractedObjects) -> (Model, Vec<Diagnostic>) {
    let mut diagnostics = Vec::new();
    drop_shared_uids(&mut objects, &mut diagnostics);
    let mut model = Model {
        namespaces: by_name(std::mem::take(&mut objects.namespaces), |n: &Namespace| {
            n.name.clone()
        }),
        nodes: by_name(std::mem::take(&mut objects.nodes), |n: &Node| {
            n.name.clone()
        }),
        ..Model::default()
    };
    for pod in &mut objects.pods {
        set_mode_and_locality(&mut pod.value, &model, &objects.excluded_namespaces);
    }
    let reports = policies::assign(&mut objects);
    let addresses = addresses::resolve_conflicts(
        &objects.pods,
        &objects.services,
        &objects.refused,
        &mut diagnostics,
    );
    let index = EndpointIndex::new(&objects.pods, &objects.slices, &addresses);
    let builders: Vec<EndpointBuilders> = objects
        .services
        .iter()
        .map(|service| index.find(service, &mut diagnostics))
        .collect();
    set_services_of_pods(&mut objects.pods, &objects.services, &builders);
    let workloads: Vec<Arc<Workload>> = objects
        .pods
        .into_iter()
        .map(|pod| Arc::new(pod.value.workload))
        .collect();
    add_services(
        &mut model,
        objects.services,
        builders,
        &workloads,
        &addresses,
    );
    model.by_ip = addresses
        .pods
        .iter()
        .map(|(ip, i)| (*ip, workloads[*i].clone()))
        .collect();
    model.workloads = workloads.into_iter().map(|w| (w.uid.clone(), w)).collect();
    model.refused_addresses = addresses.refused;
    model.policies = reports.into();
    (model, diagnostics)
}

/// Removes pods that share a uid. The uid identifies the network namespace of a pod, so each of them
/// might get the identity of the other.
fn drop_shared_uids(objects: &mut ExtractedObjects, diagnostics: &mut Vec<Diagnostic>) {
    let mut count: Map<Arc<str>, usize> = Map::default();
    for pod in &objects.pods {
        *count
            .entry(pod.value.workload.kube_uid.clone())
            .or_default() += 1;
    }
    let (shared, unique): (Vec<_>, Vec<_>) = std::mem::take(&mut objects.pods)
        .into_iter()
        .partition(|pod| count[&pod.value.workload.kube_uid] > 1);
    objects.pods = unique;
    for pod in shared {
        let uid = &pod.value.workload.kube_uid;
        let message = format!("{uid} is the uid of another pod too; both are left out");
        diagnostics.push(pod.diagnostic("metadata.uid", "duplicate_uid", message));
        if !pod.value.workload.host_network {
            let ips = pod.value.workload.ips.iter();
            objects
                .refused
                .extend(ips.map(|ip| (*ip, AddressRefusal::InvalidWorkload)));
        }
    }
}

fn by_name<T>(
    extracted: Vec<Extracted<T>>,
    name: impl Fn(&T) -> Arc<str>,
) -> Map<Arc<str>, Arc<T>> {
    extracted
        .into_iter()
        .map(|one| (name(&one.value), Arc::new(one.value)))
        .collect()
}

/// Sets what depends on the pod's namespace and node.
fn set_mode_and_locality(pod: &mut ExtractedPod, model: &Model, excluded: &[Arc<str>]) {
    let namespace = model.namespace(&pod.workload.namespace).map(|n| n.mode);
    pod.workload.mode = opt_in::mode(pod, namespace.unwrap_or_default(), excluded);
    if let Some(node) = model.node(&pod.workload.node) {
        pod.workload.locality = node.locality.clone();
    }
}

/// Sets the services of which each pod is an endpoint.
fn set_services_of_pods(
    pods: &mut [Extracted<ExtractedPod>],
    services: &[Extracted<ExtractedService>],
    builders: &[EndpointBuilders],
) {
    for (service, builders) in services.iter().zip(builders) {
        let name: ServiceName = service.value.service.key();
        for target in builders.keys() {
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
    services: Vec<Extracted<ExtractedService>>,
    builders: Vec<EndpointBuilders>,
    workloads: &[Arc<Workload>],
    addresses: &AddressIndex,
) {
    let mut finished = Vec::with_capacity(services.len());
    for (Extracted { value, .. }, builders) in services.into_iter().zip(builders) {
        let mut service = value.service;
        let inherited = model
            .namespace(&service.namespace)
            .and_then(|n| n.distribution);
        service.distribution = value
            .distribution
            .or(inherited)
            .unwrap_or(Distribution::Any);
        let endpoint = |(target, builder)| Arc::new(endpoint(target, builder, workloads, model));
        service.endpoints = builders.into_iter().map(endpoint).collect();
        service
            .endpoints
            .sort_unstable_by_key(|endpoint| endpoint.key());
        finished.push(Arc::new(service));
    }
    let owned: Map<IpAddr, _> = addresses
        .services
        .iter()
        .map(|(ip, i)| (*ip, finished[*i].clone()))
        .collect();
    model.by_vip = owned;
    model.external = super::external::index(finished.iter(), model.nodes.values());
    model.services = finished.into_iter().map(|s| (s.key(), s)).collect();
}

fn endpoint(
    target: Target,
    builder: EndpointBuilder,
    workloads: &[Arc<Workload>],
    model: &Model,
) -> Endpoint {
    let EndpointBuilder {
        addresses,
        ports,
        health,
        node,
        zone,
    } = builder;
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
