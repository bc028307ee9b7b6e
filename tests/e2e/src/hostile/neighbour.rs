//! The well-behaved client that shares a daemon with the attacked.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Process};

use crate::access_log;

/// How long one request of a neighbour may take before it counts as harmed.
const PATIENCE: &str = "15";

/// Two clients in one pod: one makes a new connection for each request (curl), the other keeps one for ever (socat).
pub struct Neighbour {
    requests: Process,
    established: Process,
}

impl Neighbour {
    /// Starts both in `pod`: requests to `url`, and an echo over one connection to `echo` (`address:port`). Returns
    /// when both have had an answer.
    ///
    /// # Errors
    /// One of them has none.
    pub fn start(lab: &Lab, pod: &str, url: &str, echo: &str) -> Result<Self> {
        let requests = format!(
            "while :; do curl -sS -m {PATIENCE} -o /dev/null -w '%{{http_code}}\\n' '{url}' 2>&1; sleep 0.05; done"
        );
        let ticks = format!("while echo tick; do sleep 0.1; done | exec socat -t5 - TCP:{echo}");
        let requests = lab.spawn(pod, &["sh", "-c", &requests])?;
        let established = lab.spawn(pod, &["sh", "-c", &ticks])?;
        let soon = Duration::from_secs(20);
        requests
            .wait_stdout("\n", soon)
            .and_then(|()| established.wait_stdout("tick", soon))
            .with_context(|| format!("the daemons say {:#?}", failures(lab)))?;
        Ok(Self {
            requests,
            established,
        })
    }

    /// Answers so far, of both.
    pub fn answers(&self) -> (usize, usize) {
        let lines = |bytes: Vec<u8>| bytes.iter().filter(|byte| **byte == b'\n').count();
        (
            lines(self.requests.stdout()),
            lines(self.established.stdout()),
        )
    }

    /// Waits until both have had a further answer, and checks that there was none but good ones since the start.
    ///
    /// # Errors
    /// An answer was bad, late or missing, or the established connection has ended.
    pub fn unharmed(&mut self, lab: &Lab) -> Result<()> {
        let before = self.answers();
        lab.wait_until(
            "the neighbour's next answers",
            Duration::from_secs(20),
            || {
                let now = self.answers();
                (now.0 > before.0 && now.1 > before.1).then_some(())
            },
        )?;
        let said = String::from_utf8_lossy(&self.requests.stdout()).into_owned();
        let bad: Vec<_> = said.lines().filter(|line| *line != "200").collect();
        ensure!(
            bad.is_empty(),
            "the neighbour had {} bad answers of {}: {bad:?}; the daemons say {:#?}",
            bad.len(),
            before.0,
            failures(lab)
        );
        ensure!(
            self.established.is_running(),
            "the neighbour's established connection has ended; the daemons say {:#?}",
            failures(lab)
        );
        Ok(())
    }
}

/// What the daemons say of the neighbour's connections that failed, for the reader of an error.
fn failures(lab: &Lab) -> Vec<String> {
    let lines = ["a", "b"].map(|node| access_log::lines(lab, node).unwrap_or_default());
    let of_neighbour = lines.into_iter().flatten().filter(|line| {
        line.field("src.workload") == "neighbour" && !line.field("error").is_empty()
    });
    of_neighbour.map(|line| line.line).collect()
}
