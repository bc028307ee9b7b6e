//! What the daemon tells the outside: metrics with Istio's names and labels, the access log, and
//! its own log.
//!
//! A connection's cost is one hash of six words when it opens, a few atomic additions while it
//! lives, and one formatted line, handed to a bounded queue, when it ends. No reader of any of it
//! can make a connection wait.

mod access;
mod cache;
mod certificates;
mod denials;
mod labels;
mod line;
mod log;
mod metrics;
mod process;
mod traffic;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::SystemTime;

use mesh::WorkloadUid;
use mesh::certs::CertificatesState;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use spiffe::SpiffeId;
use tokio::runtime::Handle;

pub use line::Format;
pub use log::{Log, LogConfig, LogError, LogGuard};
pub use traffic::Series;

pub(crate) use access::Ended;
pub(crate) use labels::Parties;
pub(crate) use traffic::ResponseFlags;

use crate::dataplane::Direction;
use cache::Cache;
use metrics::{Metrics, Pull, Pulled};
use process::Process;
use traffic::Traffic;

/// For how many sweeps a series may be unused before it leaves the scrape. Swept once a minute: one
/// hour, as long as the slowest dashboards look back with `rate()`.
const IDLE_SWEEPS: u32 = 60;

/// The metrics and the access log of the process.
pub struct Telemetry {
    registry: Registry,
    traffic: Traffic,
    metrics: Metrics,
    pulled: Arc<Pulled>,
    log: Option<Log>,
}

impl Telemetry {
    /// The metrics, all registered; access-log lines go to `log`, or nowhere without one.
    ///
    /// # Errors
    /// Fails if two metrics have one name.
    pub fn new(log: Option<Log>) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let traffic = metrics::registered(&registry, Traffic::new()?)?;
        let metrics = Metrics::register(&registry)?;
        let pulled = Arc::new(Pulled::new(log.clone())?);
        registry.register(Box::new(Pull(pulled.clone())))?;
        registry.register(Box::new(Process::new()?))?;
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
            pulled,
            log,
        })
    }

    /// Where other parts of the daemon register metrics of their own.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// All metrics in Prometheus' text format.
    ///
    /// # Errors
    /// Fails if a collector answers nonsense.
    pub fn scrape(&self) -> prometheus::Result<String> {
        let mut text = String::with_capacity(64 * 1024);
        TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    /// Publishes how many pods are in each state; states that are not named have none.
    pub fn enrolment(&self, states: &[(&str, usize)]) {
        self.metrics.enrolment.reset();
        let mut pending = 0;
        for (state, pods) in states {
            let pods = i64::try_from(*pods).unwrap_or(i64::MAX);
            self.metrics
                .enrolment
                .with_label_values(&[*state])
                .set(pods);
            match *state {
                "enrolled" => self.metrics.active_proxies.set(pods),
                "pending" => pending = pods,
                _ => {}
            }
        }
        if !states.iter().any(|(state, _)| *state == "enrolled") {
            self.metrics.active_proxies.set(0);
        }
        self.metrics.pending_proxies.set(pending);
    }

    /// Counts a pod that was taken into the data plane.
    pub fn pod_started(&self) {
        self.metrics.proxies_started.inc();
    }

    /// Counts a pod that left the data plane.
    pub fn pod_stopped(&self) {
        self.metrics.proxies_stopped.inc();
    }

    /// Counts a repair of a pod's capture.
    pub fn capture_repaired(&self, reason: &str) {
        self.metrics
            .capture_repairs
            .with_label_values(&[reason])
            .inc();
    }

    /// Counts packets that the node's guard has dropped.
    pub fn guard_dropped(&self, packets: u64) {
        self.metrics.guard_dropped.inc_by(packets);
    }

    /// Publishes how many problems the configuration has.
    pub fn problems(&self, count: usize) {
        self.metrics
            .problems
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Publishes when the certificate of an identity expires; none, if it has none.
    pub(crate) fn certificate(&self, identity: &SpiffeId, expiry: Option<SystemTime>) {
        self.metrics.certificates.expiry(identity, expiry);
    }

    /// Publishes what has become of certificates so far, and whom the mesh trusts.
    pub(crate) fn certificates(&self, state: &CertificatesState) {
        self.metrics.certificates.counters(&state.counters);
        self.metrics.certificates.bundle(&state.bundle);
    }

    /// Drops series that nobody has used for an hour. To be called once a minute.
    pub(crate) fn sweep(&self) {
        self.traffic.sweep(IDLE_SWEEPS);
        self.metrics.policy_denials.sweep(IDLE_SWEEPS);
        self.metrics.dry_run_denials.sweep(IDLE_SWEEPS);
    }
}

/// One worker's access to the telemetry: the shared counters, and an index that is its own.
pub(crate) struct WorkerTelemetry {
    shared: Arc<Telemetry>,
    cache: RefCell<Cache>,
    outbound_open: IntGauge,
    inbound_open: IntGauge,
}

impl WorkerTelemetry {
    pub(crate) fn new(shared: Arc<Telemetry>) -> Self {
        shared.pulled.watch(Handle::current());
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

    /// The series that a connection of these parties counts in.
    pub(crate) fn series(&self, parties: &Parties) -> Arc<Series> {
        self.cache
            .borrow_mut()
            .series(&self.shared.traffic, parties)
    }

    /// Counts a connection as open until the answer is dropped.
    pub(crate) fn open(&self, direction: Direction) -> Open {
        let gauge = match direction {
            Direction::Outbound => &self.outbound_open,
            Direction::Inbound => &self.inbound_open,
        };
        gauge.inc();
        Open(gauge.clone())
    }

    /// Counts a failure under its reason code.
    pub(crate) fn failed(&self, direction: Direction, reason: &str) {
        self.shared
            .metrics
            .failures
            .with_label_values(&[direction.name(), reason])
            .inc();
    }

    /// Counts a connection that a policy refused or ended.
    pub(crate) fn denied(&self, policy: &Arc<str>) {
        self.shared.metrics.policy_denials.count(policy);
    }

    /// Counts a connection that a policy on trial would have denied.
    pub(crate) fn would_be_denied(&self, policy: &Arc<str>) {
        self.shared.metrics.dry_run_denials.count(policy);
    }

    /// Counts a connection that could not even be accepted.
    pub(crate) fn accept_failed(&self, reason: &str) {
        self.shared
            .metrics
            .accept_failures
            .with_label_values(&[reason])
            .inc();
    }

    /// Writes the line of a connection that has ended, if such lines are wanted.
    pub(crate) fn access(&self, ended: &Ended<'_>) {
        let Some(log) = &self.shared.log else { return };
        // One macro call per level, because each remembers whether its own level is wanted.
        let wanted = if ended.level() == tracing::Level::ERROR {
            tracing::enabled!(target: "access", tracing::Level::ERROR)
        } else {
            tracing::enabled!(target: "access", tracing::Level::INFO)
        };
        if wanted {
            log.write(&ended.line(log.format()));
        }
    }

    /// All metrics, as they would be scraped.
    #[cfg(test)]
    pub(crate) fn scrape(&self) -> String {
        self.shared.scrape().unwrap()
    }

    /// Forgets the labels of a workload that is gone.
    pub(crate) fn forget(&self, uid: &WorkloadUid) {
        self.cache.borrow_mut().forget(uid);
    }

    /// Starts the index afresh, so that it does not keep versions of objects that an update has
    /// replaced.
    pub(crate) fn refresh(&self) {
        self.cache.take();
    }
}

/// A connection that counts as open while this lives.
pub(crate) struct Open(IntGauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests;
