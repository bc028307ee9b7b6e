//! The metrics of the authority.

use std::time::{Duration, SystemTime};

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use super::state::CaStatus;

/// Buckets from the time of a signature to the deadline of a request.
const DURATION_BUCKETS_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
];

/// The metrics of the authority.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    pub(super) issued: IntCounter,
    refused: IntCounterVec,
    duration: Histogram,
    pub(super) connections: IntGauge,
    pub(super) handshakes_failed: IntCounter,
    issuer_expiry: IntGauge,
    root_expiry: IntGauge,
    roots: IntGauge,
    next_signs_at: IntGauge,
}

impl Metrics {
    /// Creates and registers all metrics.
    ///
    /// # Errors
    /// Fails if two metrics have the same name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let refused = IntCounterVec::new(
            Opts::new("ambit_ca_refused_total", "Refused requests"),
            &["reason"],
        )?;
        registry.register(Box::new(refused.clone()))?;
        let duration = Histogram::with_opts(
            HistogramOpts::new(
                "ambit_ca_request_duration_seconds",
                "From the arrival of a request to its response",
            )
            .buckets(DURATION_BUCKETS_SECONDS.to_vec()),
        )?;
        registry.register(Box::new(duration.clone()))?;
        let counter = |name, help| -> prometheus::Result<IntCounter> {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let gauge = |name, help| -> prometheus::Result<IntGauge> {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        Ok(Self {
            issued: counter("ambit_ca_issued_total", "Issued certificates")?,
            handshakes_failed: counter(
                "ambit_ca_handshakes_failed_total",
                "Connections whose TLS handshake failed",
            )?,
            connections: gauge("ambit_ca_connections", "Open connections")?,
            issuer_expiry: gauge(
                "ambit_ca_issuer_expiry_timestamp_seconds",
                "Expiry of the signing certificate",
            )?,
            root_expiry: gauge(
                "ambit_ca_root_expiry_timestamp_seconds",
                "Earliest expiry of the distributed roots",
            )?,
            roots: gauge("ambit_ca_roots", "Distributed roots")?,
            next_signs_at: gauge(
                "ambit_ca_signing_moves_timestamp_seconds",
                "When the next authority starts to sign; 0 if there is none",
            )?,
            refused,
            duration,
            registry,
        })
    }

    /// Counts a refused request. Reasons are constants, so the label has few values.
    pub(super) fn record_refusal(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    pub(super) fn observe_duration(&self, duration: Duration) {
        self.duration.observe(duration.as_secs_f64());
    }

    pub(super) fn set_status(&self, status: &CaStatus) {
        self.issuer_expiry
            .set(unix_seconds(Some(status.issuer_expiry)));
        self.root_expiry
            .set(unix_seconds(status.earliest_root_expiry));
        self.roots
            .set(i64::try_from(status.root_count).unwrap_or(i64::MAX));
        self.next_signs_at.set(unix_seconds(status.next_signs_at));
    }

    /// All metrics in Prometheus' text format.
    pub fn scrape(&self) -> String {
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "cannot encode the metrics");
        }
        text
    }
}

/// 0 if there is no time.
fn unix_seconds(at: Option<SystemTime>) -> i64 {
    at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
        .map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
}
