//! Who owns an address? An address that two pods or services claim has no owner and is refused.

use std::net::IpAddr;

use rustc_hash::FxHashSet as Set;

use crate::diagnostic::Diagnostic;
use crate::model::AddressRefusal;

use super::extract::{ExtractedPod, ExtractedService};
use super::{Extracted, Map};

/// Owners by address, as positions in the lists of pods and services.
#[derive(Debug, Default)]
pub(super) struct AddressIndex {
    pub(super) pods: Map<IpAddr, usize>,
    pub(super) services: Map<IpAddr, usize>,
    pub(super) refused: Map<IpAddr, AddressRefusal>,
}

impl AddressIndex {
    /// Whether this address may be used to reach this pod under its own identity. A host-network pod
    /// does not own its node's address, but is reached by it unless the address has another owner.
    pub(super) fn identifies_pod(&self, ip: IpAddr, pod: usize, host_network: bool) -> bool {
        match self.pods.get(&ip) {
            Some(owner) => *owner == pod,
            None => host_network && !self.is_taken(ip),
        }
    }

    /// Whether it is refused or owned by a service.
    pub(super) fn is_taken(&self, ip: IpAddr) -> bool {
        self.refused.contains_key(&ip) || self.services.contains_key(&ip)
    }
}

/// Finds the owner of each address and reports conflicts.
pub(super) fn resolve_conflicts(
    pods: &[Extracted<ExtractedPod>],
    services: &[Extracted<ExtractedService>],
    unreadable: &[(IpAddr, AddressRefusal)],
    diagnostics: &mut Vec<Diagnostic>,
) -> AddressIndex {
    let mut addresses = AddressIndex::default();
    resolve_pods(pods, &mut addresses, diagnostics);
    resolve_services(services, &mut addresses, diagnostics);
    refuse_shared_by_pods_and_services(services, &mut addresses, diagnostics);
    let hosts = pods
        .iter()
        .map(|pod| &pod.value.workload)
        .filter(|w| w.host_network);
    let nodes: Set<IpAddr> = hosts.flat_map(|host| &host.ips).copied().collect();
    for (ip, refusal) in unreadable {
        // An unreadable object takes no address from a readable one.
        let owned = addresses.pods.contains_key(ip) || addresses.services.contains_key(ip);
        if !owned && !nodes.contains(ip) {
            addresses.refused.entry(*ip).or_insert(*refusal);
        }
    }
    addresses
}

/// Addresses of pods. A terminating pod may have released its address already, so it yields to a live
/// one. Two live or two terminating pods are a conflict: the address is refused.
fn resolve_pods(
    pods: &[Extracted<ExtractedPod>],
    addresses: &mut AddressIndex,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let live = pods
        .iter()
        .enumerate()
        .filter(|(_, pod)| !pod.value.workload.host_network);
    let claims = claims(live.map(|(i, pod)| (i, pod.value.workload.ips.as_slice())));
    for (ip, mut claimants) in claims {
        let is_live = |i: &usize| !pods[*i].value.workload.health.terminating;
        if claimants.iter().any(is_live) {
            claimants.retain(is_live);
        }
        if let [owner] = claimants[..] {
            addresses.pods.insert(ip, owner);
            continue;
        }
        addresses.refused.insert(ip, AddressRefusal::DuplicatePodIp);
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

fn resolve_services(
    services: &[Extracted<ExtractedService>],
    addresses: &mut AddressIndex,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let all = services.iter().enumerate();
    for (ip, claimants) in claims(all.map(|(i, s)| (i, s.value.service.vips.as_slice()))) {
        if let [owner] = claimants[..] {
            addresses.services.insert(ip, owner);
            continue;
        }
        // A refusal because of pods takes precedence; conflicts between the kinds are resolved next.
        addresses
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

/// Refuses addresses that both pods and services claim.
fn refuse_shared_by_pods_and_services(
    services: &[Extracted<ExtractedService>],
    addresses: &mut AddressIndex,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let all = services
        .iter()
        .flat_map(|s| s.value.service.vips.iter().map(move |ip| (s, *ip)));
    for (service, ip) in all {
        let refused = addresses.refused.get(&ip);
        let is_pods = addresses.pods.remove(&ip).is_some()
            || matches!(
                refused,
                Some(AddressRefusal::DuplicatePodIp | AddressRefusal::PodIpIsServiceIp)
            );
        if is_pods {
            addresses.services.remove(&ip);
            addresses
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

/// The references of objects, for a message.
fn names<'a, T: 'a>(objects: impl Iterator<Item = &'a Extracted<T>>) -> String {
    const SHOWN: usize = 5;
    let mut names: Vec<String> = objects.map(|object| object.reference.to_string()).collect();
    if names.len() > SHOWN {
        let more = names.len() - SHOWN;
        names.truncate(SHOWN);
        names.push(format!("{more} more"));
    }
    names.join(", ")
}
