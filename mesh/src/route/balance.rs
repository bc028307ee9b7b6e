//! Choosing one endpoint of a service.
//!
//! In this order: `internalTrafficPolicy`, readiness, what was tried, the address family that was
//! asked for, nearness, then session affinity or the less loaded of two drawn at random (P2C). One
//! pass over the endpoints, without allocation.

use std::net::{IpAddr, SocketAddr};

use crate::model::{
    Affinity, Distribution, Endpoint, EndpointKey, EndpointTarget, Service, Workload,
};

use super::reachable;

/// An endpoint of the family that was asked for is nearer than any of the other one.
const SAME_FAMILY: u8 = 8;

/// The endpoint and the address to dial, or the reason code why there is none.
pub(super) fn choose<'a>(
    service: &'a Service,
    source: &Workload,
    destination: SocketAddr,
    tried: &[EndpointKey],
    rng: &mut fastrand::Rng,
) -> Result<(&'a Endpoint, SocketAddr), &'static str> {
    let served = |endpoint: &'a Endpoint| {
        let ip = reachable(endpoint, source, destination.ip())?;
        Some(SocketAddr::new(
            ip,
            endpoint.target_port(destination.port())?,
        ))
    };
    let local = |e: &Endpoint| !service.node_local || e.node == source.node;
    let allowed = || {
        let endpoints = service.endpoints.iter().map(|endpoint| &**endpoint);
        endpoints
            .filter(|e| local(e))
            .filter_map(|e| Some((e, served(e)?)))
    };
    // As kube-proxy: endpoints that are going away serve only while no ready one exists.
    let any_ready = allowed().any(|(e, _)| e.health.ready);
    let takes_traffic = |e: &Endpoint| match any_ready {
        true => e.health.ready,
        false => e.health.serving && e.health.terminating,
    };
    let usable = allowed().filter(|(e, _)| takes_traffic(e));
    let mut draw = Draw::new(service.affinity, source);
    for (endpoint, target) in usable.filter(|(e, _)| !is_tried(e, tried)) {
        // Hand-written endpoints have one family each; the other one is for those that lack this one.
        let family = u8::from(target.is_ipv6() == destination.is_ipv6()) * SAME_FAMILY;
        let nearness = nearness(service.distribution, source, endpoint);
        draw.offer(family + nearness, endpoint, target, rng);
    }
    draw.outcome().ok_or_else(|| {
        let usable = allowed().any(|(e, _)| takes_traffic(e));
        match (
            service.endpoints.is_empty(),
            allowed().next().is_some(),
            usable,
        ) {
            (true, ..) => "no_endpoint",
            (_, _, true) => "endpoints_exhausted",
            (_, true, _) => "no_healthy_endpoint",
            _ if !service.endpoints.iter().any(|e| local(e)) => "no_local_endpoint",
            _ => "no_endpoint_for_port",
        }
    })
}

fn is_tried(endpoint: &Endpoint, tried: &[EndpointKey]) -> bool {
    tried.iter().any(|key| match (key, &endpoint.target) {
        (EndpointKey::Workload(uid), EndpointTarget::Workload(w)) => *uid == w.uid,
        (EndpointKey::Address(tried), EndpointTarget::Address { ip, .. }) => tried == ip,
        _ => false,
    })
}

/// How much of the way from region to node the two share; more is nearer.
fn nearness(distribution: Distribution, source: &Workload, endpoint: &Endpoint) -> u8 {
    let (here, there) = (&source.locality, &endpoint.locality);
    let same = |a: &str, b: &str| !a.is_empty() && a == b;
    // A bare endpoint says its zone but not its region.
    let region = here.region == there.region || there.region.is_empty();
    let zone = region && same(&here.zone, &there.zone);
    let region = region && same(&here.region, &there.region);
    match distribution {
        Distribution::Any => 0,
        _ if distribution == Distribution::PreferSameNode && same(&source.node, &endpoint.node) => {
            4
        }
        Distribution::PreferSameNode if zone && same(&here.subzone, &there.subzone) => 3,
        _ if zone => 2,
        _ if region => 1,
        _ => 0,
    }
}

/// Draws among the nearest endpoints while they pass by.
struct Draw<'a> {
    client: Option<IpAddr>,
    nearness: u8,
    seen: usize,
    picks: [Option<(&'a Endpoint, SocketAddr)>; 2],
    best_score: u64,
}

impl<'a> Draw<'a> {
    fn new(affinity: Affinity, source: &Workload) -> Self {
        // The primary address whatever family was used, so that both families lead to one endpoint.
        let client = source
            .ips
            .first()
            .copied()
            .filter(|_| affinity == Affinity::ClientIp);
        Self {
            client,
            nearness: 0,
            seen: 0,
            picks: [None, None],
            best_score: 0,
        }
    }

    fn offer(
        &mut self,
        nearness: u8,
        endpoint: &'a Endpoint,
        target: SocketAddr,
        rng: &mut fastrand::Rng,
    ) {
        if nearness > self.nearness {
            *self = Self {
                nearness,
                seen: 0,
                picks: [None, None],
                best_score: 0,
                ..*self
            };
        }
        if nearness < self.nearness {
            return;
        }
        self.seen += 1;
        match self.client {
            Some(client) => self.keep_best(score(client, endpoint), endpoint, target),
            None => self.sample(endpoint, target, rng),
        }
    }

    fn keep_best(&mut self, score: u64, endpoint: &'a Endpoint, target: SocketAddr) {
        if self.picks[0].is_none() || score > self.best_score {
            self.best_score = score;
            self.picks[0] = Some((endpoint, target));
        }
    }

    /// Reservoir sampling of two: after n endpoints each is held with probability 2/n.
    fn sample(&mut self, endpoint: &'a Endpoint, target: SocketAddr, rng: &mut fastrand::Rng) {
        let place = if self.seen <= 2 {
            self.seen - 1
        } else {
            rng.usize(..self.seen)
        };
        if let Some(pick) = self.picks.get_mut(place) {
            *pick = Some((endpoint, target));
        }
        // Equal loads go to the first pick, so the first two must not stay in order.
        if self.seen == 2 && rng.bool() {
            self.picks.swap(0, 1);
        }
    }

    fn outcome(self) -> Option<(&'a Endpoint, SocketAddr)> {
        match self.picks {
            [Some(a), Some(b)] if b.0.load().active() < a.0.load().active() => Some(b),
            [a, _] => a,
        }
    }
}

/// Rendezvous hashing: each client prefers the endpoint of the highest score, so a client moves
/// only when its own endpoint goes, and finds the same one after a restart and on every node.
fn score(client: IpAddr, endpoint: &Endpoint) -> u64 {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    hash.ip(client);
    match &endpoint.target {
        EndpointTarget::Workload(workload) => hash.bytes(workload.uid.as_str().as_bytes()),
        EndpointTarget::Address { ip, .. } => hash.ip(*ip),
    }
    hash.finish()
}

/// FNV-1a with the finalizer of MurmurHash3. Written out because the outcome must never change
/// with a library: it decides which endpoint a client keeps.
struct Fnv(u64);

impl Fnv {
    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn ip(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(v4) => self.bytes(&v4.octets()),
            IpAddr::V6(v6) => self.bytes(&v6.octets()),
        }
    }

    fn finish(self) -> u64 {
        let mut h = self.0;
        h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        h ^ (h >> 33)
    }
}
