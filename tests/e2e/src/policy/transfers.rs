//! Connections that are open while a policy changes: long transfers of curl, and silent ones.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Location, Process};

use super::fixture::{GREETING, HTTP, TCP, big};

/// All connections of a test are open, and bytes have come over each.
const BEGUN: Duration = Duration::from_secs(20);

/// A transfer takes five seconds when nobody disturbs it.
const DONE: Duration = Duration::from_secs(40);

/// A client that opens connections to [`HTTP`] without a pause, keeps them all, and says nothing.
#[derive(Debug)]
pub struct ConnectionFlood {
    bash: Process,
}

impl ConnectionFlood {
    /// One line for each connection that it tried to open. What was reset stays among its files,
    /// so it closes all and begins anew before it runs out of them.
    const SCRIPT: &str = "while :; do for i in $(seq 500); do \
                          exec {fd}<>\"/dev/tcp/$0/$1\"; echo .; sleep 0.005; done 2>/dev/null; \
                          for fd in $(seq 10 900); do exec {fd}>&-; done 2>/dev/null; done";

    /// Starts it.
    ///
    /// # Errors
    /// A pod is missing.
    pub fn start(lab: &Lab, (from, to, family): &Route) -> Result<Self> {
        let (ip, port) = (lab.pod_ip(to, *family)?.to_string(), HTTP.to_string());
        let bash = lab.spawn(from, &["bash", "-c", Self::SCRIPT, &ip, &port])?;
        Ok(Self { bash })
    }

    /// How many connections it has tried to open.
    pub fn tried(&self) -> usize {
        let said = self.bash.stdout();
        said.iter().filter(|byte| **byte == b'\n').count()
    }
}

/// How many connections of a client its server has now.
///
/// # Errors
/// A pod is missing.
pub fn established(lab: &Lab, (from, to, family): &Route) -> Result<usize> {
    let port = format!("sport = :{HTTP}");
    let said = lab.exec(to, &["ss", "-Htn", "state", "established", &port])?;
    let client = lab.pod_ip(from, *family)?;
    let is_of = |line: &&str| {
        let peer = line.split_whitespace().nth(3);
        let peer = peer.and_then(|peer| peer.parse::<SocketAddr>().ok());
        peer.is_some_and(|peer| peer.ip() == client)
    };
    Ok(said.ok()?.lines().filter(is_of).count())
}

/// From a client to a server, over one family.
pub type Route = (&'static str, &'static str, IpFamily);

/// The routes of these clients to these servers, over both families.
pub fn routes(from: &[&'static str], to: &[&'static str]) -> Vec<Route> {
    let pairs = from
        .iter()
        .flat_map(|from| to.iter().map(move |to| (*from, *to)));
    pairs
        .flat_map(|(from, to)| IpFamily::ALL.map(|family| (from, to, family)))
        .collect()
}

/// Connections on some routes, of which all are to share one fate.
#[derive(Debug)]
pub struct Transfers {
    downloads: Vec<Download>,
    silent: Vec<Process>,
    dir: tempfile::TempDir,
}

/// One run of curl with several connections.
#[derive(Debug)]
struct Download {
    curl: Process,
    /// Location each connection's bytes go.
    files: Vec<PathBuf>,
}

impl Transfers {
    /// Starts so many transfers on each route, and a silent connection on each too. Returns when all
    /// of them are under way.
    ///
    /// # Errors
    /// One of them does not begin.
    pub fn start(lab: &Lab, routes: &[Route], each: usize) -> Result<Self> {
        let dir = tempfile::tempdir().context("a folder for what arrives")?;
        let mut transfers = Self {
            downloads: Vec::new(),
            silent: Vec::new(),
            dir,
        };
        for (index, route) in routes.iter().enumerate() {
            let download = transfers.download(lab, route, index, each)?;
            transfers.downloads.push(download);
            transfers.silent.push(silent(lab, route)?);
        }
        transfers.begun(lab)?;
        Ok(transfers)
    }

    fn download(&self, lab: &Lab, route: &Route, index: usize, each: usize) -> Result<Download> {
        let (from, to, family) = route;
        let to = SocketAddr::new(lab.pod_ip(to, *family)?, HTTP);
        let file = |number: &str| self.dir.path().join(format!("{index}-{number}"));
        let into = file("#1").display().to_string();
        let url = format!("http://{to}/big?[1-{each}]");
        let told = "%{stderr}ended %{exitcode} %{size_download}\n";
        let curl = [
            "curl",
            "-s",
            "--no-progress-meter",
            "--no-buffer",
            "--parallel",
            "--parallel-immediate",
            "--parallel-max",
            "100",
            "-m",
            "60",
            "-w",
            told,
            "-o",
            &into,
            &url,
        ];
        Ok(Download {
            curl: lab.spawn_in(&Location::pod(from), &curl)?,
            files: (1..=each).map(|number| file(&number.to_string())).collect(),
        })
    }

    fn begun(&self, lab: &Lab) -> Result<()> {
        let moving = |file: &PathBuf| file.metadata().is_ok_and(|meta| meta.len() > 0);
        let all = || self.downloads.iter().flat_map(|download| &download.files);
        lab.wait_until("all transfers to be under way", BEGUN, || {
            all().all(moving).then_some(())
        })
        .with_context(|| format!("ended: {:?}", self.ended()))?;
        for silent in &self.silent {
            silent.wait_stdout(&format!("{GREETING}\n"), BEGUN)?;
        }
        let ended = self.ended();
        ensure!(ended.is_empty(), "not open any more: {ended:?}");
        Ok(())
    }

    /// How many connections there are.
    pub fn count(&self) -> usize {
        self.downloading() + self.silent.len()
    }

    fn downloading(&self) -> usize {
        self.downloads
            .iter()
            .map(|download| download.files.len())
            .sum()
    }

    fn none_open(&mut self) -> bool {
        self.ended().len() == self.downloading() && !self.silent.iter_mut().any(Process::is_running)
    }

    /// What curl said of each transfer that has ended: exit code and bytes.
    fn ended(&self) -> Vec<String> {
        let said =
            |download: &Download| String::from_utf8_lossy(&download.curl.stderr()).into_owned();
        let lines = self.downloads.iter().map(said).collect::<String>();
        lines.lines().map(str::to_owned).collect()
    }

    /// Waits until every one of them has been reset.
    ///
    /// # Errors
    /// One is open after `within`, or ended in another way.
    pub fn all_reset(&mut self, lab: &Lab, within: Duration) -> Result<()> {
        lab.wait_until("all connections to be reset", within, || {
            self.none_open().then_some(())
        })
        .with_context(|| format!("of {}, ended: {:?}", self.count(), self.ended()))?;
        let ended = self.ended();
        // CURLE_RECV_ERROR: the transfer was reset.
        let reset = |line: &&String| line.starts_with("ended 56 ");
        ensure!(
            ended.iter().filter(reset).count() == self.downloading(),
            "not all of them by a reset: {ended:?}"
        );
        for silent in &self.silent {
            silent
                .wait_stderr("reset by peer", BEGUN)
                .context("not by a reset")?;
        }
        Ok(())
    }

    /// Waits until every transfer is complete: each byte as it was sent, no reset. The silent
    /// connections must still be open, and carry bytes.
    ///
    /// # Errors
    /// One was disturbed.
    pub fn all_intact(mut self, lab: &Lab) -> Result<()> {
        let expected = big();
        for download in self.downloads.drain(..) {
            let output = download.curl.wait(DONE)?;
            let good = format!("ended 0 {}\n", expected.len());
            ensure!(
                output.stderr == good.repeat(download.files.len()),
                "{:?}",
                output.stderr
            );
            for file in &download.files {
                let got = std::fs::read(file).with_context(|| file.display().to_string())?;
                ensure!(got == expected, "{} holds other bytes", file.display());
            }
        }
        for silent in &mut self.silent {
            silent
                .write(b"are you there\n")
                .context("a silent connection")?;
            let both = format!("{GREETING}\nare you there\n");
            lab.wait_until("the echo on a silent connection", BEGUN, || {
                (silent.stdout() == both.as_bytes()).then_some(())
            })?;
        }
        Ok(())
    }
}

fn silent(lab: &Lab, (from, to, family): &Route) -> Result<Process> {
    // socat and nc would pass a reset off as a good end.
    const SCRIPT: &str = "exec 3<>\"/dev/tcp/$0/$1\" 4<&0 || exit 9; cat <&4 >&3 & exec cat <&3";
    let (ip, port) = (lab.pod_ip(to, *family)?.to_string(), TCP.to_string());
    lab.spawn_in(&Location::pod(from), &["bash", "-c", SCRIPT, &ip, &port])
}
