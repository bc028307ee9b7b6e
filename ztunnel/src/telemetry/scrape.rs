//! The metrics that are read only at a scrape: the process, the data-plane runtimes, and
//! the lines that the log dropped.

use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::unistd::{SysconfVar, sysconf};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, Opts};
use tokio::runtime::Handle;

use super::log::Log;

/// The gauges, set at each scrape. Clones share them.
#[derive(Clone)]
pub(super) struct ScrapeMetrics {
    log: Option<Log>,
    runtimes: Arc<Mutex<Vec<Handle>>>,
    lines_dropped: Gauge,
    process: ProcessGauges,
    runtime: RuntimeGauges,
}

/// Under the names that every Prometheus client uses.
#[derive(Clone)]
struct ProcessGauges {
    open_fds: Gauge,
    max_fds: Gauge,
    resident_bytes: Gauge,
    cpu_seconds: Gauge,
}

#[derive(Clone)]
struct RuntimeGauges {
    workers: Gauge,
    queue_depth: Gauge,
    alive_tasks: Gauge,
    busy_seconds: GaugeVec,
    parks: GaugeVec,
}

fn gauge(name: &str, help: &str) -> prometheus::Result<Gauge> {
    Gauge::with_opts(Opts::new(name, help))
}

impl ScrapeMetrics {
    pub(super) fn new(log: Option<Log>) -> prometheus::Result<Self> {
        Ok(Self {
            log,
            runtimes: Arc::default(),
            lines_dropped: gauge(
                "ambit_log_lines_dropped_total",
                "Log lines that were dropped because their reader stalled",
            )?,
            process: ProcessGauges::new()?,
            runtime: RuntimeGauges::new()?,
        })
    }

    /// Adds a data-plane runtime, which has one thread.
    pub(super) fn add_runtime(&self, runtime: Handle) {
        self.runtimes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(runtime);
    }

    fn collectors(&self) -> [&dyn Collector; 10] {
        [
            &self.lines_dropped,
            &self.process.open_fds,
            &self.process.max_fds,
            &self.process.resident_bytes,
            &self.process.cpu_seconds,
            &self.runtime.workers,
            &self.runtime.queue_depth,
            &self.runtime.alive_tasks,
            &self.runtime.busy_seconds,
            &self.runtime.parks,
        ]
    }

    #[allow(clippy::cast_precision_loss)]
    fn read(&self) {
        self.lines_dropped
            .set(self.log.as_ref().map_or(0, Log::dropped) as f64);
        self.process.read();
        let runtimes = self.runtimes.lock().unwrap_or_else(PoisonError::into_inner);
        self.runtime.read(&runtimes);
    }
}

impl Collector for ScrapeMetrics {
    fn desc(&self) -> Vec<&Desc> {
        self.collectors()
            .into_iter()
            .flat_map(Collector::desc)
            .collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.collectors()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}

impl ProcessGauges {
    fn new() -> prometheus::Result<Self> {
        Ok(Self {
            open_fds: gauge("process_open_fds", "Number of open file descriptors")?,
            max_fds: gauge("process_max_fds", "Maximum number of open file descriptors")?,
            resident_bytes: gauge(
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
            )?,
            cpu_seconds: gauge(
                "process_cpu_seconds_total",
                "Total user and system CPU time spent in seconds",
            )?,
        })
    }

    /// A value that cannot be read keeps its last reading: a scrape must not fail because `/proc`
    /// is not mounted.
    #[allow(clippy::cast_precision_loss)]
    fn read(&self) {
        if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
            // The open directory itself is one of them.
            self.open_fds.set(fds.count().saturating_sub(1) as f64);
        }
        if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            self.max_fds.set(soft as f64);
        }
        let pages = std::fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|statm| {
                statm
                    .split_whitespace()
                    .nth(1)
                    .and_then(|pages| pages.parse::<u64>().ok())
            });
        if let (Some(pages), Ok(Some(size))) = (pages, sysconf(SysconfVar::PAGE_SIZE)) {
            self.resident_bytes.set(pages as f64 * size as f64);
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
            self.cpu_seconds
                .set(seconds(usage.user_time()) + seconds(usage.system_time()));
        }
    }
}

impl RuntimeGauges {
    fn new() -> prometheus::Result<Self> {
        let per_worker = |name: &str, help: &str| GaugeVec::new(Opts::new(name, help), &["worker"]);
        Ok(Self {
            workers: gauge("tokio_num_workers", "Number of data-plane threads")?,
            queue_depth: gauge(
                "tokio_global_queue_depth",
                "Tasks of the data plane that wait to be scheduled",
            )?,
            alive_tasks: gauge("tokio_num_alive_tasks", "Tasks of the data plane")?,
            busy_seconds: per_worker(
                "tokio_worker_total_busy_duration_seconds_total",
                "Time for which a data-plane thread was busy",
            )?,
            parks: per_worker(
                "tokio_worker_park_count_total",
                "How often a data-plane thread parked",
            )?,
        })
    }

    #[allow(clippy::cast_precision_loss)]
    fn read(&self, runtimes: &[Handle]) {
        let sum = |of: fn(&Handle) -> usize| runtimes.iter().map(of).sum::<usize>() as f64;
        self.workers.set(runtimes.len() as f64);
        self.queue_depth
            .set(sum(|runtime| runtime.metrics().global_queue_depth()));
        self.alive_tasks
            .set(sum(|runtime| runtime.metrics().num_alive_tasks()));
        for (worker, runtime) in runtimes.iter().enumerate() {
            // Each runtime has one thread, which is worker 0 of that runtime.
            let metrics = runtime.metrics();
            let worker = worker.to_string();
            self.busy_seconds
                .with_label_values(&[&worker])
                .set(metrics.worker_total_busy_duration(0).as_secs_f64());
            self.parks
                .with_label_values(&[&worker])
                .set(metrics.worker_park_count(0) as f64);
        }
    }
}
