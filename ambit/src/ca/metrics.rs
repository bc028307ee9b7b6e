//! What the authority counts.

use std::time::{Duration, SystemTime};

use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use super::keeper::Standing;

/// From a signature's own time to a request's deadline.
const SECONDS: &[f64] = &[
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
    issuer_end: IntGauge,
    root_end: IntGauge,
    roots: IntGauge,
    moves_at: IntGauge,
}

impl Metrics {
    /// All of them, registered.
    ///
    /// # Errors
    /// Fails if two have one name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let refused = IntCounterVec::new(
            Opts::new("ambit_ca_refused_total", "Requests that were refused"),
            &["reason"],
        )?;
        registry.register(Box::new(refused.clone()))?;
        let duration = Histogram::with_opts(
            HistogramOpts::new(
                "ambit_ca_request_duration_seconds",
                "From a request's arrival to its answer",
            )
            .buckets(SECONDS.to_vec()),
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
            issued: counter("ambit_ca_issued_total", "Certificates that were signed")?,
            handshakes_failed: counter(
                "ambit_ca_handshakes_failed_total",
                "Connections that ended before TLS was established",
            )?,
            connections: gauge("ambit_ca_connections", "Open connections")?,
            issuer_end: gauge(
                "ambit_ca_issuer_expiry_timestamp_seconds",
                "When the certificate that signs expires",
            )?,
            root_end: gauge(
                "ambit_ca_root_expiry_timestamp_seconds",
                "When the first of the roots that are handed out expires",
            )?,
            roots: gauge("ambit_ca_roots", "Roots that are handed out")?,
            moves_at: gauge(
                "ambit_ca_signing_moves_timestamp_seconds",
                "When another authority starts to sign; 0 if none waits",
            )?,
            refused,
            duration,
            registry,
        })
    }

    /// A request was refused. Reasons are constants, so there are few.
    pub(super) fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    pub(super) fn took(&self, time: Duration) {
        self.duration.observe(time.as_secs_f64());
    }

    pub(super) fn standing(&self, standing: &Standing) {
        self.issuer_end.set(timestamp(Some(standing.issuer_end)));
        self.root_end.set(timestamp(standing.first_root_end));
        self.roots
            .set(i64::try_from(standing.roots).unwrap_or(i64::MAX));
        self.moves_at.set(timestamp(standing.moves_at));
    }

    /// All of them in Prometheus' text format.
    pub fn scrape(&self) -> String {
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "the metrics cannot be written");
        }
        text
    }
}

fn timestamp(at: Option<SystemTime>) -> i64 {
    at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
        .map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
}
