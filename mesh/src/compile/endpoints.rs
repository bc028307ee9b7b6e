//! What stands behind a service.
//!
//! EndpointSlices are the truth about a service's endpoints and their readiness as soon as one
//! exists for it, because the controller that writes them knows more than the pod's status says.
//! Without any, a service with a selector has the pods that match it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::diagnostic::Diagnostic;
use crate::model::{EndpointPort, Health};

use super::addresses::Ownership;
use super::extract::{PodFacts, ServiceFacts, SliceEndpoint, SliceFacts, TargetPort};
use super::{Fact, Map};

/// An endpoint before workloads are finished: pods are positions in the list.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) ports: Vec<EndpointPort>,
    pub(super) health: Health,
    pub(super) node: Arc<str>,
    pub(super) zone: Arc<str>,
}

/// What a draft leads to; ordered as the pods are, bare addresses last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    Pod(usize),
    Address(IpAddr),
}

pub(super) type Drafts = BTreeMap<Target, Draft>;

/// Namespace, key and value.
type Label<'a> = (&'a str, &'a str, &'a str);

/// Finds pods and slices for services.
pub(super) struct Finder<'a> {
    pods: &'a [Fact<PodFacts>],
    ownership: &'a Ownership,
    by_name: Map<(&'a str, &'a str), usize>,
    by_label: Map<Label<'a>, Vec<usize>>,
    slices: Map<(&'a str, &'a str), Vec<&'a Fact<SliceFacts>>>,
}

impl<'a> Finder<'a> {
    pub(super) fn new(
        pods: &'a [Fact<PodFacts>],
        slices: &'a [Fact<SliceFacts>],
        ownership: &'a Ownership,
    ) -> Self {
        let mut finder = Self {
            pods,
            ownership,
            by_name: Map::default(),
            by_label: Map::default(),
            slices: Map::default(),
        };
        for (i, pod) in pods.iter().enumerate() {
            let workload = &pod.value.workload;
            finder
                .by_name
                .insert((&workload.namespace, &workload.name), i);
            for (key, value) in pod.value.workload.labels.iter() {
                finder
                    .by_label
                    .entry((&workload.namespace, key, value))
                    .or_default()
                    .push(i);
            }
        }
        for slice in slices {
            let service = &slice.value.service;
            finder
                .slices
                .entry((&service.namespace, &service.name))
                .or_default()
                .push(slice);
        }
        finder
    }

    /// The endpoints of a service; what is wrong with them is reported.
    pub(super) fn find(
        &self,
        service: &Fact<ServiceFacts>,
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Drafts {
        let facts = &service.value;
        let key = (&*facts.service.namespace, &*facts.service.name);
        self.report_missing_names(service, diagnostics);
        let drafts = match (self.slices.get(&key), &facts.selector) {
            (Some(slices), _) => self.listed(service, slices, diagnostics),
            (None, Some(selector)) => self.matching(facts, selector),
            (None, None) => {
                let message = "has no selector, and no EndpointSlice names it".to_owned();
                diagnostics.push(service.diagnostic("", "service_without_slices", message));
                return Drafts::new();
            }
        };
        if drafts.is_empty() {
            let message = match self.slices.contains_key(&key) {
                true => "its EndpointSlices hold no endpoint that can be used",
                false => "no live pod matches its selector",
            };
            let diagnostic =
                service.diagnostic("", "service_without_endpoints", message.to_owned());
            diagnostics.push(diagnostic);
        }
        drafts
    }

    /// The pods that have all labels of the selector: those that have its rarest one, filtered. The
    /// index makes 1,000 services of 20,000 pods a matter of milliseconds instead of seconds.
    fn selected<'s>(
        &'s self,
        namespace: &'s str,
        selector: &'s BTreeMap<String, String>,
    ) -> impl Iterator<Item = (usize, &'a PodFacts)> + 's {
        let with = |(key, value): (&'s String, &'s String)| {
            self.by_label
                .get(&(namespace, &**key, &**value))
                .map_or(&[][..], Vec::as_slice)
        };
        let rarest = selector
            .iter()
            .map(with)
            .min_by_key(|pods| pods.len())
            .unwrap_or_default();
        let pods = self.pods;
        rarest
            .iter()
            .map(move |i| (*i, &pods[*i].value))
            .filter(move |(_, pod)| {
                selector
                    .iter()
                    .all(|(key, value)| pod.workload.labels.get(key) == Some(value))
            })
    }

    fn matching(&self, facts: &ServiceFacts, selector: &BTreeMap<String, String>) -> Drafts {
        let mut drafts = Drafts::new();
        for (i, pod) in self.selected(&facts.service.namespace, selector) {
            let workload = &pod.workload;
            let usable = |ip: &IpAddr| self.ownership.leads_to(*ip, i, workload.host_network);
            let draft = Draft {
                addresses: workload.ips.iter().copied().filter(usable).collect(),
                ports: pod_ports(facts, pod),
                health: published(workload.health, facts),
                node: workload.node.clone(),
                zone: Arc::default(),
            };
            if !draft.addresses.is_empty() {
                drafts.insert(Target::Pod(i), draft);
            }
        }
        drafts
    }

    fn listed(
        &self,
        service: &Fact<ServiceFacts>,
        slices: &[&Fact<SliceFacts>],
        diagnostics: &mut Vec<Diagnostic>,
    ) -> Drafts {
        let mut drafts = Drafts::new();
        for slice in slices {
            let ports = slice_ports(&service.value, &slice.value);
            for endpoint in &slice.value.endpoints {
                let target = match self.target(&slice.value, endpoint) {
                    Ok(target) => target,
                    Err((code, message)) => {
                        diagnostics.push(slice.diagnostic(endpoint.field.clone(), code, message));
                        continue;
                    }
                };
                let draft = Draft {
                    addresses: vec![endpoint.ip],
                    ports: ports.clone(),
                    health: published(endpoint.health, &service.value),
                    node: endpoint.node.clone(),
                    zone: endpoint.zone.clone(),
                };
                merge(&mut drafts, target, draft);
            }
        }
        drafts
    }

    /// What an entry of a slice leads to. An address that a pod owns leads to that pod even if the
    /// slice does not say so: sent there as a bare address, bytes for a meshed pod would be in
    /// clear.
    fn target(
        &self,
        slice: &SliceFacts,
        endpoint: &SliceEndpoint,
    ) -> Result<Target, (&'static str, String)> {
        let ip = endpoint.ip;
        let Some((name, uid)) = &endpoint.pod else {
            return match self.ownership.pods.get(&ip) {
                Some(pod) => Ok(Target::Pod(*pod)),
                None if self.ownership.is_taken(ip) => {
                    let message = format!("{ip} is a service's, or claimed twice; it is left out");
                    Err(("endpoint_refused", message))
                }
                None => Ok(Target::Address(ip)),
            };
        };
        let pod = self
            .by_name
            .get(&(&*slice.service.namespace, &**name))
            .copied();
        let Some((i, pod)) = pod.map(|i| (i, &self.pods[i].value.workload)) else {
            let message = format!("there is no live pod {name:?}; it is left out");
            return Err(("endpoint_pod_unknown", message));
        };
        if !uid.is_empty() && *uid != pod.kube_uid {
            let message = format!("pod {name:?} is another one by now; it is left out");
            return Err(("endpoint_pod_unknown", message));
        }
        match pod.ips.contains(&ip) && self.ownership.leads_to(ip, i, pod.host_network) {
            true => Ok(Target::Pod(i)),
            false => {
                let message = format!("{ip} is not the address of pod {name:?}; it is left out");
                Err(("endpoint_refused", message))
            }
        }
    }

    /// A named target port that none of the selected pods has is a mistake even if slices exist.
    fn report_missing_names(
        &self,
        service: &Fact<ServiceFacts>,
        diagnostics: &mut Vec<Diagnostic>,
    ) {
        let facts = &service.value;
        let Some(selector) = &facts.selector else {
            return;
        };
        for (field, target) in &facts.targets {
            let TargetPort::Name(name) = target else {
                continue;
            };
            let mut pods = self.selected(&facts.service.namespace, selector).peekable();
            let some = pods.peek().is_some();
            if some && !pods.any(|(_, pod)| named_port(pod, name).is_some()) {
                let message = format!("none of the pods that it selects has a port named {name:?}");
                diagnostics.push(service.diagnostic(field.clone(), "named_port_missing", message));
            }
        }
    }
}

fn named_port(pod: &PodFacts, name: &str) -> Option<u16> {
    pod.workload
        .ports
        .iter()
        .find(|port| *port.name == *name)
        .map(|port| port.port)
}

fn pod_ports(facts: &ServiceFacts, pod: &PodFacts) -> Vec<EndpointPort> {
    let ports = facts.service.ports.iter().zip(&facts.targets);
    let resolve = |target: &TargetPort| match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Name(name) => named_port(pod, name),
    };
    ports
        .filter_map(|(port, (_, target))| {
            Some(EndpointPort {
                service: port.port,
                target: resolve(target)?,
            })
        })
        .collect()
}

fn slice_ports(facts: &ServiceFacts, slice: &SliceFacts) -> Vec<EndpointPort> {
    let target = |name: &str| {
        slice
            .ports
            .iter()
            .find(|(n, _)| **n == *name)
            .map(|(_, port)| *port)
    };
    let ports = facts.service.ports.iter();
    ports
        .filter_map(|p| {
            Some(EndpointPort {
                service: p.port,
                target: target(&p.name)?,
            })
        })
        .collect()
}

fn published(health: Health, facts: &ServiceFacts) -> Health {
    Health {
        ready: health.ready || facts.service.publish_not_ready,
        ..health
    }
}

/// One pod may be in several slices: one per family, or old and new while it is moved.
fn merge(drafts: &mut Drafts, target: Target, draft: Draft) {
    let Some(known) = drafts.get_mut(&target) else {
        drafts.insert(target, draft);
        return;
    };
    known.addresses.extend(draft.addresses);
    known.addresses.sort_unstable();
    known.addresses.dedup();
    known.ports.extend(draft.ports);
    known
        .ports
        .sort_unstable_by_key(|port| (port.service, port.target));
    known.ports.dedup_by_key(|port| port.service);
    known.health.ready |= draft.health.ready;
    known.health.serving |= draft.health.serving;
    known.health.terminating &= draft.health.terminating;
}
