//! Loads of many TCP connections, and the resources that a daemon uses for them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::{Lab, Process};

use crate::tcp::{Path, as_strs, python_command};

/// The program that opens and serves many connections.
const LOAD: &str = include_str!("tcp_load.py");

/// The program ends after 100 s at the latest.
const DEADLINE: Duration = Duration::from_secs(110);

/// An echo server for thousands of connections. Dropping the value kills it.
#[derive(Debug)]
pub struct EchoServer {
    process: Process,
    port: u16,
}

impl EchoServer {
    /// Starts an echo server in a pod.
    ///
    /// # Errors
    /// The server does not listen within 10 s.
    pub fn start(lab: &Lab, pod: &str) -> Result<Self> {
        Self::spawn(lab, pod, "echo")
    }

    /// Starts a server that accepts connections and never reads.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_non_reading(lab: &Lab, pod: &str) -> Result<Self> {
        Self::spawn(lab, pod, "no-read")
    }

    /// Starts a server that resets each connection when the first byte arrives.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_resetting(lab: &Lab, pod: &str) -> Result<Self> {
        Self::spawn(lab, pod, "reset")
    }

    /// How many connections a server of [`Self::start_resetting`] has reset so far.
    pub fn reset_count(&self) -> usize {
        let stdout = String::from_utf8_lossy(&self.process.stdout()).into_owned();
        stdout.matches("reset\n").count()
    }

    /// The listening port.
    pub fn port(&self) -> u16 {
        self.port
    }

    fn spawn(lab: &Lab, pod: &str, mode: &str) -> Result<Self> {
        let process = lab.spawn(pod, &as_strs(&load_command(&[mode])))?;
        process
            .wait_stdout("\n", Duration::from_secs(10))
            .context("start the server")?;
        let stdout = String::from_utf8_lossy(&process.stdout()).into_owned();
        let port = stdout
            .trim()
            .rsplit(' ')
            .next()
            .and_then(|port| port.parse().ok());
        Ok(Self {
            port: port
                .with_context(|| format!("no port in the output of the server: {stdout:?}"))?,
            process,
        })
    }
}

/// An exchange takes less on a busy machine; one that is blocked behind a stopped reader takes for ever.
pub const MAX_EXCHANGE_MS: f64 = 20_000.0;

/// A thousand concurrent connections.
pub const THOUSAND_CONCURRENT: Load = Load::Concurrent {
    connections: 1000,
    exchanges: 10,
    size: 1024,
};

/// A load of many connections.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// Connections that are all open before the first is closed.
    Concurrent {
        /// The number of connections.
        connections: u32,
        /// Exchanges on each connection.
        exchanges: u32,
        /// Bytes in each direction of an exchange.
        size: u32,
    },
    /// Connections of one exchange each.
    Short {
        /// The total number of connections.
        connections: u32,
        /// The number of connections open at any time.
        at_once: u32,
        /// Bytes in each direction of the exchange.
        size: u32,
    },
    /// Connections that the client resets right after sending.
    Aborted {
        /// The total number of connections.
        connections: u32,
        /// The number of connections open at any time.
        at_once: u32,
        /// Bytes sent before the reset.
        size: u32,
    },
    /// Connections on which the client sends until it is blocked, and which it then keeps open.
    Stalled {
        /// The number of connections.
        connections: u32,
    },
}

/// The result of a load.
#[derive(Debug, Clone)]
pub struct LoadReport {
    /// Connections whose exchanges were all correct and that ended with FIN on both sides.
    pub completed: u32,
    /// Every other kind of end with its count, as python prints it; `0` if there was none.
    pub errors: String,
    /// The most connections open at once, for [`Load::Concurrent`].
    pub max_open: u32,
    /// The duration of the whole run in seconds.
    pub seconds: f64,
    /// The median time of an exchange in milliseconds; the first includes the connect.
    pub p50_ms: f64,
    /// The slowest exchange in milliseconds.
    pub slowest_ms: f64,
}

impl Load {
    /// Starts the load on a path.
    ///
    /// # Errors
    /// The lab has no such pod.
    pub fn start(self, lab: &Lab, path: Path, server: &EchoServer) -> Result<Process> {
        let (address, port) = (path.address(lab)?.to_string(), server.port.to_string());
        let (kind, numbers) = match self {
            Self::Concurrent {
                connections,
                exchanges,
                size,
            } => ("concurrent", vec![connections, exchanges, size]),
            Self::Short {
                connections,
                at_once,
                size,
            } => ("short", vec![connections, at_once, size]),
            Self::Aborted {
                connections,
                at_once,
                size,
            } => ("abort", vec![connections, at_once, size]),
            Self::Stalled { connections } => ("stalled", vec![connections]),
        };
        let numbers: Vec<_> = numbers.iter().map(u32::to_string).collect();
        let arguments = [&[kind, &address, &port], &as_strs(&numbers)[..]].concat();
        lab.spawn(path.client(), &as_strs(&load_command(&arguments)))
    }

    /// Runs the load on a path to its end.
    ///
    /// # Errors
    /// The program failed. Failed connections are not an error, but counted in the report.
    pub fn run(self, lab: &Lab, path: Path, server: &EchoServer) -> Result<LoadReport> {
        LoadReport::wait(self.start(lab, path, server)?)
            .with_context(|| format!("{self:?} on {path:?}"))
    }
}

impl LoadReport {
    /// How many connections ended by a reset, seen while sending or receiving.
    pub fn reset_count(&self) -> u32 {
        let count = |kind: &str| {
            let rest = self.errors.split_once(kind)?.1;
            let number = rest.trim_start_matches(['\'', ':', ' ']);
            number.split([',', '}']).next()?.parse::<u32>().ok()
        };
        let kinds = ["Connection reset by peer", "Broken pipe"];
        kinds.into_iter().filter_map(count).sum()
    }

    /// Waits until a started load has ended.
    ///
    /// # Errors
    /// The program failed.
    pub fn wait(load: Process) -> Result<Self> {
        let stdout = load.wait(DEADLINE)?.ok()?;
        let value = |key: &str| {
            let line = stdout.lines().find_map(|line| line.strip_prefix(key));
            line.map(str::trim)
                .with_context(|| format!("no {key} in {stdout:?}"))
        };
        Ok(Self {
            completed: value("completed")?.parse()?,
            errors: value("errors")?.to_owned(),
            max_open: value("max-open")?.parse()?,
            seconds: value("seconds")?.parse()?,
            p50_ms: value("p50-ms")?.parse()?,
            slowest_ms: value("slowest-ms")?.parse()?,
        })
    }
}

/// The command line of `tcp_load.py`, with more open files than the usual limit of 1024.
fn load_command(arguments: &[&str]) -> Vec<String> {
    let shell = ["sh", "-c", "ulimit -n 16384 && exec \"$@\"", "load"].map(str::to_owned);
    shell
        .into_iter()
        .chain(python_command(LOAD, arguments))
        .collect()
}

/// The resources that a daemon uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DaemonUsage {
    /// Open file descriptors without those of tunnels.
    pub files: usize,
    /// Established tunnels, which a pool keeps open for later connections.
    pub tunnels: usize,
    /// Resident memory in KiB.
    pub rss_kib: u64,
}

impl DaemonUsage {
    /// Measures the daemon of a node. `pod` is the only pod there that has tunnels.
    ///
    /// # Errors
    /// The daemon does not run.
    pub fn measure(lab: &Lab, node: &str, pod: &str) -> Result<Self> {
        let pid = lab
            .status()?
            .node(node)?
            .daemon_pid
            .context("the daemon does not run")?;
        let tunnels = tunnel_count(lab, pod)?;
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        Ok(Self {
            files: files.saturating_sub(tunnels),
            tunnels,
            rss_kib: kib.context("VmRSS")?,
        })
    }
}

/// The number of established connections of a pod from or to port 15008, from `/proc/net/tcp`.
fn tunnel_count(lab: &Lab, pod: &str) -> Result<usize> {
    let text = lab
        .exec(pod, &["cat", "/proc/net/tcp", "/proc/net/tcp6"])?
        .ok()?;
    let is_tunnel = |line: &&str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, local, remote, state, ..] = words[..] else {
            return false;
        };
        state == "01"
            && [local, remote]
                .iter()
                .any(|address| address.ends_with(":3AA0"))
    };
    Ok(text.lines().filter(is_tunnel).count())
}

/// Entries that conntrack could not insert, or dropped, since the pod's network namespace was created.
///
/// # Errors
/// The kernel has no conntrack, or its statistics have an unknown format.
pub fn conntrack_failures(lab: &Lab, pod: &str) -> Result<u64> {
    let text = lab
        .exec(pod, &["cat", "/proc/net/stat/nf_conntrack"])?
        .ok()?;
    let mut lines = text.lines();
    let names: Vec<_> = lines
        .next()
        .context("nf_conntrack statistics have no header")?
        .split_whitespace()
        .collect();
    let mut failures = 0;
    // One line per processor, in hexadecimal.
    for line in lines {
        for (name, value) in names.iter().zip(line.split_whitespace()) {
            if ["insert_failed", "drop", "early_drop"].contains(name) {
                failures += u64::from_str_radix(value, 16).context("conntrack counter")?;
            }
        }
    }
    if !names.contains(&"insert_failed") {
        bail!("unknown columns of nf_conntrack statistics: {names:?}");
    }
    Ok(failures)
}

/// The number of conntrack entries in a pod, and their limit.
///
/// # Errors
/// The kernel has no conntrack.
pub fn conntrack_usage(lab: &Lab, pod: &str) -> Result<(u64, u64)> {
    let read = |name: &str| -> Result<u64> {
        let file = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        Ok(lab.exec(pod, &["cat", &file])?.ok()?.trim().parse()?)
    };
    Ok((read("count")?, read("max")?))
}
