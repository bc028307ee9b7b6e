//! What a daemon logs, counts and uses while it is attacked.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::Lab;

use crate::access_log::{self, Entry};
use crate::metrics::{self, Sample};

/// How long a reason may take to appear in log and metric after its cause.
const DEADLINE: Duration = Duration::from_secs(15);

/// Counts failures by direction and reason.
const FAILURES: &str = "ambit_connection_failures_total";

/// A daemon, and its state when the monitor was started.
pub struct DaemonMonitor<'a> {
    lab: &'a Lab,
    node: String,
    pid: u32,
    log_len: usize,
    resident_bytes: u64,
    descriptors: usize,
    metrics: Vec<Sample>,
}

impl<'a> DaemonMonitor<'a> {
    /// Starts to monitor the daemon of `node`.
    ///
    /// # Errors
    /// The daemon does not run.
    pub fn start(lab: &'a Lab, node: &str) -> Result<Self> {
        let pid = lab
            .status()?
            .node(node)?
            .daemon_pid
            .context("the daemon does not run")?;
        // Resets VmHWM to what is resident now (proc(5), clear_refs).
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5").context("clear_refs")?;
        Ok(Self {
            lab,
            node: node.to_owned(),
            pid,
            log_len: lab.daemon_log(node)?.len(),
            resident_bytes: peak_resident_bytes(pid)?,
            descriptors: descriptors(pid)?,
            metrics: metrics::scrape(lab, node)?,
        })
    }

    /// The daemon's log since the monitor was started.
    ///
    /// # Errors
    /// The node has no log.
    pub fn log(&self) -> Result<String> {
        let log = self.lab.daemon_log(&self.node)?;
        Ok(log.get(self.log_len..).unwrap_or_default().to_owned())
    }

    /// Waits until a failed connection with this reason is in the access log and counted in the metric. Returns the
    /// line of the log.
    ///
    /// # Errors
    /// It is not after 15 s; the error lists the reasons in the log.
    pub fn wait_failure(&self, reason: &str) -> Result<Entry> {
        self.wait_failure_where(&[reason], |_| true)
    }

    /// Like [`Self::wait_failure`], for a connection from or to this address that failed with one of these reasons.
    ///
    /// # Errors
    /// As [`Self::wait_failure`].
    pub fn wait_failure_of(&self, reasons: &[&str], peer: IpAddr) -> Result<Entry> {
        let is_peer = |line: &Entry, side| {
            let address: Option<SocketAddr> = line.field(side).parse().ok();
            address.is_some_and(|address| address.ip() == peer)
        };
        self.wait_failure_where(reasons, |line| {
            is_peer(line, "src.addr") || is_peer(line, "dst.addr")
        })
        .with_context(|| format!("connections of {peer}"))
    }

    fn wait_failure_where(
        &self,
        reasons: &[&str],
        matches: impl Fn(&Entry) -> bool,
    ) -> Result<Entry> {
        let lines = || {
            self.log()
                .map(|log| access_log::parse(&log))
                .unwrap_or_default()
        };
        let what = format!("an access log line with reason {}", reasons.join(" or "));
        let line = self
            .lab
            .wait_until(&what, DEADLINE, || {
                lines()
                    .into_iter()
                    .find(|line| reasons.contains(&line.field("reason")) && matches(line))
            })
            .with_context(|| {
                let logged: BTreeSet<_> = lines()
                    .iter()
                    .map(|line| line.field("reason").to_owned())
                    .collect();
                format!("the reasons in the log are {logged:?}")
            })?;
        ensure!(
            !line.field("error").is_empty(),
            "the line has a reason but no error: {}",
            line.line
        );
        self.wait_counted(line.field("reason"))?;
        Ok(line)
    }

    fn wait_counted(&self, reason: &str) -> Result<()> {
        let before = failures(&self.metrics, reason);
        let what = format!("{FAILURES} with reason {reason} to increase");
        self.lab.wait_until(&what, DEADLINE, || {
            let now = metrics::scrape(self.lab, &self.node).ok()?;
            (failures(&now, reason) > before).then_some(())
        })
    }

    /// Checks that the daemon is the same process, has not panicked, has never used more than `max_growth_bytes` of
    /// memory above its start, and within 15 s has no more than `max_extra_descriptors` file descriptors above its
    /// start.
    ///
    /// # Errors
    /// A check fails.
    pub fn check_bounded(&self, max_growth_bytes: u64, max_extra_descriptors: usize) -> Result<()> {
        let pid = self.lab.status()?.node(&self.node)?.daemon_pid;
        ensure!(
            pid == Some(self.pid),
            "the daemon of {} restarted: it was process {} and is {pid:?}",
            self.node,
            self.pid
        );
        // A panicking connection task ends its connection only; the log is the only place that shows it.
        let log = self.log()?;
        let panic = log.lines().find(|line| line.contains("panicked at"));
        ensure!(panic.is_none(), "the daemon of {}: {panic:?}", self.node);
        let growth = peak_resident_bytes(self.pid)?.saturating_sub(self.resident_bytes);
        ensure!(
            growth <= max_growth_bytes,
            "the daemon of {} grew by {} KiB",
            self.node,
            growth / 1024
        );
        self.lab
            .wait_until("the daemon to close descriptors", DEADLINE, || {
                let max = self.descriptors + max_extra_descriptors;
                (descriptors(self.pid).ok()? <= max).then_some(())
            })
            .with_context(|| {
                format!(
                    "{} descriptors before, {} now",
                    self.descriptors,
                    descriptors(self.pid).unwrap_or(0)
                )
            })
    }
}

fn failures(samples: &[Sample], reason: &str) -> f64 {
    metrics::sum(samples, FAILURES, &[("reason", reason)])
}

/// The peak resident memory (VmHWM) since it was last reset.
fn peak_resident_bytes(pid: u32) -> Result<u64> {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).context("the daemon has exited")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .context("no VmHWM")?;
    let kilobytes: u64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .context("VmHWM")?;
    Ok(kilobytes * 1024)
}

fn descriptors(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))
        .context("the daemon has exited")?
        .count())
}
