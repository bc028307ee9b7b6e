//! Which services have which external addresses and node ports? Pod IPs and cluster IPs take
//! precedence: any author of a Service may name any external address.

use std::net::IpAddr;
use std::sync::Arc;

use super::Map;
use crate::model::{External, Node, Service};

/// Indexes services by external address. An address that two services claim is left out, and so are
/// services with `internalTrafficPolicy: Local`, which is not defined for external clients.
pub(super) fn index<'a>(
    services: impl Iterator<Item = &'a Arc<Service>>,
    nodes: impl Iterator<Item = &'a Arc<Node>>,
) -> External {
    let mut by_address: Map<(IpAddr, u16), Option<Arc<Service>>> = Map::default();
    let mut by_node_port: Map<u16, Option<Arc<Service>>> = Map::default();
    for service in services.filter(|service| !service.node_local) {
        for port in &service.ports {
            for ip in &service.external {
                claim(&mut by_address, (*ip, port.port), service);
            }
            if let Some(node_port) = port.node_port {
                claim(&mut by_node_port, node_port, service);
            }
        }
    }
    External {
        by_address: undisputed(by_address),
        by_node_port: undisputed(by_node_port),
        nodes: nodes.flat_map(|node| &node.addresses).copied().collect(),
    }
}

fn claim<K: Eq + std::hash::Hash>(
    claims: &mut Map<K, Option<Arc<Service>>>,
    key: K,
    service: &Arc<Service>,
) {
    claims
        .entry(key)
        .and_modify(|owner| *owner = None)
        .or_insert_with(|| Some(service.clone()));
}

/// The keys with one owner.
fn undisputed<K: Eq + std::hash::Hash>(
    claims: Map<K, Option<Arc<Service>>>,
) -> Map<K, Arc<Service>> {
    let owned = claims.into_iter();
    owned
        .filter_map(|(key, owner)| Some((key, owner?)))
        .collect()
}
