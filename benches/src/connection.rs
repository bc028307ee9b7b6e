//! The decision about one inbound connection: every read of the store that it needs.

use std::net::{IpAddr, SocketAddr};

use mesh::{InboundConnection, Store, WorkloadUid};
use spiffe::SpiffeId;

use crate::cluster::{PORT, Pod};

/// A connection from one pod to another.
#[derive(Clone, Debug)]
pub struct Connection {
    source: SpiffeId,
    source_ip: IpAddr,
    uid: WorkloadUid,
    destination: SocketAddr,
}

impl Connection {
    /// A connection between two pods of the store's model.
    ///
    /// # Panics
    ///
    /// If the model is of another cluster.
    pub fn new(store: &Store, from: Pod, to: Pod) -> Self {
        let model = store.load();
        let (from, to) = (from.workload(&model), to.workload(&model));
        Self {
            source: from.identity.clone(),
            source_ip: from.ips[0],
            uid: to.uid.clone(),
            destination: SocketAddr::new(to.ips[0], PORT),
        }
    }

    /// Makes the decision of the receiving daemon: loads the model, looks up both workloads, and
    /// evaluates the policies.
    ///
    /// # Panics
    ///
    /// If the store is of another cluster.
    #[inline(never)]
    pub fn is_allowed(&self, store: &Store) -> bool {
        let model = store.load();
        let workload = model
            .workload(&self.uid)
            .expect("the workload is in the model");
        let source = model
            .workload_by_ip(self.source_ip)
            .filter(|source| source.identity == self.source);
        let connection = InboundConnection {
            source_identity: Some(&self.source),
            source_ip: self.source_ip,
            source_workload: source.map(|source| &**source),
            destination: self.destination,
        };
        model.authorize(workload, &connection).is_allowed()
    }
}
