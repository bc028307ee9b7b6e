//! Many connections at once, and what they leave behind in the daemons.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::{Lab, Process};

use crate::tcp::{Path, program, refs};

/// The program that makes and serves many connections.
const LOAD: &str = include_str!("tcp_load.py");

/// The program ends itself after 100 s.
const DEADLINE: Duration = Duration::from_secs(110);

/// An echo server for thousands of connections; it runs until this is dropped.
#[derive(Debug)]
pub struct Echo {
    process: Process,
    port: u16,
}

impl Echo {
    /// Starts it in a pod.
    ///
    /// # Errors
    /// It does not listen.
    pub fn start(lab: &Lab, pod: &str) -> Result<Self> {
        Self::serving(lab, pod, "serve")
    }

    /// Starts one that accepts and never reads.
    ///
    /// # Errors
    /// It does not listen.
    pub fn deaf(lab: &Lab, pod: &str) -> Result<Self> {
        Self::serving(lab, pod, "deaf")
    }

    /// Starts one that resets each connection at its first byte.
    ///
    /// # Errors
    /// It does not listen.
    pub fn rude(lab: &Lab, pod: &str) -> Result<Self> {
        Self::serving(lab, pod, "rude")
    }

    /// How many connections [`Self::rude`] has reset so far.
    pub fn resets(&self) -> usize {
        let said = String::from_utf8_lossy(&self.process.stdout()).into_owned();
        said.matches("reset\n").count()
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    fn serving(lab: &Lab, pod: &str, how: &str) -> Result<Self> {
        let process = lab.spawn(pod, &refs(&with_many_files(&[how])))?;
        process
            .wait_stdout("\n", Duration::from_secs(10))
            .context("echo server")?;
        let said = String::from_utf8_lossy(&process.stdout()).into_owned();
        let port = said
            .trim()
            .rsplit(' ')
            .next()
            .and_then(|port| port.parse().ok());
        Ok(Self {
            port: port.with_context(|| format!("echo server said {said:?}"))?,
            process,
        })
    }
}

/// Longer than a busy machine makes anybody wait: who waits for a reader that has stopped, waits for
/// ever.
pub const LONG_MS: f64 = 20_000.0;

/// A thousand connections at once.
pub const THOUSAND: Load = Load::Together {
    connections: 1000,
    exchanges: 10,
    size: 1024,
};

/// A load of many connections.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// This many connections, all open before the first is closed.
    Together {
        /// How many.
        connections: u32,
        /// Exchanges on each.
        exchanges: u32,
        /// Bytes each way of an exchange.
        size: u32,
    },
    /// Connections of one exchange.
    Short {
        /// How many in all.
        connections: u32,
        /// How many at any time.
        at_once: u32,
        /// Bytes each way of the exchange.
        size: u32,
    },
    /// Connections that the client resets as soon as it has sent.
    Aborted {
        /// How many in all.
        connections: u32,
        /// How many at any time.
        at_once: u32,
        /// Bytes that are sent.
        size: u32,
    },
    /// Connections that the client fills until they are blocked, and holds.
    Flood {
        /// How many.
        connections: u32,
    },
}

/// How a load went.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Connections of which every exchange was right and that ended with FIN on both sides.
    pub completed: u32,
    /// Every other kind of end with its count, as text; `0` when there was none.
    pub errors: String,
    /// Most connections that were open at once, when they were to be open together.
    pub together: u32,
    /// The whole run in seconds.
    pub seconds: f64,
    /// The median time of an exchange (with the connect, if it is the first) in milliseconds.
    pub p50_ms: f64,
    /// The slowest exchange in milliseconds.
    pub slowest_ms: f64,
}

impl Load {
    /// Starts the load over a path.
    ///
    /// # Errors
    /// The lab has no such pod.
    pub fn start(self, lab: &Lab, path: Path, echo: &Echo) -> Result<Process> {
        let (address, port) = (path.address(lab)?.to_string(), echo.port.to_string());
        let (kind, numbers) = match self {
            Self::Together {
                connections,
                exchanges,
                size,
            } => ("many", vec![connections, exchanges, size]),
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
            Self::Flood { connections } => ("flood", vec![connections]),
        };
        let numbers: Vec<_> = numbers.iter().map(u32::to_string).collect();
        let arguments = [&[kind, &address, &port], &refs(&numbers)[..]].concat();
        lab.spawn(path.client(), &refs(&with_many_files(&arguments)))
    }

    /// Runs the load over a path, to its end.
    ///
    /// # Errors
    /// The program broke; failed connections are no error here, but in the outcome.
    pub fn run(self, lab: &Lab, path: Path, echo: &Echo) -> Result<Outcome> {
        Outcome::of(self.start(lab, path, echo)?).with_context(|| format!("{self:?} on {path:?}"))
    }
}

impl Outcome {
    /// How many connections ended by a reset, whether it was met in sending or in receiving.
    pub fn resets(&self) -> u32 {
        let count = |kind: &str| {
            let behind = self.errors.split_once(kind)?.1;
            let number = behind.trim_start_matches(['\'', ':', ' ']);
            number.split([',', '}']).next()?.parse::<u32>().ok()
        };
        let kinds = ["Connection reset by peer", "Broken pipe"];
        kinds.into_iter().filter_map(count).sum()
    }

    /// Of a started load, which is waited for.
    ///
    /// # Errors
    /// The program broke.
    pub fn of(load: Process) -> Result<Self> {
        let said = load.wait(DEADLINE)?.ok()?;
        let value = |key: &str| {
            let line = said.lines().find_map(|line| line.strip_prefix(key));
            line.map(str::trim)
                .with_context(|| format!("no {key} in {said:?}"))
        };
        Ok(Self {
            completed: value("completed")?.parse()?,
            errors: value("errors")?.to_owned(),
            together: value("together")?.parse()?,
            seconds: value("seconds")?.parse()?,
            p50_ms: value("p50-ms")?.parse()?,
            slowest_ms: value("slowest-ms")?.parse()?,
        })
    }
}

/// Distributions allow 1024 open files by default.
fn with_many_files(arguments: &[&str]) -> Vec<String> {
    let shell = ["sh", "-c", "ulimit -n 16384 && exec \"$@\"", "load"].map(str::to_owned);
    shell.into_iter().chain(program(LOAD, arguments)).collect()
}

/// What a daemon holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Open file descriptors other than tunnels.
    pub files: usize,
    /// Established tunnels, which a pool keeps for a while for who comes next.
    pub tunnels: usize,
    /// Resident memory in KiB.
    pub rss_kib: u64,
}

impl Held {
    /// By the daemon of a node, now. `pod` is the only one there that has tunnels.
    ///
    /// # Errors
    /// It does not run.
    pub fn by(lab: &Lab, node: &str, pod: &str) -> Result<Self> {
        let pid = lab
            .status()?
            .node(node)?
            .daemon_pid
            .context("the daemon does not run")?;
        let tunnels = tunnels(lab, pod)?;
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

/// Established connections of a pod from or to port 15008, as proc(5) lists them.
fn tunnels(lab: &Lab, pod: &str) -> Result<usize> {
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

/// Entries that conntrack could not insert or had to drop in a pod, since the pod was made.
///
/// # Errors
/// The kernel has no conntrack, or the numbers cannot be read.
pub fn conntrack_failures(lab: &Lab, pod: &str) -> Result<u64> {
    let text = lab
        .exec(pod, &["cat", "/proc/net/stat/nf_conntrack"])?
        .ok()?;
    let mut lines = text.lines();
    let names: Vec<_> = lines
        .next()
        .context("no header")?
        .split_whitespace()
        .collect();
    let mut failures = 0;
    // One line per processor, in hexadecimal.
    for line in lines {
        for (name, value) in names.iter().zip(line.split_whitespace()) {
            if ["insert_failed", "drop", "early_drop"].contains(name) {
                failures += u64::from_str_radix(value, 16).context("a counter")?;
            }
        }
    }
    if !names.contains(&"insert_failed") {
        bail!("unknown columns: {names:?}");
    }
    Ok(failures)
}

/// How many connections conntrack holds in a pod, and how many it may hold.
///
/// # Errors
/// The kernel has no conntrack.
pub fn conntrack_fill(lab: &Lab, pod: &str) -> Result<(u64, u64)> {
    let read = |name: &str| -> Result<u64> {
        let file = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        Ok(lab.exec(pod, &["cat", &file])?.ok()?.trim().parse()?)
    };
    Ok((read("count")?, read("max")?))
}
