//! Which endpoint of a service does a connection use?
//!
//! Filters and ranks in this order: `internalTrafficPolicy`, readiness, endpoints tried before, the
//! address family of the destination, locality, then session affinity or the less loaded of two
//! random endpoints (P2C). One pass over the endpoints, without allocation.

use std::net::SocketAddr;

use crate::model::{Distribution, Endpoint, EndpointKey, EndpointTarget, Service, Workload};

use super::affinity::ClientHash;
use super::reachable_address;

/// The bonus for the destination's address family; larger than any other difference in nearness.
const SAME_FAMILY_BONUS: u8 = 8;

/// Chooses an endpoint and the address to dial.
///
/// # Errors
///
/// The reason code why there is none; see [`route`](super::route()).
pub(super) fn choose<'a>(
    service: &'a Service,
    source: &Workload,
    destination: SocketAddr,
    tried: &[EndpointKey],
    rng: &mut fastrand::Rng,
) -> Result<(&'a Endpoint, SocketAddr), &'static str> {
    let target = |endpoint: &'a Endpoint| {
        let ip = reachable_address(endpoint, source, destination.ip())?;
        Some(SocketAddr::new(
            ip,
            endpoint.target_port(destination.port())?,
        ))
    };
    let is_local = |e: &Endpoint| !service.node_local || e.node == source.node;
    let eligible = || {
        let endpoints = service.endpoints.iter().map(|endpoint| &**endpoint);
        endpoints
            .filter(|e| is_local(e))
            .filter_map(|e| Some((e, target(e)?)))
    };
    // As in kube-proxy: terminating endpoints serve only while no ready one exists.
    let any_ready = eligible().any(|(e, _)| e.health.ready);
    let takes_traffic = |e: &Endpoint| match any_ready {
        true => e.health.ready,
        false => e.health.serving && e.health.terminating,
    };
    let usable = eligible().filter(|(e, _)| takes_traffic(e));
    let mut candidates = Candidates::new(ClientHash::new(service.affinity, source));
    for (endpoint, target) in usable.filter(|(e, _)| !is_tried(e, tried)) {
        // Manually written endpoints have one family each. The other family is only a fallback.
        let family = u8::from(target.is_ipv6() == destination.is_ipv6()) * SAME_FAMILY_BONUS;
        let nearness = nearness(service.distribution, source, endpoint);
        candidates.offer(family + nearness, endpoint, target, rng);
    }
    candidates.into_choice().ok_or_else(|| {
        let usable = eligible().any(|(e, _)| takes_traffic(e));
        match (
            service.endpoints.is_empty(),
            eligible().next().is_some(),
            usable,
        ) {
            (true, ..) => "no_endpoint",
            (_, _, true) => "endpoints_exhausted",
            (_, true, _) => "no_healthy_endpoint",
            _ if !service.endpoints.iter().any(|e| is_local(e)) => "no_local_endpoint",
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

/// How many levels from region to node the two share; more is nearer.
fn nearness(distribution: Distribution, source: &Workload, endpoint: &Endpoint) -> u8 {
    let (here, there) = (&source.locality, &endpoint.locality);
    let same = |a: &str, b: &str| !a.is_empty() && a == b;
    // An endpoint without a pod has a zone but no region.
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

/// The nearest candidates so far, while all endpoints are offered one by one.
struct Candidates<'a> {
    /// With session affinity: the score decides instead of the load.
    client: Option<ClientHash>,
    nearness: u8,
    /// The number of candidates of this nearness.
    count: usize,
    picks: [Option<(&'a Endpoint, SocketAddr)>; 2],
    best_score: u64,
}

impl<'a> Candidates<'a> {
    fn new(client: Option<ClientHash>) -> Self {
        Self {
            client,
            nearness: 0,
            count: 0,
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
                ..Self::new(self.client)
            };
        }
        if nearness < self.nearness {
            return;
        }
        self.count += 1;
        match self.client {
            Some(client) => self.keep_best(client.score(endpoint), endpoint, target),
            None => self.sample(endpoint, target, rng),
        }
    }

    fn keep_best(&mut self, score: u64, endpoint: &'a Endpoint, target: SocketAddr) {
        if self.picks[0].is_none() || score > self.best_score {
            self.best_score = score;
            self.picks[0] = Some((endpoint, target));
        }
    }

    /// Reservoir sampling of two: after n endpoints each is picked with probability 2/n.
    fn sample(&mut self, endpoint: &'a Endpoint, target: SocketAddr, rng: &mut fastrand::Rng) {
        let slot = if self.count <= 2 {
            self.count - 1
        } else {
            rng.usize(..self.count)
        };
        if let Some(pick) = self.picks.get_mut(slot) {
            *pick = Some((endpoint, target));
        }
        // Equal loads go to the first pick, so the first two must not stay in order.
        if self.count == 2 && rng.bool() {
            self.picks.swap(0, 1);
        }
    }

    /// The less loaded pick.
    fn into_choice(self) -> Option<(&'a Endpoint, SocketAddr)> {
        match self.picks {
            [Some(a), Some(b)] if b.0.load().active() < a.0.load().active() => Some(b),
            [a, _] => a,
        }
    }
}
