//! A daemon whose log is not read: connections are not delayed, and the dropped lines are counted.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use ambit_e2e::metrics;
use ambit_e2e::programs::ztunnel_binary;
use ambit_e2e::tcp::{Path as TcpPath, manifests};
use ambit_e2e::tcp_load::{EchoServer, Load, LoadReport, MAX_EXCHANGE_MS, THOUSAND_CONCURRENT};
use anyhow::{Context, Result, ensure};
use lab::{Lab, Options};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// Counts log lines that were dropped because the reader was too slow.
const DROPPED: &str = "ambit_log_lines_dropped_total";

/// Writes more lines than the daemon's queue (10,000) and its pipe hold.
const FILL_LOG: Load = Load::Short {
    connections: 12_000,
    at_once: 64,
    size: 100,
};

/// The shipped daemon with a pipe as its standard output, and the pipe's reading end.
struct LogPipe {
    bin_dir: tempfile::TempDir,
    reader: File,
}

impl LogPipe {
    fn new() -> Result<Self> {
        let bin_dir = tempfile::tempdir()?;
        let path = |name: &str| bin_dir.path().join(name);
        mkfifo(&path("pipe"), Mode::S_IRWXU)?;
        // Opened for reading and writing, so that reads never return end of file.
        let mut open = OpenOptions::new();
        open.read(true)
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK);
        let reader = open.open(path("pipe"))?;
        let shipped = ztunnel_binary()?;
        let script = format!(
            "#!/bin/sh\nexec '{}' \"$@\" >'{}'\n",
            shipped.display(),
            path("pipe").display()
        );
        std::fs::write(path("ztunnel"), script)?;
        std::fs::set_permissions(path("ztunnel"), PermissionsExt::from_mode(0o755))?;
        let shipped_file = |name: &str| shipped.parent().unwrap_or(Path::new("/")).join(name);
        std::os::unix::fs::symlink(shipped_file("lab"), path("lab"))?;
        Ok(Self { bin_dir, reader })
    }

    /// Reads everything that is in the pipe.
    fn drain(&mut self) -> String {
        let (mut text, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        while let Ok(count) = self.reader.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

fn run_load(load: Load, lab: &Lab, server: &EchoServer) -> Result<LoadReport> {
    let report = load.run(lab, TcpPath::Meshed, server)?;
    println!("{load:?}: {report:?}");
    let connections = match load {
        Load::Concurrent { connections, .. } | Load::Short { connections, .. } => connections,
        Load::Aborted { .. } | Load::Stalled { .. } => 0,
    };
    ensure!(
        report.errors == "0" && report.completed == connections,
        "{report:?}"
    );
    Ok(report)
}

#[test]
fn unread_log_delays_no_connection_and_counts_dropped_lines() -> Result<()> {
    let mut pipe = LogPipe::new()?;
    let options = Options {
        bin_dir: Some(pipe.bin_dir.path().to_owned()),
        ..Options::default()
    };
    let lab = Lab::up(manifests(), options)?;
    let server = EchoServer::start(&lab, TcpPath::Meshed.server())?;
    let dropped = |node| {
        metrics::sum(
            &metrics::scrape(&lab, node).unwrap_or_default(),
            DROPPED,
            &[],
        )
    };
    run_load(FILL_LOG, &lab, &server)?;
    let before = ["a", "b"].map(dropped);
    ensure!(
        before.iter().all(|lines| *lines > 0.0),
        "the log is not full: {before:?}"
    );
    let report = run_load(THOUSAND_CONCURRENT, &lab, &server)?;
    ensure!(
        report.slowest_ms < MAX_EXCHANGE_MS,
        "a connection was delayed: {report:?}"
    );
    // Each connection has a line on each node, and all are dropped.
    for (node, before) in ["a", "b"].into_iter().zip(before) {
        let more = dropped(node) - before;
        ensure!(more >= 1000.0, "{more} lines dropped on node {node}");
    }
    // A reader that resumes receives the queued lines, and then new ones.
    let mut lines = String::new();
    lab.wait_until(
        "the log line of a new connection",
        Duration::from_secs(60),
        || {
            let to = lab
                .pod_ip(TcpPath::Meshed.server(), lab::IpFamily::V4)
                .ok()?;
            let _output = lab.exec(
                TcpPath::Meshed.client(),
                &["socat", "-u", "/dev/null", &format!("TCP:{to}:9")],
            );
            lines.push_str(&pipe.drain());
            lines.contains(&format!("{to}:9")).then_some(())
        },
    )
    .with_context(|| format!("{} lines", lines.lines().count()))
}
