//! The attributes of a connection that policies match.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use spiffe::SpiffeId;

use crate::id::{NamedPort, WorkloadUid};

/// The attributes of one connection, computed once for all policies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionAttributes<'a> {
    /// `None` for plaintext.
    pub(super) source: Option<SourceIdentity<'a>>,
    /// Never in IPv4-mapped form, like the destination.
    pub(super) source_ip: IpAddr,
    /// `None` for a source outside the cluster or on the host's network.
    pub(super) source_pod: Option<SourcePod<'a>>,
    pub(super) destination: SocketAddr,
    pub(super) destination_pod: DestinationPod<'a>,
}

/// A verified identity and its parts.
#[derive(Clone, Copy, Debug)]
pub(super) struct SourceIdentity<'a> {
    pub(super) id: &'a SpiffeId,
    /// Empty unless the path has Istio's form `/ns/<namespace>/sa/<service account>`.
    pub(super) namespace: &'a str,
    pub(super) service_account: &'a str,
}

/// The pod at the source address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SourcePod<'a> {
    pub(crate) uid: &'a WorkloadUid,
    pub(crate) namespace: &'a str,
    pub(crate) labels: &'a BTreeMap<String, String>,
    /// `None` if the namespace has no object.
    pub(crate) namespace_labels: Option<&'a BTreeMap<String, String>>,
}

/// The pod that the connection is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DestinationPod<'a> {
    pub(crate) uid: &'a WorkloadUid,
    pub(crate) named_ports: &'a [NamedPort],
}

impl<'a> ConnectionAttributes<'a> {
    pub(crate) fn new(
        source_identity: Option<&'a SpiffeId>,
        source_ip: IpAddr,
        source_pod: Option<SourcePod<'a>>,
        destination: SocketAddr,
        destination_pod: DestinationPod<'a>,
    ) -> Self {
        Self {
            source: source_identity.map(SourceIdentity::new),
            source_ip: source_ip.to_canonical(),
            source_pod,
            destination: SocketAddr::new(destination.ip().to_canonical(), destination.port()),
            destination_pod,
        }
    }

    /// Whether a pod connects to itself.
    pub(super) fn is_from_destination(&self) -> bool {
        let source = self.source_pod;
        source.is_some_and(|pod| pod.uid == self.destination_pod.uid)
    }
}

impl<'a> SourceIdentity<'a> {
    fn new(id: &'a SpiffeId) -> Self {
        let account = id.path().strip_prefix("/ns/");
        let account = account.and_then(|rest| rest.split_once("/sa/"));
        let (namespace, service_account) = account
            .filter(|(namespace, name)| !namespace.contains('/') && !name.contains('/'))
            .unwrap_or_default();
        Self {
            id,
            namespace,
            service_account,
        }
    }
}
