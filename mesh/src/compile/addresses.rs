//! Who owns which address. An address that two claim is owned by neither.

use std::net::IpAddr;

use rustc_hash::FxHashSet as Set;

use crate::diagnostic::Diagnostic;
use crate::model::AddressRefusal;

use super::extract::{PodFacts, ServiceFacts};
use super::{Fact, Map};

/// Owners by address, as positions in the lists of pods and services.
#[derive(Debug, Default)]
pub(super) struct Ownership {
    pub(super) pods: Map<IpAddr, usize>,
    pub(super) services: Map<IpAddr, usize>,
    pub(super) refused: Map<IpAddr, AddressRefusal>,
}

impl Ownership {
    /// Whether this pod may be reached by this address under its own identity. A host-network pod
    /// does not own its node's address, but may be reached by it unless somebody else owns it.
    pub(super) fn leads_to(&self, ip: IpAddr, pod: usize, host_network: bool) -> bool {
        match self.pods.get(&ip) {
            Some(owner) => *owner == pod,
            None => host_network && !self.is_taken(ip),
        }
    }

    /// It is refused, or a service's.
    pub(super) fn is_taken(&self, ip: IpAddr) -> bool {
        self.refused.contains_key(&ip) || self.services.contains_key(&ip)
    }
}

/// Settles all claims.
pub(super) fn settle(
    pods: &[Fact<PodFacts>],
    services: &[Fact<ServiceFacts>],
    unreadable: &[(IpAddr, AddressRefusal)],
    diagnostics: &mut Vec<Diagnostic>,
) -> Ownership {
    let mut ownership = Ownership::default();
    settle_pods(pods, &mut ownership, diagnostics);
    settle_services(services, &mut ownership, diagnostics);
    settle_between(services, &mut ownership, diagnostics);
    let hosts = pods
        .iter()
        .map(|pod| &pod.value.workload)
        .filter(|w| w.host_network);
    let nodes: Set<IpAddr> = hosts.flat_map(|host| &host.ips).copied().collect();
    for (ip, refusal) in unreadable {
        // What cannot be read takes nothing from what can.
        let owned = ownership.pods.contains_key(ip) || ownership.services.contains_key(ip);
        if !owned && !nodes.contains(ip) {
            ownership.refused.entry(*ip).or_insert(*refusal);
        }
    }
    ownership
}

/// A pod that is terminating may already have given its address back, so it yields to one that is
/// not. Between equals nobody can say who answers: the address is refused.
fn settle_pods(
    pods: &[Fact<PodFacts>],
    ownership: &mut Ownership,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let live = pods
        .iter()
        .enumerate()
        .filter(|(_, pod)| !pod.value.workload.host_network);
    let claims = claims(live.map(|(i, pod)| (i, pod.value.workload.ips.as_slice())));
    for (ip, mut claimants) in claims {
        let stays = |i: &usize| !pods[*i].value.workload.health.terminating;
        if claimants.iter().any(stays) {
            claimants.retain(stays);
        }
        if let [owner] = claimants[..] {
            ownership.pods.insert(ip, owner);
            continue;
        }
        ownership.refused.insert(ip, AddressRefusal::DuplicatePodIp);
        for &i in &claimants {
            let others = names(
                claimants
                    .iter()
                    .filter(|other| **other != i)
                    .map(|o| &pods[*o]),
            );
            let message = format!("{ip} is also claimed by {others}; nothing is sent to it");
            let code = AddressRefusal::DuplicatePodIp.code();
            diagnostics.push(pods[i].diagnostic("status.podIPs", code, message));
        }
    }
}

fn settle_services(
    services: &[Fact<ServiceFacts>],
    ownership: &mut Ownership,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let all = services.iter().enumerate();
    for (ip, claimants) in claims(all.map(|(i, s)| (i, s.value.service.vips.as_slice()))) {
        if let [owner] = claimants[..] {
            ownership.services.insert(ip, owner);
            continue;
        }
        // A refusal because of pods stays: it is settled between the kinds next.
        ownership
            .refused
            .entry(ip)
            .or_insert(AddressRefusal::DuplicateServiceIp);
        for &i in &claimants {
            let others = claimants.iter().filter(|other| **other != i);
            let others = names(others.map(|o| &services[*o]));
            let message = format!("{ip} is also claimed by {others}; nothing is sent to it");
            let code = AddressRefusal::DuplicateServiceIp.code();
            diagnostics.push(services[i].diagnostic("spec.clusterIPs", code, message));
        }
    }
}

/// An address that pods and services claim is nobody's, however many of each claim it.
fn settle_between(
    services: &[Fact<ServiceFacts>],
    ownership: &mut Ownership,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let all = services
        .iter()
        .flat_map(|s| s.value.service.vips.iter().map(move |ip| (s, *ip)));
    for (service, ip) in all {
        let refused = ownership.refused.get(&ip);
        let is_pods = ownership.pods.remove(&ip).is_some()
            || matches!(
                refused,
                Some(AddressRefusal::DuplicatePodIp | AddressRefusal::PodIpIsServiceIp)
            );
        if is_pods {
            ownership.services.remove(&ip);
            ownership
                .refused
                .insert(ip, AddressRefusal::PodIpIsServiceIp);
            let message = format!("{ip} is also the address of a pod; nothing is sent to it");
            let code = AddressRefusal::PodIpIsServiceIp.code();
            diagnostics.push(service.diagnostic("spec.clusterIPs", code, message));
        }
    }
}

fn claims<'a>(of: impl Iterator<Item = (usize, &'a [IpAddr])>) -> Map<IpAddr, Vec<usize>> {
    let mut claims: Map<IpAddr, Vec<usize>> = Map::default();
    for (claimant, ips) in of {
        for ip in ips {
            claims.entry(*ip).or_default().push(claimant);
        }
    }
    claims
}

fn names<'a, T: 'a>(facts: impl Iterator<Item = &'a Fact<T>>) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<String> = facts.map(|fact| fact.reference.to_string()).collect();
    if names.len() > SHOWN {
        let more = names.len() - SHOWN;
        names.truncate(SHOWN);
        names.push(format!("{more} more"));
    }
    names.join(", ")
}
