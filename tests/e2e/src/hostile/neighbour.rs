//! A well-behaved client that shares a daemon with the attacked pod.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Process};

use crate::access_log;

/// How long one request may take before the neighbour counts as affected.
const REQUEST_TIMEOUT_SECS: &str = "15";

/// How long the next answers may take to arrive.
const DEADLINE: Duration = Duration::from_secs(20);

/// Two clients in one pod: curl makes a new connection for each request, socat keeps one connection open.
pub struct Neighbour {
    requests: Process,
    established: Process,
}

impl Neighbour {
    /// Starts both clients in `pod`: requests to `url`, and an echo over one connection to `echo` (`address:port`).
    /// Returns when both have received an answer.
    ///
    /// # Errors
    /// A client has no answer within 20 s.
    pub fn start(lab: &Lab, pod: &str, url: &str, echo: &str) -> Result<Self> {
        let requests = format!(
            "while :; do curl -sS -m {REQUEST_TIMEOUT_SECS} -o /dev/null -w '%{{http_code}}\\n' '{url}' 2>&1; sleep 0.05; done"
        );
        let ticks = format!("while echo tick; do sleep 0.1; done | exec socat -t5 - TCP:{echo}");
        let requests = lab.spawn(pod, &["sh", "-c", &requests])?;
        let established = lab.spawn(pod, &["sh", "-c", &ticks])?;
        requests
            .wait_stdout("\n", DEADLINE)
            .and_then(|()| established.wait_stdout("tick", DEADLINE))
            .with_context(|| {
                format!("failed connections of the neighbour: {:#?}", failures(lab))
            })?;
        Ok(Self {
            requests,
            established,
        })
    }

    /// How many answers each client has received so far: curl's, socat's.
    pub fn answer_counts(&self) -> (usize, usize) {
        let lines = |bytes: Vec<u8>| bytes.iter().filter(|byte| **byte == b'\n').count();
        (
            lines(self.requests.stdout()),
            lines(self.established.stdout()),
        )
    }

    /// Waits until both clients have received another answer, and checks that every answer since the start was 200.
    ///
    /// # Errors
    /// An answer was wrong, late or missing, or the established connection has ended.
    pub fn check_unaffected(&mut self, lab: &Lab) -> Result<()> {
        let before = self.answer_counts();
        lab.wait_until("the neighbour's next answers", DEADLINE, || {
            let now = self.answer_counts();
            (now.0 > before.0 && now.1 > before.1).then_some(())
        })?;
        let stdout = String::from_utf8_lossy(&self.requests.stdout()).into_owned();
        let failed: Vec<_> = stdout.lines().filter(|line| *line != "200").collect();
        ensure!(
            failed.is_empty(),
            "{} of the neighbour's {} requests failed: {failed:?}; its failed connections: {:#?}",
            failed.len(),
            before.0,
            failures(lab)
        );
        ensure!(
            self.established.is_running(),
            "the neighbour's established connection has ended; its failed connections: {:#?}",
            failures(lab)
        );
        Ok(())
    }
}

/// The access-log lines of the neighbour's failed connections on both nodes.
fn failures(lab: &Lab) -> Vec<String> {
    let lines = ["a", "b"].map(|node| access_log::lines(lab, node).unwrap_or_default());
    let of_neighbour = lines.into_iter().flatten().filter(|line| {
        line.field("src.workload") == "neighbour" && !line.field("error").is_empty()
    });
    of_neighbour.map(|line| line.line).collect()
}
