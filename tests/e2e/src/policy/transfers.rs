//! Connections that are open while a policy changes: long downloads of curl, and idle ones.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Location, Process};

use super::fixture::{GREETING, HTTP, TCP, big_file};

/// How long it may take until bytes have arrived on every connection of a test.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// How long a transfer may take. An undisturbed one takes five seconds.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(40);

/// A route of connections: client, server and family.
pub type Route = (&'static str, &'static str, IpFamily);

/// The routes from each client to each server, over both families.
pub fn routes(from: &[&'static str], to: &[&'static str]) -> Vec<Route> {
    let pairs = from
        .iter()
        .flat_map(|from| to.iter().map(move |to| (*from, *to)));
    pairs
        .flat_map(|(from, to)| IpFamily::ALL.map(|family| (from, to, family)))
        .collect()
}

/// The number of established connections of a client at its server.
///
/// # Errors
/// A pod does not exist.
pub fn established(lab: &Lab, (from, to, family): &Route) -> Result<usize> {
    let port = format!("sport = :{HTTP}");
    let output = lab.exec(to, &["ss", "-Htn", "state", "established", &port])?;
    let client = lab.pod_ip(from, *family)?;
    let is_from_client = |line: &&str| {
        let peer = line.split_whitespace().nth(3);
        let peer = peer.and_then(|peer| peer.parse::<SocketAddr>().ok());
        peer.is_some_and(|peer| peer.ip() == client)
    };
    Ok(output.ok()?.lines().filter(is_from_client).count())
}

/// A client that opens connections to [`HTTP`] continuously, keeps them open and sends nothing.
#[derive(Debug)]
pub struct ConnectionFlood {
    bash: Process,
}

impl ConnectionFlood {
    /// Prints one line for each attempted connection. A reset connection keeps its file descriptor,
    /// so the script closes all of them and starts again before it runs out.
    const SCRIPT: &str = "while :; do for i in $(seq 500); do \
                          exec {fd}<>\"/dev/tcp/$0/$1\"; echo .; sleep 0.005; done 2>/dev/null; \
                          for fd in $(seq 10 900); do exec {fd}>&-; done 2>/dev/null; done";

    /// Starts the client.
    ///
    /// # Errors
    /// A pod does not exist.
    pub fn start(lab: &Lab, (from, to, family): &Route) -> Result<Self> {
        let (ip, port) = (lab.pod_ip(to, *family)?.to_string(), HTTP.to_string());
        let bash = lab.spawn(from, &["bash", "-c", Self::SCRIPT, &ip, &port])?;
        Ok(Self { bash })
    }

    /// The number of attempted connections.
    pub fn attempts(&self) -> usize {
        let stdout = self.bash.stdout();
        stdout.iter().filter(|byte| **byte == b'\n').count()
    }
}

/// Open connections on some routes that must all have the same outcome.
#[derive(Debug)]
pub struct Transfers {
    downloads: Vec<Download>,
    idle: Vec<Process>,
    dir: tempfile::TempDir,
}

/// One run of curl with several connections.
#[derive(Debug)]
struct Download {
    curl: Process,
    /// The file that receives each connection's bytes.
    files: Vec<PathBuf>,
}

impl Transfers {
    /// Starts `per_route` downloads and one idle connection on each route. Returns when bytes have
    /// arrived on all of them.
    ///
    /// # Errors
    /// A connection does not start.
    pub fn start(lab: &Lab, routes: &[Route], per_route: usize) -> Result<Self> {
        let dir = tempfile::tempdir().context("a folder for the downloads")?;
        let mut transfers = Self {
            downloads: Vec::new(),
            idle: Vec::new(),
            dir,
        };
        for (index, route) in routes.iter().enumerate() {
            let download = transfers.download(lab, route, index, per_route)?;
            transfers.downloads.push(download);
            transfers.idle.push(open_idle(lab, route)?);
        }
        transfers.wait_started(lab)?;
        Ok(transfers)
    }

    fn download(&self, lab: &Lab, route: &Route, index: usize, count: usize) -> Result<Download> {
        let (from, to, family) = route;
        let to = SocketAddr::new(lab.pod_ip(to, *family)?, HTTP);
        let file = |number: &str| self.dir.path().join(format!("{index}-{number}"));
        let output = file("#1").display().to_string();
        let url = format!("http://{to}/big?[1-{count}]");
        let report = "%{stderr}ended %{exitcode} %{size_download}\n";
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
            report,
            "-o",
            &output,
            &url,
        ];
        Ok(Download {
            curl: lab.spawn_in(&Location::pod(from), &curl)?,
            files: (1..=count)
                .map(|number| file(&number.to_string()))
                .collect(),
        })
    }

    fn wait_started(&self, lab: &Lab) -> Result<()> {
        let has_bytes = |file: &PathBuf| file.metadata().is_ok_and(|meta| meta.len() > 0);
        let files = self.downloads.iter().flat_map(|download| &download.files);
        lab.wait_until("bytes on every download", START_DEADLINE, || {
            files.clone().all(has_bytes).then_some(())
        })
        .with_context(|| format!("ended: {:?}", self.ended()))?;
        for idle in &self.idle {
            idle.wait_stdout(&format!("{GREETING}\n"), START_DEADLINE)?;
        }
        let ended = self.ended();
        ensure!(ended.is_empty(), "no longer open: {ended:?}");
        Ok(())
    }

    /// The number of connections.
    pub fn count(&self) -> usize {
        self.download_count() + self.idle.len()
    }

    fn download_count(&self) -> usize {
        self.downloads
            .iter()
            .map(|download| download.files.len())
            .sum()
    }

    fn are_all_closed(&mut self) -> bool {
        self.ended().len() == self.download_count()
            && !self.idle.iter_mut().any(Process::is_running)
    }

    /// curl's report of each download that has ended: exit code and bytes.
    fn ended(&self) -> Vec<String> {
        let report =
            |download: &Download| String::from_utf8_lossy(&download.curl.stderr()).into_owned();
        let lines = self.downloads.iter().map(report).collect::<String>();
        lines.lines().map(str::to_owned).collect()
    }

    /// Waits until every connection has been reset.
    ///
    /// # Errors
    /// A connection is open after `within`, or ended in another way.
    pub fn wait_all_reset(&mut self, lab: &Lab, within: Duration) -> Result<()> {
        lab.wait_until("all connections to be reset", within, || {
            self.are_all_closed().then_some(())
        })
        .with_context(|| {
            format!(
                "{} of {} downloads ended: {:?}",
                self.ended().len(),
                self.download_count(),
                self.ended()
            )
        })?;
        let ended = self.ended();
        // CURLE_RECV_ERROR: the transfer was reset.
        let is_reset = |line: &&String| line.starts_with("ended 56 ");
        ensure!(
            ended.iter().filter(is_reset).count() == self.download_count(),
            "a download ended without a reset: {ended:?}"
        );
        for idle in &self.idle {
            idle.wait_stderr("reset by peer", START_DEADLINE)
                .context("an idle connection was not reset")?;
        }
        Ok(())
    }

    /// Waits until every download is complete with every byte as sent. The idle connections must
    /// still be open and carry bytes.
    ///
    /// # Errors
    /// A connection was disturbed.
    pub fn wait_all_complete(mut self, lab: &Lab) -> Result<()> {
        let expected = big_file();
        for download in self.downloads.drain(..) {
            let output = download.curl.wait(TRANSFER_DEADLINE)?;
            let complete = format!("ended 0 {}\n", expected.len());
            ensure!(
                output.stderr == complete.repeat(download.files.len()),
                "{:?}",
                output.stderr
            );
            for file in &download.files {
                let received = std::fs::read(file).with_context(|| file.display().to_string())?;
                ensure!(
                    received == expected,
                    "{} differs from the file that was sent",
                    file.display()
                );
            }
        }
        for idle in &mut self.idle {
            idle.write(b"ping\n")
                .context("a write on an idle connection")?;
            let expected = format!("{GREETING}\nping\n");
            lab.wait_until("the echo on an idle connection", START_DEADLINE, || {
                (idle.stdout() == expected.as_bytes()).then_some(())
            })?;
        }
        Ok(())
    }
}

/// A connection to [`TCP`] that sends nothing until its stdin is written to.
fn open_idle(lab: &Lab, (from, to, family): &Route) -> Result<Process> {
    // socat and nc would exit with 0 on a reset.
    const SCRIPT: &str = "exec 3<>\"/dev/tcp/$0/$1\" 4<&0 || exit 9; cat <&4 >&3 & exec cat <&3";
    let (ip, port) = (lab.pod_ip(to, *family)?.to_string(), TCP.to_string());
    lab.spawn_in(&Location::pod(from), &["bash", "-c", SCRIPT, &ip, &port])
}
