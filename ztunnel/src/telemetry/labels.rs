//! Istio's label set of a connection: names, order, and the source of each value.

use std::sync::Arc;

use mesh::{Service, Workload};
use spiffe::SpiffeId;

/// The labels of every `istio_tcp_*` metric, in Istio's order.
pub(super) const LABEL_NAMES: [&str; 27] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
];

/// Index of `response_flags`, the only label that is not known before the end.
pub(super) const RESPONSE_FLAGS_INDEX: usize = 21;

/// Istio's value of a label that is not known.
const UNKNOWN: &str = "unknown";

/// The direction of a connection, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// A client connected to the pod.
    Inbound,
    /// The pod connected to a destination.
    Outbound,
}

impl Direction {
    /// The value in the access log and in `ambit_connection_failures_total`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// Both sides of a connection, as far as they are known.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionLabels {
    /// Inbound at the destination, outbound at the source.
    pub(crate) reporter: Direction,
    /// The client's workload. On the inbound side it is looked up by address, for telemetry only.
    pub(crate) source: Option<Arc<Workload>>,
    /// The verified identity of the client.
    pub(crate) source_identity: Option<Arc<SpiffeId>>,
    /// The workload that the connection reaches.
    pub(crate) destination: Option<Arc<Workload>>,
    /// The service that was addressed.
    pub(crate) service: Option<Arc<Service>>,
    /// Whether both sides are verified.
    pub(crate) mutual_tls: bool,
}

impl ConnectionLabels {
    /// The values of [`LABEL_NAMES`]; the one at [`RESPONSE_FLAGS_INDEX`] is unset.
    pub(super) fn values(&self) -> [Arc<str>; LABEL_NAMES.len()] {
        let unknown: Arc<str> = UNKNOWN.into();
        let mut values = std::array::from_fn(|_| unknown.clone());
        let mut set = |index: usize, value: &Arc<str>| {
            if !value.is_empty() {
                values[index] = value.clone();
            }
        };
        set(
            0,
            &match self.reporter {
                Direction::Outbound => "source".into(),
                Direction::Inbound => "destination".into(),
            },
        );
        if let Some(source) = &self.source {
            for (index, value) in workload_labels(source)
                .into_iter()
                .enumerate()
                .filter(|(index, _)| *index != PRINCIPAL_INDEX)
            {
                set(1 + index, value);
            }
            set(23, &source.locality.region);
            set(24, &source.locality.zone);
        }
        if let Some(identity) = &self.source_identity {
            set(1 + PRINCIPAL_INDEX, &identity.to_string().into());
        }
        if let Some(service) = &self.service {
            set(9, &service.hostname);
            set(10, &service.namespace);
            set(11, &service.name);
        }
        if let Some(destination) = &self.destination {
            for (index, value) in workload_labels(destination)
                .into_iter()
                .enumerate()
                .filter(|(index, _)| *index != PRINCIPAL_INDEX)
            {
                set(12 + index, value);
            }
            set(
                12 + PRINCIPAL_INDEX,
                &destination.identity.to_string().into(),
            );
            set(25, &destination.locality.region);
            set(26, &destination.locality.zone);
        }
        set(20, &"tcp".into());
        if self.mutual_tls {
            set(22, &"mutual_tls".into());
        }
        values
    }
}

/// Index of the principal among the eight labels of a workload.
const PRINCIPAL_INDEX: usize = 4;

/// The eight labels of a workload. As in Istio, `app` and `version` are the canonical service and
/// revision; dashboards depend on that. The value at [`PRINCIPAL_INDEX`] is a placeholder: a
/// principal is verified, not looked up.
fn workload_labels(workload: &Workload) -> [&Arc<str>; 8] {
    [
        &workload.workload_name,
        &workload.canonical_name,
        &workload.canonical_revision,
        &workload.namespace,
        &workload.name,
        &workload.canonical_name,
        &workload.canonical_revision,
        &workload.cluster,
    ]
}
