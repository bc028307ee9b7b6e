//! What a daemon says and costs while something is done to it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::Lab;

use crate::access_log::{self, Access};
use crate::metrics::{self, Sample};

/// How long a reason may take to appear in log and metric after its cause.
const SOON: Duration = Duration::from_secs(15);

/// Counts failures by direction and reason.
const FAILURES: &str = "ambit_connection_failures_total";

/// A daemon, as it was when the watch began.
pub struct Watch<'a> {
    lab: &'a Lab,
    node: String,
    pid: u32,
    log: usize,
    resident: u64,
    descriptors: usize,
    metrics: Vec<Sample>,
}

impl<'a> Watch<'a> {
    /// Begins to watch the daemon of `node`.
    ///
    /// # Errors
    /// It does not run.
    pub fn start(lab: &'a Lab, node: &str) -> Result<Self> {
        let pid = lab
            .status()?
            .node(node)?
            .daemon_pid
            .context("the daemon does not run")?;
        // Makes VmHWM start again from what is resident now (proc(5), clear_refs).
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5").context("clear_refs")?;
        Ok(Self {
            lab,
            node: node.to_owned(),
            pid,
            log: lab.daemon_log(node)?.len(),
            resident: peak(pid)?,
            descriptors: descriptors(pid)?,
            metrics: metrics::scrape(lab, node)?,
        })
    }

    /// What the daemon has logged since the watch began.
    ///
    /// # Errors
    /// There is no log.
    pub fn log(&self) -> Result<String> {
        let log = self.lab.daemon_log(&self.node)?;
        Ok(log.get(self.log..).unwrap_or_default().to_owned())
    }

    /// Waits until the daemon has explained a failure with this reason, alike in the access log and in the metric, and
    /// returns the line of the log.
    ///
    /// # Errors
    /// It has not within 15 s; the error shows the reasons that it gave instead.
    pub fn explained(&self, reason: &str) -> Result<Access> {
        self.explained_where(reason, |_| true)
    }

    /// The same of a connection from or to this address.
    ///
    /// # Errors
    /// As [`Self::explained`].
    pub fn explained_of(&self, reason: &str, peer: IpAddr) -> Result<Access> {
        let is_peer = |line: &Access, side| {
            let address: Option<SocketAddr> = line.field(side).parse().ok();
            address.is_some_and(|address| address.ip() == peer)
        };
        self.explained_where(reason, |line| {
            is_peer(line, "src.addr") || is_peer(line, "dst.addr")
        })
        .with_context(|| format!("of {peer}"))
    }

    fn explained_where(&self, reason: &str, is: impl Fn(&Access) -> bool) -> Result<Access> {
        let lines = || {
            self.log()
                .map(|log| access_log::parse(&log))
                .unwrap_or_default()
        };
        let line = self
            .lab
            .wait_until(&format!("a line with reason {reason}"), SOON, || {
                lines()
                    .into_iter()
                    .find(|line| line.field("reason") == reason && is(line))
            })
            .with_context(|| {
                let reasons: BTreeSet<_> = lines()
                    .iter()
                    .map(|line| line.field("reason").to_owned())
                    .collect();
                format!("the reasons in the log are {reasons:?}")
            })?;
        ensure!(
            !line.field("error").is_empty(),
            "a reason without an explanation: {}",
            line.line
        );
        let before = failures(&self.metrics, reason);
        self.lab.wait_until(
            &format!("{FAILURES} with reason {reason} to grow"),
            SOON,
            || {
                (failures(&metrics::scrape(self.lab, &self.node).ok()?, reason) > before)
                    .then_some(())
            },
        )?;
        Ok(line)
    }

    /// That it is the same process, never took more than `bytes` of memory above what it had, and holds no more than
    /// `fds` file descriptors above what it held, or comes back to that within 15 s.
    ///
    /// # Errors
    /// It crashed or grew.
    pub fn unharmed(&self, bytes: u64, fds: usize) -> Result<()> {
        let pid = self.lab.status()?.node(&self.node)?.daemon_pid;
        ensure!(
            pid == Some(self.pid),
            "the daemon of {} was {} and is {pid:?}",
            self.node,
            self.pid
        );
        // A task that panics takes its connection with it, and nothing else would tell.
        let log = self.log()?;
        let panic = log.lines().find(|line| line.contains("panicked at"));
        ensure!(panic.is_none(), "the daemon of {}: {panic:?}", self.node);
        let grown = peak(self.pid)?.saturating_sub(self.resident);
        ensure!(
            grown <= bytes,
            "the daemon of {} grew by {} KiB",
            self.node,
            grown / 1024
        );
        self.lab
            .wait_until("the daemon's descriptors", SOON, || {
                (descriptors(self.pid).ok()? <= self.descriptors + fds).then_some(())
            })
            .with_context(|| {
                format!(
                    "{} before, {} now",
                    self.descriptors,
                    descriptors(self.pid).unwrap_or(0)
                )
            })
    }
}

fn failures(samples: &[Sample], reason: &str) -> f64 {
    metrics::sum(samples, FAILURES, &[("reason", reason)])
}

/// The most that was resident since the mark was last reset, in bytes.
fn peak(pid: u32) -> Result<u64> {
    let status =
        std::fs::read_to_string(format!("/proc/{pid}/status")).context("the daemon has gone")?;
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
        .context("the daemon has gone")?
        .count())
}
