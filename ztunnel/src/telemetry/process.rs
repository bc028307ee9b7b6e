//! What the process uses, under the names that every Prometheus client gives it, read when somebody
//! scrapes.

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::unistd::{SysconfVar, sysconf};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, Opts};

/// The gauges, set at each scrape.
pub(super) struct Process {
    open_fds: Gauge,
    max_fds: Gauge,
    resident: Gauge,
    cpu: Gauge,
}

impl Process {
    pub(super) fn new() -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| Gauge::with_opts(Opts::new(name, help));
        Ok(Self {
            open_fds: gauge("process_open_fds", "Number of open file descriptors")?,
            max_fds: gauge("process_max_fds", "Maximum number of open file descriptors")?,
            resident: gauge(
                "process_resident_memory_bytes",
                "Resident memory size in bytes",
            )?,
            cpu: gauge(
                "process_cpu_seconds_total",
                "Total user and system CPU time spent in seconds",
            )?,
        })
    }

    fn all(&self) -> [&Gauge; 4] {
        [&self.open_fds, &self.max_fds, &self.resident, &self.cpu]
    }

    /// A value that cannot be read stays what it was: a scrape must not fail because `/proc` is not
    /// mounted.
    #[allow(clippy::cast_precision_loss)]
    fn read(&self) {
        if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
            // The directory that is read is itself one of them.
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
            self.resident.set(pages as f64 * size as f64);
        }
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
            self.cpu
                .set(seconds(usage.user_time()) + seconds(usage.system_time()));
        }
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.all().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.all()
            .into_iter()
            .flat_map(Collector::collect)
            .collect()
    }
}
