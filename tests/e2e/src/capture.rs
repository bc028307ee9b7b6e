//! Continuous traffic with a marker that packet captures can find, and the network state of a pod.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::{Lab, Location, Options, Process};
use tempfile::TempDir;

use crate::manifest;
use crate::programs::{PORT, curl, nginx, url, words};

/// The echo port of [`server`]. HTTP is on [`PORT`].
pub const ECHO_PORT: u16 = 7000;

/// Limit of a repair. Daemons verify rules every 2 s; the rest is room for a busy machine and for TCP
/// retransmissions.
pub const REPAIR_DEADLINE: Duration = Duration::from_secs(10);

/// The text in every request and in every response.
pub const MARKER: &str = "marker-4d61726b6572";

/// Timeout of a request, which bounds how long a lost request delays the next one.
const REQUEST_TIMEOUT_SECONDS: u32 = 2;

/// Number of responses after which traffic is flowing. A single one could have been in flight.
const FLOWING_RESPONSES: usize = 3;

const PAUSE_FILE: &str = "pause";

/// Time without an echo after which nothing is in flight: ten times the interval of the sender.
const QUIET_TIME: Duration = Duration::from_millis(500);

/// The command of a server for [`Traffic`]: HTTP on [`PORT`], whose responses are the client's marker
/// and `name`, and an echo on [`ECHO_PORT`].
pub fn server(name: &str) -> Vec<String> {
    let script = format!(
        "socat TCP6-LISTEN:{ECHO_PORT},ipv6only=0,reuseaddr,fork,backlog=128 EXEC:cat & exec \"$@\""
    );
    let mut command = words(&["sh", "-c", &script, "sh"]);
    command.extend(nginx(&[PORT], &format!("$http_x_marker {name}")));
    command
}

/// A client that opens new connections (curl) and uses an established one (socat) continuously, with
/// a marker in both directions.
pub struct Traffic {
    marker: String,
    requests: Process,
    established: Process,
    /// The established connection sends nothing while this folder contains [`PAUSE_FILE`].
    pause: TempDir,
}

impl Traffic {
    /// Starts the client in `pod`, towards the address of a [`server`]. Returns when traffic flows on new
    /// connections and on the established one.
    ///
    /// # Errors
    /// Traffic does not flow within 10 s.
    pub fn start(lab: &Lab, pod: &str, to: IpAddr, marker: &str) -> Result<Self> {
        Self::start_with_timeout(lab, pod, to, marker, REQUEST_TIMEOUT_SECONDS)
    }

    /// As [`Self::start`] with another request timeout, for tests in which no request may fail.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with_timeout(
        lab: &Lab,
        pod: &str,
        to: IpAddr,
        marker: &str,
        seconds: u32,
    ) -> Result<Self> {
        let client = Location::pod(pod);
        let url = url(to, PORT);
        // Each line is one request: the response, or curl's error text.
        let curl = format!(
            "while :; do curl -sS -m {seconds} -H 'Connection: close' -H 'X-Marker: {marker}' '{url}' 2>&1; echo; \
             sleep 0.05; done"
        );
        let echo = SocketAddr::new(to, ECHO_PORT);
        let pause = TempDir::new()?;
        let pause_file = pause.path().join(PAUSE_FILE);
        let socat = format!(
            "while [ -e '{}' ] || echo {marker}; do sleep 0.05; done | exec socat -t5 - TCP:{echo}",
            pause_file.display()
        );
        let traffic = Self {
            marker: marker.to_owned(),
            pause,
            requests: lab.spawn_in(&client, &["sh", "-c", &curl])?,
            established: lab.spawn_in(&client, &["sh", "-c", &socat])?,
        };
        traffic.wait_flowing(lab, Duration::from_secs(10))?;
        Ok(traffic)
    }

    /// Stops sending on the established connection, and returns when nothing is in flight on it.
    ///
    /// # Errors
    /// Echoes still arrive after `within`.
    pub fn pause_established(&self, lab: &Lab, within: Duration) -> Result<()> {
        std::fs::write(self.pause.path().join(PAUSE_FILE), "")?;
        let (mut echoes, mut since) = (self.echoes(), Instant::now());
        lab.wait_until("the established connection to be idle", within, || {
            let now = self.echoes();
            if now != echoes {
                (echoes, since) = (now, Instant::now());
            }
            (since.elapsed() >= QUIET_TIME).then_some(())
        })
    }

    /// Sends on the established connection again.
    ///
    /// # Errors
    /// It was not paused.
    pub fn resume_established(&self) -> Result<()> {
        Ok(std::fs::remove_file(self.pause.path().join(PAUSE_FILE))?)
    }

    /// The responses and error texts of all requests, oldest first. The last one may be incomplete.
    pub fn responses(&self) -> Vec<String> {
        let stdout = String::from_utf8_lossy(&self.requests.stdout()).into_owned();
        stdout
            .lines()
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect()
    }

    /// The number of successful requests.
    pub fn successes(&self) -> usize {
        self.responses()
            .iter()
            .filter(|response| response.starts_with(&self.marker))
            .count()
    }

    /// The number of echoed lines on the established connection.
    pub fn echoes(&self) -> usize {
        self.established
            .stdout()
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
    }

    /// Waits until requests on new connections succeed, counted from this call.
    ///
    /// # Errors
    /// They do not within the time; the error has the last responses.
    pub fn wait_new_flowing(&self, lab: &Lab, within: Duration) -> Result<()> {
        let before = self.successes();
        lab.wait_until("new connections to work", within, || {
            (self.successes() >= before + FLOWING_RESPONSES).then_some(())
        })
        .with_context(|| format!("the last responses are {:?}", self.last_responses()))
    }

    /// Waits until the established connection carries bytes in both directions, counted from this call.
    ///
    /// # Errors
    /// It does not within the time.
    pub fn wait_established_flowing(&self, lab: &Lab, within: Duration) -> Result<()> {
        let before = self.echoes();
        lab.wait_until("the established connection to carry bytes", within, || {
            (self.echoes() >= before + FLOWING_RESPONSES).then_some(())
        })
        .with_context(|| String::from_utf8_lossy(&self.established.stderr()).into_owned())
    }

    /// Waits until traffic flows on new connections and on the established one.
    ///
    /// # Errors
    /// It does not within the time.
    pub fn wait_flowing(&self, lab: &Lab, within: Duration) -> Result<()> {
        self.wait_new_flowing(lab, within)?;
        self.wait_established_flowing(lab, within)
    }

    /// Waits until a request fails that was sent after this call.
    ///
    /// # Errors
    /// All requests of 10 s succeed.
    pub fn wait_cut(&self, lab: &Lab) -> Result<()> {
        let before = self.responses().len();
        lab.wait_until("requests to fail", Duration::from_secs(10), || {
            // Skips the request that was in flight.
            let mut since = self.responses().into_iter().skip(before + 1);
            since
                .any(|response| response.starts_with("curl:"))
                .then_some(())
        })
    }

    /// Closes the established connection with a FIN.
    pub fn close_established(&mut self) {
        self.established.signal(nix::sys::signal::Signal::SIGTERM);
    }

    fn last_responses(&self) -> Vec<String> {
        let responses = self.responses();
        responses.iter().rev().take(5).cloned().collect()
    }
}

/// The packet configuration of a pod's network namespace: nft ruleset without counters, policy rules
/// and all routes, of both families.
///
/// # Errors
/// A tool fails.
pub fn network_state(lab: &Lab, pod: &str) -> Result<String> {
    let script = "set -e; nft -s list ruleset; for family in -4 -6; do echo \"# ip $family\"; ip $family rule; \
                  ip $family route show table all | sed 's/ expires [0-9]*sec//' | sort; done";
    lab.exec(pod, &["sh", "-c", script])?
        .ok()
        .with_context(|| format!("network state of {pod}"))
}

/// Runs a shell script in a pod. Returns its stdout.
///
/// # Errors
/// The script fails.
pub fn shell(lab: &Lab, pod: &str, script: &str) -> Result<String> {
    lab.exec(pod, &["sh", "-c", script])?
        .ok()
        .with_context(|| format!("{script} in {pod}"))
}

/// The removed (`-`) and added (`+`) lines between two texts.
pub fn changed_lines(before: &str, after: &str) -> String {
    let lines_only_in = |text: &str, other: &str, sign: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| !other.lines().any(|other| other == *line));
        lines.map(|line| format!("{sign}{line}")).collect()
    };
    [
        lines_only_in(before, after, "-"),
        lines_only_in(after, before, "+"),
    ]
    .concat()
    .join("\n")
}

/// Waits until the network state of a pod equals `before` again.
///
/// # Errors
/// It does not within the time; the error has the changed lines.
pub fn wait_restored(lab: &Lab, pod: &str, before: &str, within: Duration) -> Result<()> {
    lab.wait_until(
        &format!("the network state of {pod} to be restored"),
        within,
        || (network_state(lab, pod).ok()? == before).then_some(()),
    )
    .with_context(|| changed_lines(before, &network_state(lab, pod).unwrap_or_default()))
}

/// Brings up a lab with two nodes and these objects.
///
/// # Errors
/// The lab does not come up.
pub fn up(manifests: impl IntoIterator<Item = String>) -> Result<Lab> {
    let all = [manifest::two_nodes()].into_iter().chain(manifests);
    Lab::up(manifest::all(all), Options::default())
}

/// Waits until `name` responds to a request of `from`. Returns the duration.
///
/// # Errors
/// It does not within [`REPAIR_DEADLINE`].
pub fn wait_for_response(lab: &Lab, from: &str, to: IpAddr, name: &str) -> Result<Duration> {
    let start = Instant::now();
    let request = || curl(lab, &Location::pod(from), &url(to, PORT), &["-m", "2"]).ok();
    lab.wait_until(
        &format!("{name} to respond to {from}"),
        REPAIR_DEADLINE,
        || request().filter(|response| response.body.ends_with(name)),
    )?;
    Ok(start.elapsed())
}
