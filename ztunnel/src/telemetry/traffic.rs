//! Istio's TCP metrics: one series per label set. A connection looks its series up once, by one
//! hash in its worker's cache, when it opens.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mesh::{Service, Workload, WorkloadUid};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, LabelPair, Metric, MetricFamily, MetricType};
use rustc_hash::FxHashMap;

use super::labels::{ConnectionLabels, Direction, LABEL_NAMES, RESPONSE_FLAGS_INDEX};

/// Istio's `response_flags`: the class of a failure, which its dashboards select on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum ResponseFlags {
    /// Not a failure.
    None,
    /// A policy denied the connection.
    Deny,
    /// The destination could not be reached.
    Connect,
    /// The tunnel's TLS handshake failed.
    TlsFailure,
    /// The tunnel's HTTP/2 handshake failed.
    H2HandshakeFailure,
    /// The tunnel's port did not respond, the symptom of a NetworkPolicy that blocks it.
    NetworkPolicy,
    /// The pod has no usable certificate.
    IdentityError,
    /// The peer's certificate is revoked.
    CertRevoked,
}

impl ResponseFlags {
    const ALL: [Self; 8] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
        Self::CertRevoked,
    ];

    const fn value(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

/// The counters of one label set. Open connections hold it.
#[derive(Debug)]
pub(crate) struct TrafficSeries {
    labels: [Arc<str>; LABEL_NAMES.len()],
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    failed: [AtomicU64; ResponseFlags::ALL.len()],
}

impl TrafficSeries {
    pub(crate) fn record_opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn record_closed(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn record_failure(&self, flags: ResponseFlags) {
        self.failed[flags as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds bytes from and to the client. On both sides Istio's metrics name the first "received"
    /// and the second "sent" (istio/istio#32399).
    pub(crate) fn add_bytes(&self, from_client: u64, to_client: u64) {
        if from_client > 0 {
            self.received.fetch_add(from_client, Ordering::Relaxed);
        }
        if to_client > 0 {
            self.sent.fetch_add(to_client, Ordering::Relaxed);
        }
    }
}

/// All series, as a Prometheus collector. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct TrafficMetrics {
    series: Arc<Mutex<HashMap<[Arc<str>; LABEL_NAMES.len()], Entry>>>,
    descs: Arc<[Desc; 5]>,
}

#[derive(Debug)]
struct Entry {
    series: Arc<TrafficSeries>,
    /// Consecutive sweeps in which only this entry held the series.
    idle_sweeps: u32,
}

/// Name and help of the five metrics, as in Istio.
const METRICS: [(&str, &str); 5] = [
    (
        "istio_tcp_connections_opened_total",
        "The total number of TCP connections opened",
    ),
    (
        "istio_tcp_connections_closed_total",
        "The total number of TCP connections closed",
    ),
    (
        "istio_tcp_received_bytes_total",
        "The size of total bytes received during request in case of a TCP connection",
    ),
    (
        "istio_tcp_sent_bytes_total",
        "The size of total bytes sent during response in case of a TCP connection",
    ),
    (
        "istio_tcp_connections_failed_total",
        "The total number of TCP connections failed",
    ),
];

impl TrafficMetrics {
    pub(super) fn new() -> prometheus::Result<Self> {
        let names: Vec<String> = LABEL_NAMES.iter().map(ToString::to_string).collect();
        let desc = |index: usize| {
            Desc::new(
                METRICS[index].0.into(),
                METRICS[index].1.into(),
                names.clone(),
                HashMap::new(),
            )
        };
        let descs = Arc::new([desc(0)?, desc(1)?, desc(2)?, desc(3)?, desc(4)?]);
        Ok(Self {
            series: Arc::default(),
            descs,
        })
    }

    /// The series of these labels. Builds all label values, so workers cache the result.
    fn series(&self, labels: &ConnectionLabels) -> Arc<TrafficSeries> {
        let labels = labels.values();
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = all.entry(labels).or_insert_with_key(|labels| Entry {
            series: Arc::new(TrafficSeries {
                labels: labels.clone(),
                opened: AtomicU64::new(0),
                closed: AtomicU64::new(0),
                sent: AtomicU64::new(0),
                received: AtomicU64::new(0),
                failed: Default::default(),
            }),
            idle_sweeps: 0,
        });
        entry.idle_sweeps = 0;
        entry.series.clone()
    }

    /// Drops the series that neither a worker's cache nor a connection held for `max_idle`
    /// consecutive calls, so that deleted workloads leave the scrape.
    pub(super) fn sweep(&self, max_idle: u32) {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, entry| {
            entry.idle_sweeps = if Arc::strong_count(&entry.series) > 1 {
                0
            } else {
                entry.idle_sweeps + 1
            };
            entry.idle_sweeps < max_idle
        });
    }
}

impl Collector for TrafficMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // A copy, so that a worker does not wait for the lock during a long scrape.
        let all: Vec<Arc<TrafficSeries>> = self
            .series
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(|entry| entry.series.clone())
            .collect();
        let of = |pick: fn(&TrafficSeries) -> &AtomicU64| {
            all.iter()
                .map(|series| metric(series, ResponseFlags::None, pick(series)))
                .collect::<Vec<_>>()
        };
        let failed = all.iter().flat_map(|series| {
            let counts = ResponseFlags::ALL
                .into_iter()
                .map(move |flags| (flags, &series.failed[flags as usize]));
            counts
                .filter(|(_, count)| count.load(Ordering::Relaxed) > 0)
                .map(move |(flags, count)| metric(series, flags, count))
        });
        [
            of(|s| &s.opened),
            of(|s| &s.closed),
            of(|s| &s.received),
            of(|s| &s.sent),
            failed.collect(),
        ]
        .into_iter()
        .zip(METRICS)
        .filter(|(metrics, _)| !metrics.is_empty())
        .map(|(metrics, (name, help))| counter_family(name, help, metrics))
        .collect()
    }
}

/// A counter with these samples.
pub(super) fn counter_family(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.into());
    family.set_help(help.into());
    family.set_field_type(MetricType::COUNTER);
    family.set_metric(metrics);
    family
}

fn metric(series: &TrafficSeries, flags: ResponseFlags, value: &AtomicU64) -> Metric {
    let labels =
        LABEL_NAMES
            .iter()
            .zip(&series.labels)
            .enumerate()
            .map(|(index, (name, value))| {
                let mut pair = LabelPair::default();
                pair.set_name((*name).into());
                pair.set_value(if index == RESPONSE_FLAGS_INDEX {
                    flags.value().into()
                } else {
                    value.to_string()
                });
                pair
            });
    let mut metric = Metric::from_label(labels.collect());
    let mut counter = Counter::default();
    // A Prometheus sample is a float; counts stay exact up to 2^53.
    #[allow(clippy::cast_precision_loss)]
    counter.set_value(value.load(Ordering::Relaxed) as f64);
    metric.set_counter(counter);
    metric
}

/// Label sets that one worker caches. A node's pods talk to fewer peers than this; above it the
/// cache is emptied, and each label set is built once more.
const MAX_CACHED_SERIES: usize = 4096;

/// Identifies a label set cheaply: by the addresses of the objects that it is made of. An address
/// identifies one version of one object, and is not reused while the cached entry holds the object.
#[derive(PartialEq, Eq, Hash)]
struct CacheKey {
    reporter: Direction,
    source: usize,
    destination: usize,
    service: usize,
    has_source_identity: bool,
    mutual_tls: bool,
}

struct CachedSeries {
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    // Held so that the address in the key is not reused.
    _service: Option<Arc<Service>>,
    series: Arc<TrafficSeries>,
}

/// One worker's cache of the series that its connections count in.
#[derive(Default)]
pub(super) struct SeriesCache {
    entries: FxHashMap<CacheKey, CachedSeries>,
}

impl SeriesCache {
    /// The series of these labels; one hash of six words if it is cached.
    pub(super) fn series(
        &mut self,
        metrics: &TrafficMetrics,
        labels: &ConnectionLabels,
    ) -> Arc<TrafficSeries> {
        // The key implies a verified identity only if it is the source workload's own. Any other is
        // looked up by all labels.
        let is_implied_by_key = match (&labels.source, &labels.source_identity) {
            (Some(source), Some(verified)) => source.identity == **verified,
            (_, None) => true,
            (None, Some(_)) => false,
        };
        if !is_implied_by_key {
            return metrics.series(labels);
        }
        let key = CacheKey {
            reporter: labels.reporter,
            source: address(labels.source.as_ref()),
            destination: address(labels.destination.as_ref()),
            service: address(labels.service.as_ref()),
            has_source_identity: labels.source_identity.is_some(),
            mutual_tls: labels.mutual_tls,
        };
        if let Some(entry) = self.entries.get(&key) {
            return entry.series.clone();
        }
        if self.entries.len() >= MAX_CACHED_SERIES {
            self.entries.clear();
        }
        let series = metrics.series(labels);
        let entry = CachedSeries {
            source: labels.source.clone(),
            destination: labels.destination.clone(),
            _service: labels.service.clone(),
            series: series.clone(),
        };
        self.entries.insert(key, entry);
        series
    }

    /// Drops the entries of a workload that was deleted.
    pub(super) fn remove_workload(&mut self, uid: &WorkloadUid) {
        let is_it = |workload: &Option<Arc<Workload>>| {
            workload
                .as_ref()
                .is_some_and(|workload| workload.uid == *uid)
        };
        self.entries
            .retain(|_, entry| !is_it(&entry.source) && !is_it(&entry.destination));
    }
}

fn address<T>(object: Option<&Arc<T>>) -> usize {
    object.map_or(0, |object| Arc::as_ptr(object).addr())
}
