//! Istio's TCP metrics: one series per label set, found by one hash when a connection opens and by
//! none while it lives.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, LabelPair, Metric, MetricFamily, MetricType};

use super::labels::{NAMES, Parties, RESPONSE_FLAGS};

/// Istio's `response_flags`: why a connection failed, as coarse as its dashboards need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum ResponseFlags {
    /// It did not fail.
    None,
    /// The connection was refused by policy.
    Deny,
    /// The destination could not be reached.
    Connect,
    /// The tunnel's TLS handshake failed.
    TlsFailure,
    /// The tunnel's HTTP/2 handshake failed.
    H2HandshakeFailure,
    /// The tunnel's port did not answer, as when a NetworkPolicy blocks it.
    NetworkPolicy,
    /// There was no certificate to use, or the peer was somebody else.
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

/// The counters of one label set. Connections hold it while they are open.
#[derive(Debug)]
pub struct Series {
    labels: [Arc<str>; NAMES.len()],
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
    failed: [AtomicU64; ResponseFlags::ALL.len()],
}

impl Series {
    pub(crate) fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn closed(&self) {
        self.closed.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, flags: ResponseFlags) {
        self.failed[flags as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Adds bytes: `requests` from the opener, `responses` back to it. Istio calls the first
    /// received and the second sent on both sides (istio/istio#32399).
    pub(crate) fn moved(&self, requests: u64, responses: u64) {
        if requests > 0 {
            self.received.fetch_add(requests, Ordering::Relaxed);
        }
        if responses > 0 {
            self.sent.fetch_add(responses, Ordering::Relaxed);
        }
    }
}

/// All series, as a Prometheus collector.
#[derive(Clone, Debug)]
pub(super) struct Traffic {
    series: Arc<Mutex<HashMap<[Arc<str>; NAMES.len()], Held>>>,
    descs: Arc<[Desc; 5]>,
}

/// A series, and for how many sweeps in a row nobody but the collector has held it.
#[derive(Debug)]
struct Held {
    series: Arc<Series>,
    idle: u32,
}

/// The five metrics: name, and help as Istio gives it.
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

impl Traffic {
    pub(super) fn new() -> prometheus::Result<Self> {
        let names: Vec<String> = NAMES.iter().map(ToString::to_string).collect();
        let desc = |at: usize| {
            Desc::new(
                METRICS[at].0.into(),
                METRICS[at].1.into(),
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

    /// The series of these labels. Costs building the labels; workers keep the answer.
    pub(super) fn series(&self, parties: &Parties) -> Arc<Series> {
        let labels = parties.values();
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let held = all.entry(labels).or_insert_with_key(|labels| Held {
            series: Arc::new(Series {
                labels: labels.clone(),
                opened: AtomicU64::new(0),
                closed: AtomicU64::new(0),
                sent: AtomicU64::new(0),
                received: AtomicU64::new(0),
                failed: Default::default(),
            }),
            idle: 0,
        });
        held.idle = 0;
        held.series.clone()
    }

    /// Drops the series that no worker and no connection has held for `sweeps` calls in a row, so
    /// that workloads that went do not stay in every scrape for ever.
    pub(super) fn sweep(&self, sweeps: u32) {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, held| {
            held.idle = if Arc::strong_count(&held.series) > 1 {
                0
            } else {
                held.idle + 1
            };
            held.idle < sweeps
        });
    }
}

impl Collector for Traffic {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // The list is copied so that a scrape of many series never makes a worker wait for the
        // lock.
        let all: Vec<Arc<Series>> = self
            .series
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(|held| held.series.clone())
            .collect();
        let of = |pick: fn(&Series) -> &AtomicU64| {
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
        .map(|(metrics, (name, help))| family(name, help, metrics))
        .collect()
    }
}

/// A counter of these series.
pub(super) fn family(name: &str, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.into());
    family.set_help(help.into());
    family.set_field_type(MetricType::COUNTER);
    family.set_metric(metrics);
    family
}

fn metric(series: &Series, flags: ResponseFlags, value: &AtomicU64) -> Metric {
    let labels = NAMES
        .iter()
        .zip(&series.labels)
        .enumerate()
        .map(|(at, (name, value))| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).into());
            pair.set_value(if at == RESPONSE_FLAGS {
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
