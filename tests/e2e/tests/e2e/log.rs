//! The log is for whoever reads it: when nobody does, connections go on as if somebody did.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use ambit_e2e::metrics;
use ambit_e2e::programs::ztunnel;
use ambit_e2e::tcp::{Path as Way, manifests};
use ambit_e2e::tcp_load::{Echo, LONG_MS, Load, Outcome, THOUSAND};
use anyhow::{Context, Result, ensure};
use lab::{Lab, Options};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

/// Lines that nobody took.
const DROPPED: &str = "ambit_log_lines_dropped_total";

/// More lines than may wait in a daemon (10,000), and in its pipe.
const FILLS: Load = Load::Short {
    connections: 12_000,
    at_once: 64,
    size: 100,
};

/// The shipped daemon with a pipe as its standard output, and the pipe's reader, which reads when it is told to.
struct Pipe {
    bin_dir: tempfile::TempDir,
    reader: File,
}

impl Pipe {
    fn new() -> Result<Self> {
        let bin_dir = tempfile::tempdir()?;
        let path = |name: &str| bin_dir.path().join(name);
        mkfifo(&path("pipe"), Mode::S_IRWXU)?;
        // Open for both, so that it is never at its end.
        let mut open = OpenOptions::new();
        open.read(true)
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK);
        let reader = open.open(path("pipe"))?;
        let shipped = ztunnel()?;
        let script = format!(
            "#!/bin/sh\nexec '{}' \"$@\" >'{}'\n",
            shipped.display(),
            path("pipe").display()
        );
        std::fs::write(path("ztunnel"), script)?;
        std::fs::set_permissions(path("ztunnel"), PermissionsExt::from_mode(0o755))?;
        let beside = |name: &str| shipped.parent().unwrap_or(Path::new("/")).join(name);
        std::os::unix::fs::symlink(beside("lab"), path("lab"))?;
        Ok(Self { bin_dir, reader })
    }

    /// Reads all that is in the pipe now.
    fn read(&mut self) -> String {
        let (mut text, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
        while let Ok(count) = self.reader.read(&mut buffer) {
            text.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

fn completes(load: Load, lab: &Lab, echo: &Echo) -> Result<Outcome> {
    let outcome = load.run(lab, Way::Meshed, echo)?;
    println!("{load:?}: {outcome:?}");
    let connections = match load {
        Load::Together { connections, .. } | Load::Short { connections, .. } => connections,
        Load::Aborted { .. } | Load::Flood { .. } => 0,
    };
    ensure!(
        outcome.errors == "0" && outcome.completed == connections,
        "{outcome:?}"
    );
    Ok(outcome)
}

#[test]
fn a_log_that_nobody_reads_delays_and_fails_no_connection_and_says_what_it_lost() -> Result<()> {
    let mut pipe = Pipe::new()?;
    let options = Options {
        bin_dir: Some(pipe.bin_dir.path().to_owned()),
        ..Options::default()
    };
    let lab = Lab::up(manifests(), options)?;
    let echo = Echo::start(&lab, Way::Meshed.server())?;
    let dropped = |node| {
        metrics::sum(
            &metrics::scrape(&lab, node).unwrap_or_default(),
            DROPPED,
            &[],
        )
    };
    completes(FILLS, &lab, &echo)?;
    let before = ["a", "b"].map(dropped);
    ensure!(
        before.iter().all(|lines| *lines > 0.0),
        "the log is not full: {before:?}"
    );
    let outcome = completes(THOUSAND, &lab, &echo)?;
    ensure!(outcome.slowest_ms < LONG_MS, "one had to wait: {outcome:?}");
    // Each connection has a line on each node, all of which were lost.
    for (node, before) in ["a", "b"].into_iter().zip(before) {
        let more = dropped(node) - before;
        ensure!(more >= 1000.0, "{more} lines lost on node {node}");
    }
    // A reader that comes back gets what waited, whole, and then what is new.
    let mut said = String::new();
    lab.wait_until(
        "the lines of a new connection",
        Duration::from_secs(60),
        || {
            let to = lab.pod_ip(Way::Meshed.server(), lab::IpFamily::V4).ok()?;
            let _answer = lab.exec(
                Way::Meshed.client(),
                &["socat", "-u", "/dev/null", &format!("TCP:{to}:9")],
            );
            said.push_str(&pipe.read());
            said.contains(&format!("{to}:9")).then_some(())
        },
    )
    .with_context(|| format!("{} lines", said.lines().count()))
}
