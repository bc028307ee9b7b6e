//! The inbound decision: may this connection reach this workload?
//!
//! Collects the attributes of the connection from the model; [`crate::policy`] decides.

use std::net::{IpAddr, SocketAddr};

use spiffe::SpiffeId;

use crate::model::{Model, Workload};
use crate::policy::{ConnectionAttributes, Decision, DestinationPod, SourcePod};

/// One connection to a workload, as the receiving node sees it after decapsulation.
#[derive(Clone, Copy, Debug)]
pub struct InboundConnection<'a> {
    /// The identity of the source, verified by mutual TLS; `None` for plaintext.
    pub source_identity: Option<&'a SpiffeId>,
    /// The address of the source pod; an IPv4 address is never in its IPv4-mapped form.
    pub source_ip: IpAddr,
    /// The workload with that address, unless its identity contradicts `source_identity`.
    /// NetworkPolicies match its labels.
    pub source_workload: Option<&'a Workload>,
    /// The pod's own address and port: those within the tunnel.
    pub destination: SocketAddr,
}

impl Model {
    /// Decides whether a connection may reach a workload. Takes no lock and does not allocate.
    ///
    /// `workload` must come from this model, not from the model at the start of the connection:
    /// it carries the policies that select it.
    pub fn authorize(&self, workload: &Workload, connection: &InboundConnection<'_>) -> Decision {
        match workload.policies.is_empty() {
            true => Decision::default(),
            false => workload
                .policies
                .decide(&self.attributes(workload, connection)),
        }
    }

    fn attributes<'a>(
        &'a self,
        workload: &'a Workload,
        connection: &InboundConnection<'a>,
    ) -> ConnectionAttributes<'a> {
        // The address of a pod on the host's network is its node's, so it identifies no pod.
        let pod = connection.source_workload.filter(|pod| !pod.host_network);
        let source_pod = pod.map(|pod| SourcePod {
            uid: &pod.uid,
            namespace: &pod.namespace,
            labels: &pod.labels,
            namespace_labels: self.namespace(&pod.namespace).map(|n| &*n.labels),
        });
        let destination_pod = DestinationPod {
            uid: &workload.uid,
            named_ports: &workload.ports,
        };
        ConnectionAttributes::new(
            connection.source_identity,
            connection.source_ip,
            source_pod,
            connection.destination,
            destination_pod,
        )
    }
}
