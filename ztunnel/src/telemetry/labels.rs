//! Istio's label set of a connection: names, order, and what each value is taken from.

use std::sync::Arc;

use mesh::{Service, Workload};
use spiffe::SpiffeId;

use crate::dataplane::Direction;

/// The labels of every `istio_tcp_*` metric, in Istio's order.
pub(super) const NAMES: [&str; 27] = [
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

/// Place of `response_flags`, the one label that is known only at the end.
pub(super) const RESPONSE_FLAGS: usize = 21;

/// How Istio spells what is not known.
const UNKNOWN: &str = "unknown";

/// Who takes part in a connection, as far as it is known.
#[derive(Clone, Debug)]
pub(crate) struct Parties {
    /// Which side this daemon stands on.
    pub(crate) reporter: Direction,
    /// The workload that opened it; on the inbound side a guess by address, for telemetry only.
    pub(crate) source: Option<Arc<Workload>>,
    /// Who the source proved to be.
    pub(crate) source_identity: Option<Arc<SpiffeId>>,
    /// The workload that it reaches.
    pub(crate) destination: Option<Arc<Workload>>,
    /// The service that was addressed.
    pub(crate) service: Option<Arc<Service>>,
    /// Whether both sides proved who they are.
    pub(crate) mutual_tls: bool,
}

impl Parties {
    /// The values for [`NAMES`], without the one at [`RESPONSE_FLAGS`].
    pub(super) fn values(&self) -> [Arc<str>; NAMES.len()] {
        let unknown: Arc<str> = UNKNOWN.into();
        let mut values = std::array::from_fn(|_| unknown.clone());
        let mut set = |at: usize, value: &Arc<str>| {
            if !value.is_empty() {
                values[at] = value.clone();
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
            for (at, value) in of_workload(source)
                .into_iter()
                .enumerate()
                .filter(|(at, _)| *at != PRINCIPAL)
            {
                set(1 + at, value);
            }
            set(23, &source.locality.region);
            set(24, &source.locality.zone);
        }
        if let Some(identity) = &self.source_identity {
            set(1 + PRINCIPAL, &identity.to_string().into());
        }
        if let Some(service) = &self.service {
            set(9, &service.hostname);
            set(10, &service.namespace);
            set(11, &service.name);
        }
        if let Some(destination) = &self.destination {
            for (at, value) in of_workload(destination)
                .into_iter()
                .enumerate()
                .filter(|(at, _)| *at != PRINCIPAL)
            {
                set(12 + at, value);
            }
            set(12 + PRINCIPAL, &destination.identity.to_string().into());
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

/// Place of the principal among the eight labels of a workload.
const PRINCIPAL: usize = 4;

/// The eight labels of a workload. Istio fills `app` and `version` from the canonical service, and
/// dashboards rely on it. The value at [`PRINCIPAL`] is a placeholder: a principal is proven, not
/// looked up.
fn of_workload(workload: &Workload) -> [&Arc<str>; 8] {
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
