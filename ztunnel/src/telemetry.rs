//! What the daemon reports: metrics with Istio's names and labels, the access log, and its own log.
//!
//! A connection costs one hash of six words when it opens, a few atomic additions while it is open,
//! and one formatted line, sent to a bounded queue, when it ends. No reader of metrics or logs can
//! make a connection wait.

mod access_log;
mod denials;
mod labels;
mod line;
mod log;
mod metrics;
mod scrape;
mod traffic;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::SystemTime;

use mesh::WorkloadUid;
use mesh::certs::CertificatesState;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use spiffe::SpiffeId;
use tokio::runtime::Handle;

pub use labels::Direction;
pub use line::LogFormat;
pub use log::{Log, LogConfig, LogError, LogGuard};

pub(crate) use access_log::AccessLogEntry;
pub(crate) use labels::ConnectionLabels;
pub(crate) use traffic::{ResponseFlags, TrafficSeries};

use metrics::Metrics;
use scrape::ScrapeMetrics;
use traffic::{SeriesCache, TrafficMetrics};

/// Sweeps for which a series may be unused before it leaves the scrape. At one sweep a minute this
/// is one hour, as long as the longest usual `rate()` window of dashboards.
const MAX_IDLE_SWEEPS: u32 = 60;

/// The metrics and the access log of the process.
pub struct Telemetry {
    registry: Registry,
    traffic: TrafficMetrics,
    metrics: Metrics,
    scrape_metrics: ScrapeMetrics,
    log: Option<Log>,
}

impl Telemetry {
    /// Registers all metrics. Access-log lines go to `log`; without one they are discarded.
    ///
    /// # Errors
    /// Fails if two metrics have the same name.
    pub fn new(log: Option<Log>) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let traffic = metrics::registered(&registry, TrafficMetrics::new()?)?;
        let metrics = Metrics::register(&registry)?;
        let scrape_metrics = metrics::registered(&registry, ScrapeMetrics::new(log.clone())?)?;
        let build = IntGaugeVec::new(
            Opts::new("istio_build", "Istio component build info"),
            &["component", "tag"],
        )?;
        build
            .with_label_values(&["ztunnel", env!("CARGO_PKG_VERSION")])
            .set(1);
        registry.register(Box::new(build))?;
        Ok(Self {
            registry,
            traffic,
            metrics,
            scrape_metrics,
            log,
        })
    }

    /// The registry, for metrics of other parts of the daemon.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// Fails if a collector returns invalid metrics.
    pub fn scrape(&self) -> prometheus::Result<String> {
        let mut text = String::with_capacity(64 * 1024);
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    /// Sets how many pods are in each enrolment state; a state that is not named has none.
    pub fn record_enrolment(&self, states: &[(&str, usize)]) {
        self.metrics.record_enrolment(states);
    }

    /// Counts a pod that was added to the data plane.
    pub fn record_pod_started(&self) {
        self.metrics.proxies_started.inc();
    }

    /// Counts a pod that was removed from the data plane.
    pub fn record_pod_stopped(&self) {
        self.metrics.proxies_stopped.inc();
    }

    /// Counts a repair of a pod's capture.
    pub fn record_capture_repair(&self, reason: &str) {
        self.metrics
            .capture_repairs
            .with_label_values(&[reason])
            .inc();
    }

    /// Adds packets that the node's guard has dropped.
    pub fn record_guard_drops(&self, packets: u64) {
        self.metrics.guard_dropped.inc_by(packets);
    }

    /// Sets how many problems the configuration has.
    pub fn record_problems(&self, count: usize) {
        self.metrics
            .problems
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Sets when the certificate of an identity expires; none removes the identity.
    pub(crate) fn record_certificate_expiry(
        &self,
        identity: &SpiffeId,
        expiry: Option<SystemTime>,
    ) {
        self.metrics.certificates.record_expiry(identity, expiry);
    }

    /// Sets the counts of issued and failed certificates, and the expiry of the trust bundle.
    pub(crate) fn record_certificates(&self, state: &CertificatesState) {
        self.metrics.certificates.record_counters(&state.counters);
        self.metrics.certificates.record_bundle(&state.bundle);
    }

    /// Drops series that were unused for an hour. To be called once a minute.
    pub(crate) fn sweep(&self) {
        self.traffic.sweep(MAX_IDLE_SWEEPS);
        self.metrics.policy_denials.sweep(MAX_IDLE_SWEEPS);
        self.metrics.dry_run_denials.sweep(MAX_IDLE_SWEEPS);
    }
}

/// One worker's access to the telemetry: the shared metrics, and a cache of series of its own.
pub(crate) struct WorkerTelemetry {
    shared: Arc<Telemetry>,
    cache: RefCell<SeriesCache>,
    outbound_open: IntGauge,
    inbound_open: IntGauge,
}

impl WorkerTelemetry {
    /// To be called in the worker's runtime, whose metrics it exports.
    pub(crate) fn new(shared: Arc<Telemetry>) -> Self {
        shared.scrape_metrics.add_runtime(Handle::current());
        let open = &shared.metrics.sockets_open;
        let (outbound_open, inbound_open) = (
            open.with_label_values(&["source"]),
            open.with_label_values(&["destination"]),
        );
        Self {
            shared,
            cache: RefCell::default(),
            outbound_open,
            inbound_open,
        }
    }

    /// The series in which a connection with these labels counts.
    pub(crate) fn traffic_series(&self, labels: &ConnectionLabels) -> Arc<TrafficSeries> {
        self.cache.borrow_mut().series(&self.shared.traffic, labels)
    }

    /// Counts a connection as open until the guard is dropped.
    pub(crate) fn track_open(&self, direction: Direction) -> OpenConnectionGuard {
        let gauge = match direction {
            Direction::Outbound => &self.outbound_open,
            Direction::Inbound => &self.inbound_open,
        };
        gauge.inc();
        OpenConnectionGuard(gauge.clone())
    }

    /// Counts a failed connection under its reason code.
    pub(crate) fn record_failure(&self, direction: Direction, reason: &str) {
        self.shared
            .metrics
            .failures
            .with_label_values(&[direction.name(), reason])
            .inc();
    }

    /// Counts a connection that a policy refused or ended.
    pub(crate) fn record_denial(&self, policy: &Arc<str>) {
        self.shared.metrics.policy_denials.count(policy);
    }

    /// Counts a connection that a dry-run policy would have denied.
    pub(crate) fn record_dry_run_denial(&self, policy: &Arc<str>) {
        self.shared.metrics.dry_run_denials.count(policy);
    }

    /// Counts a connection that could not be accepted.
    pub(crate) fn record_accept_failure(&self, reason: &str) {
        self.shared
            .metrics
            .accept_failures
            .with_label_values(&[reason])
            .inc();
    }

    /// Writes the access-log line of a connection, if its level is enabled.
    pub(crate) fn log_access(&self, entry: &AccessLogEntry<'_>) {
        let Some(log) = &self.shared.log else { return };
        // One macro call per level, because each call site caches whether its own level is enabled.
        let is_enabled = if entry.level() == tracing::Level::ERROR {
            tracing::enabled!(target: "access", tracing::Level::ERROR)
        } else {
            tracing::enabled!(target: "access", tracing::Level::INFO)
        };
        if is_enabled {
            log.write(&entry.line(log.format()));
        }
    }

    /// All metrics in Prometheus' text format.
    #[cfg(test)]
    pub(crate) fn scrape(&self) -> String {
        self.shared.scrape().unwrap()
    }

    /// Drops the cached series of a workload that was deleted.
    pub(crate) fn remove_workload(&self, uid: &WorkloadUid) {
        self.cache.borrow_mut().remove_workload(uid);
    }

    /// Empties the cache, so that it does not keep replaced versions of objects.
    pub(crate) fn clear_cache(&self) {
        self.cache.take();
    }
}

/// Counts a connection as open until dropped.
pub(crate) struct OpenConnectionGuard(IntGauge);

impl Drop for OpenConnectionGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests;
