//! Everything that is counted beside traffic: Istio's names where Istio has one, `ambit_` where it
//! has none.

use std::sync::{Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use tokio::runtime::Handle;

use super::certificates::Certificates;
use super::denials::Denials;
use super::log::Log;

/// The counters and gauges that somebody sets while things happen.
pub(super) struct Metrics {
    pub(super) sockets_open: IntGaugeVec,
    pub(super) failures: IntCounterVec,
    pub(super) accept_failures: IntCounterVec,
    pub(super) policy_denials: Denials,
    pub(super) dry_run_denials: Denials,
    pub(super) enrolment: IntGaugeVec,
    pub(super) capture_repairs: IntCounterVec,
    pub(super) guard_dropped: IntCounter,
    pub(super) problems: IntGauge,
    pub(super) certificates: Certificates,
    pub(super) active_proxies: IntGauge,
    pub(super) pending_proxies: IntGauge,
    pub(super) proxies_started: IntCounter,
    pub(super) proxies_stopped: IntCounter,
}

impl Metrics {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counters = |name: &str, help: &str, label: &[&str]| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), label)?)
        };
        let gauges = |name: &str, help: &str, label: &[&str]| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), label)?)
        };
        let gauge = |name: &str, help: &str| {
            registered(registry, IntGauge::with_opts(Opts::new(name, help))?)
        };
        let counter = |name: &str, help: &str| {
            registered(registry, IntCounter::with_opts(Opts::new(name, help))?)
        };
        let denials = |name, help| registered(registry, Denials::new(name, help)?);
        Ok(Self {
            sockets_open: gauges(
                "istio_tcp_sockets_open",
                "The number of connections open now",
                &["reporter"],
            )?,
            failures: counters(
                "ambit_connection_failures_total",
                "Connections that failed, by the reason code of the access log",
                &["direction", "reason"],
            )?,
            accept_failures: counters(
                "ambit_accept_failures_total",
                "Connections that could not be accepted",
                &["reason"],
            )?,
            policy_denials: denials(
                "ambit_policy_denials_total",
                "Connections that were refused or ended by a policy, by the policy",
            )?,
            dry_run_denials: denials(
                "ambit_policy_dry_run_denials_total",
                "Connections that a policy on trial (istio.io/dry-run) would have denied, by the policy",
            )?,
            enrolment: gauges(
                "ambit_enrolment_pods",
                "Opted-in pods of this node, by verified state",
                &["state"],
            )?,
            capture_repairs: counters(
                "ambit_capture_repairs_total",
                "Repairs of a pod's capture, by what was wrong",
                &["reason"],
            )?,
            guard_dropped: counter(
                "ambit_guard_dropped_packets_total",
                "Packets in clear from a meshed pod to a meshed pod that the node's guard has dropped",
            )?,
            problems: gauge(
                "ambit_configuration_problems",
                "Objects or fields that could not be understood",
            )?,
            certificates: Certificates::register(registry)?,
            active_proxies: gauge(
                "workload_manager_active_proxy_count",
                "The total number of active proxies",
            )?,
            pending_proxies: gauge(
                "workload_manager_pending_proxy_count",
                "The total number of pending proxies",
            )?,
            proxies_started: counter(
                "workload_manager_proxies_started_total",
                "The total number of proxies that were started",
            )?,
            proxies_stopped: counter(
                "workload_manager_proxies_stopped_total",
                "The total number of proxies that were stopped",
            )?,
        })
    }
}

pub(super) fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

/// What can be read at any time and so is read only when somebody scrapes: the runtimes and the
/// log's losses.
pub(super) struct Pulled {
    log: Option<Log>,
    runtimes: Mutex<Vec<Handle>>,
    dropped: Gauge,
    workers: Gauge,
    queued: Gauge,
    alive: Gauge,
    busy: GaugeVec,
    parks: GaugeVec,
}

impl Pulled {
    pub(super) fn new(log: Option<Log>) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| Gauge::with_opts(Opts::new(name, help));
        let per_worker = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &["worker"]);
        Ok(Self {
            log,
            runtimes: Mutex::default(),
            dropped: gauge(
                "ambit_log_lines_dropped_total",
                "Log lines that were dropped because their reader stalled",
            )?,
            workers: gauge("tokio_num_workers", "Number of data-plane threads")?,
            queued: gauge(
                "tokio_global_queue_depth",
                "Tasks that wait to be scheduled on the data plane",
            )?,
            alive: gauge("tokio_num_alive_tasks", "Tasks that live on the data plane")?,
            busy: per_worker(
                "tokio_worker_total_busy_duration_seconds_total",
                "Time for which a data-plane thread was busy",
            )?,
            parks: per_worker(
                "tokio_worker_park_count_total",
                "How often a data-plane thread went to sleep",
            )?,
        })
    }

    pub(super) fn watch(&self, runtime: Handle) {
        self.runtimes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(runtime);
    }

    fn collectors(&self) -> [&dyn Collector; 6] {
        [
            &self.dropped,
            &self.workers,
            &self.queued,
            &self.alive,
            &self.busy,
            &self.parks,
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn read(&self) {
        self.dropped
            .set(self.log.as_ref().map_or(0, Log::dropped) as f64);
        let runtimes = self.runtimes.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |of: fn(&Handle) -> usize| runtimes.iter().map(of).sum::<usize>() as f64;
        self.workers.set(runtimes.len() as f64);
        self.queued
            .set(sum(|runtime| runtime.metrics().global_queue_depth()));
        self.alive
            .set(sum(|runtime| runtime.metrics().num_alive_tasks()));
        for (worker, runtime) in runtimes.iter().enumerate() {
            // Each runtime has one thread, and so each thread is worker 0 of its own.
            let metrics = runtime.metrics();
            let worker = worker.to_string();
            self.busy
                .with_label_values(&[&worker])
                .set(metrics.worker_total_busy_duration(0).as_secs_f64());
            self.parks
                .with_label_values(&[&worker])
                .set(metrics.worker_park_count(0) as f64);
        }
    }
}

/// The registry's handle on what is pulled.
pub(super) struct Pull(pub(super) std::sync::Arc<Pulled>);

impl Collector for Pull {
    fn desc(&self) -> Vec<&Desc> {
        self.0
            .collectors()
            .into_iter()
            .flat_map(Collector::desc)
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.0.read();
        self.0
            .collectors()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}
