//! Traffic whose bytes can be recognised on the wire, and the state of a pod's network namespace.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::{Lab, Location, Options, Process};

use crate::manifest;
use crate::programs::{PORT, curl, nginx, url, words};

/// The port of [`server`] that echoes; [`PORT`] answers HTTP.
pub const ECHO_PORT: u16 = 7000;

/// Rules are verified every 2 s; this leaves room for a busy machine and for TCP's retransmissions.
pub const REPAIR_DEADLINE: Duration = Duration::from_secs(10);

/// In every request and in every answer.
pub const MARKER: &str = "marker-4d61726b6572";

/// The longest that a request of a client that is cut off may stand in the way of the next one, in seconds.
const IMPATIENT: u32 = 2;

/// Answers that prove that traffic flows, and not only that one packet got through.
const FLOWING: usize = 3;

/// A server for [`Traffic`]: HTTP on [`PORT`] that answers with the client's marker and `name`, and an echo on [`ECHO_PORT`].
pub fn server(name: &str) -> Vec<String> {
    let script = format!(
        "socat TCP6-LISTEN:{ECHO_PORT},ipv6only=0,reuseaddr,fork,backlog=128 EXEC:cat & exec \"$@\""
    );
    let mut command = words(&["sh", "-c", &script, "sh"]);
    command.extend(nginx(&[PORT], &format!("$http_x_marker {name}")));
    command
}

/// New connections (curl) and an established one (socat), both without end, with a marker in what is sent and in what
/// comes back.
pub struct Traffic {
    marker: String,
    requests: Process,
    established: Process,
}

impl Traffic {
    /// Starts in `pod`, towards a [`server`]'s address. Returns when both kinds flow.
    ///
    /// # Errors
    /// One of them does not within 10 s.
    pub fn start(lab: &Lab, pod: &str, to: IpAddr, marker: &str) -> Result<Self> {
        Self::start_with_timeout(lab, pod, to, marker, IMPATIENT)
    }

    /// The same with requests that may take so many seconds, for where none may fail.
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
        let place = Location::pod(pod);
        let url = url(to, PORT);
        // Each line is one request: the answer, or curl's complaint.
        let curl = format!(
            "while :; do curl -sS -m {seconds} -H 'Connection: close' -H 'X-Marker: {marker}' '{url}' 2>&1; echo; \
             sleep 0.05; done"
        );
        let echo = SocketAddr::new(to, ECHO_PORT);
        let socat =
            format!("while echo {marker}; do sleep 0.05; done | exec socat -t5 - TCP:{echo}");
        let traffic = Self {
            marker: marker.to_owned(),
            requests: lab.spawn_in(&place, &["sh", "-c", &curl])?,
            established: lab.spawn_in(&place, &["sh", "-c", &socat])?,
        };
        traffic.wait_flowing(lab, Duration::from_secs(10))?;
        Ok(traffic)
    }

    /// The answers to requests so far, good and bad, oldest first; the last one may be incomplete.
    pub fn responses(&self) -> Vec<String> {
        let said = String::from_utf8_lossy(&self.requests.stdout()).into_owned();
        said.lines()
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect()
    }

    /// How many requests were answered well.
    pub fn successes(&self) -> usize {
        self.responses()
            .iter()
            .filter(|answer| answer.starts_with(&self.marker))
            .count()
    }

    /// How many lines the established connection has brought back.
    pub fn echoes(&self) -> usize {
        self.established
            .stdout()
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
    }

    /// Waits until new connections work, from now on.
    ///
    /// # Errors
    /// They do not within the time; says how requests ended instead.
    pub fn wait_new_flowing(&self, lab: &Lab, within: Duration) -> Result<()> {
        let before = self.successes();
        lab.wait_until("new connections to work", within, || {
            (self.successes() >= before + FLOWING).then_some(())
        })
        .with_context(|| format!("the last answers are {:?}", self.last_answers()))
    }

    /// Waits until the established connection carries bytes both ways, from now on.
    ///
    /// # Errors
    /// It does not within the time.
    pub fn wait_established_flowing(&self, lab: &Lab, within: Duration) -> Result<()> {
        let before = self.echoes();
        lab.wait_until("the established connection to carry bytes", within, || {
            (self.echoes() >= before + FLOWING).then_some(())
        })
        .with_context(|| String::from_utf8_lossy(&self.established.stderr()).into_owned())
    }

    /// Both.
    ///
    /// # Errors
    /// One of them does not flow within the time.
    pub fn wait_flowing(&self, lab: &Lab, within: Duration) -> Result<()> {
        self.wait_new_flowing(lab, within)?;
        self.wait_established_flowing(lab, within)
    }

    /// Waits until a request has failed that began after now, which shows that traffic is cut.
    ///
    /// # Errors
    /// Requests go on to succeed.
    pub fn wait_cut(&self, lab: &Lab) -> Result<()> {
        let before = self.responses().len();
        lab.wait_until("requests to fail", Duration::from_secs(10), || {
            // The one that was under way, and then those that began since.
            let mut since = self.responses().into_iter().skip(before + 1);
            since
                .any(|answer| answer.starts_with("curl:"))
                .then_some(())
        })
    }

    /// Ends the established connection with a FIN.
    pub fn close_established(&mut self) {
        self.established.signal(nix::sys::signal::Signal::SIGTERM);
    }

    fn last_answers(&self) -> Vec<String> {
        let answers = self.responses();
        answers.iter().rev().take(5).cloned().collect()
    }
}

/// What the kernel of a pod's network namespace has been told about packets: nft ruleset without counters, policy
/// rules, and all routes, of both families.
///
/// # Errors
/// A tool fails.
pub fn network_state(lab: &Lab, pod: &str) -> Result<String> {
    let script = "set -e; nft -s list ruleset; for family in -4 -6; do echo \"# ip $family\"; ip $family rule; \
                  ip $family route show table all | sed 's/ expires [0-9]*sec//' | sort; done";
    lab.exec(pod, &["sh", "-c", script])?
        .ok()
        .with_context(|| format!("netfilter state of {pod}"))
}

/// Runs a shell script in a pod, which must succeed.
///
/// # Errors
/// It fails.
pub fn shell(lab: &Lab, pod: &str, script: &str) -> Result<String> {
    lab.exec(pod, &["sh", "-c", script])?
        .ok()
        .with_context(|| format!("{script} in {pod}"))
}

/// The lines of which two states differ, for the reader of a failed test.
pub fn changed_lines(before: &str, now: &str) -> String {
    let only = |sign: &str, these: &str, those: &str| -> Vec<String> {
        let missing = these
            .lines()
            .filter(|line| !those.lines().any(|other| other == *line));
        missing.map(|line| format!("{sign}{line}")).collect()
    };
    [only("-", before, now), only("+", now, before)]
        .concat()
        .join("\n")
}

/// Waits until the network namespace of a pod is again as it was.
///
/// # Errors
/// It is not within the time; the error shows what is different.
pub fn wait_restored(lab: &Lab, pod: &str, before: &str, within: Duration) -> Result<()> {
    lab.wait_until(
        &format!("the namespace of {pod} to be as it was"),
        within,
        || (network_state(lab, pod).ok()? == before).then_some(()),
    )
    .with_context(|| changed_lines(before, &network_state(lab, pod).unwrap_or_default()))
}

/// Two nodes and these objects.
///
/// # Errors
/// The lab does not settle.
pub fn up(manifests: impl IntoIterator<Item = String>) -> Result<Lab> {
    let all = [manifest::two_nodes()].into_iter().chain(manifests);
    Lab::up(manifest::all(all), Options::default())
}

/// Waits until a request of `from` is answered by `name`, and returns how long that took.
///
/// # Errors
/// It is not answered so within [`REPAIR_DEADLINE`].
pub fn wait_for_response(lab: &Lab, from: &str, to: IpAddr, name: &str) -> Result<Duration> {
    let start = Instant::now();
    let request = || curl(lab, &Location::pod(from), &url(to, PORT), &["-m", "2"]).ok();
    lab.wait_until(&format!("{name} to answer {from}"), REPAIR_DEADLINE, || {
        request().filter(|answer| answer.body.ends_with(name))
    })?;
    Ok(start.elapsed())
}
