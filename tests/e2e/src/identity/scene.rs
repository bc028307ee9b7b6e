//! The lab of these suites, and the traffic in it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{IpFamily, Lab, Options};

use super::{Attempt, Path, Short, Stream, Timeline};
use crate::manifest::{self, Pod};
use crate::programs::{PORT, nginx};
use crate::tcp_load::Echo;

/// Both nodes.
pub const NODES: [&str; 2] = ["a", "b"];

/// Across the nodes both ways, and on one node.
pub const PATHS: [Path<'static>; 3] = [
    Path {
        node: "a",
        source: "client-a",
        destination: "web-b",
    },
    Path {
        node: "b",
        source: "client-b",
        destination: "web-a",
    },
    Path {
        node: "a",
        source: "client-a",
        destination: "web-a",
    },
];

/// Short connections a second on each path: a third of what two busy cores can do beside a build.
const RATE: u32 = 10;

/// Of each long transfer, in KiB a second each way.
const STREAM_RATE: u32 = 256;

/// How long the last connections of a load may take to show in the log.
const LOGGED: Duration = Duration::from_secs(5);

/// The pods of [`PATHS`], each with an identity of its own, and one outside the mesh.
pub fn manifests() -> String {
    let client = |name: &str, node: &str| Pod::new("shop", name).on(node).into();
    let web = |name: &str, node: &str| {
        let pod = Pod::new("shop", name).on(node).port(None, PORT);
        pod.runs(nginx(&[PORT], name)).into()
    };
    manifest::all([
        manifest::two_nodes(),
        manifest::namespace("shop", Some("ambient")),
        manifest::namespace("wild", None),
        client("client-a", "a"),
        client("client-b", "b"),
        web("web-a", "a"),
        web("web-b", "b"),
        Pod::new("wild", "stranger").on("a").into(),
    ])
}

/// A lab of [`manifests`] with these arguments for every daemon.
///
/// # Errors
/// It does not come up.
pub fn up(daemon_args: &[&str], options: Options) -> Result<Lab> {
    let daemon_args = daemon_args.iter().map(|arg| (*arg).to_owned()).collect();
    let options = Options {
        daemon_args,
        ..options
    };
    Lab::up(manifests(), options)
}

/// The identity of a pod of namespace `shop`.
pub fn identity(pod: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{pod}")
}

/// Short connections on all paths and a long transfer across the nodes each way.
#[derive(Debug)]
pub struct Traffic {
    short: Vec<(Path<'static>, Short)>,
    streams: Vec<(Path<'static>, Stream)>,
    _echoes: Vec<Echo>,
}

impl Traffic {
    /// Starts all of it; returns when bytes have come back on the long transfers.
    ///
    /// # Errors
    /// They have not.
    pub fn start(lab: &Lab) -> Result<Self> {
        let ip = |pod: &str| lab.pod_ip(&format!("shop/{pod}"), IpFamily::V4);
        let (mut short, mut streams, mut echoes) = (Vec::new(), Vec::new(), Vec::new());
        for path in PATHS {
            let (from, to) = (format!("shop/{}", path.source), ip(path.destination)?);
            short.push((path, Short::start(lab, &from, to, RATE)?));
            if path.source.ends_with('a') != path.destination.ends_with('a') {
                let echo = Echo::start(lab, &format!("shop/{}", path.destination))?;
                let stream = Stream::start(lab, &from, to, echo.port(), STREAM_RATE)?;
                streams.push((path, stream));
                echoes.push(echo);
            }
        }
        Ok(Self {
            short,
            streams,
            _echoes: echoes,
        })
    }

    /// The long transfers have not failed.
    ///
    /// # Errors
    /// One has.
    pub fn streams_go_on(&mut self) -> Result<()> {
        let mut streams = self.streams.iter_mut();
        streams.try_for_each(|(_, stream)| stream.going_on())
    }

    /// The long transfer of a client.
    pub fn stream_of(&mut self, client: &str) -> Option<&mut Stream> {
        let found = self
            .streams
            .iter_mut()
            .find(|(path, _)| path.source == client);
        found.map(|(_, stream)| stream)
    }

    /// How many short connections of each path were well up to now.
    pub fn completed(&self) -> Vec<usize> {
        let well = |(_, short): &(_, Short)| {
            let all = short.so_far();
            all.iter().filter(|one| one.failure.is_none()).count()
        };
        self.short.iter().map(well).collect()
    }

    /// Waits until every path has made `more` further connections that were well.
    ///
    /// # Errors
    /// It has not at the deadline.
    pub fn flows(&self, lab: &Lab, more: usize, within: Duration) -> Result<()> {
        let before = self.completed();
        lab.wait_until("connections to be well again", within, || {
            let now = self.completed();
            let all = now
                .iter()
                .zip(&before)
                .all(|(now, before)| *now >= before + more);
            all.then_some(())
        })
    }

    /// Ends all of it: the long transfers must be whole. Returns the short connections by path.
    ///
    /// # Errors
    /// A long transfer failed, or a program broke.
    pub fn end(self) -> Result<Vec<(Path<'static>, Vec<Attempt>)>> {
        self.end_with_broken("")
    }

    /// The same where the long transfer of one client has been cut off.
    ///
    /// # Errors
    /// Another long transfer failed, or a program broke.
    pub fn end_with_broken(self, client: &str) -> Result<Vec<(Path<'static>, Vec<Attempt>)>> {
        for (path, stream) in self.streams {
            if path.source != client {
                let echoed = stream.end().context("a long transfer")?;
                ensure!(echoed > 0, "nothing came back on a long transfer");
            }
        }
        let end = |(path, short): (Path<'static>, Short)| Ok((path, short.end()?));
        self.short.into_iter().map(end).collect()
    }
}

/// Ends the traffic and judges every failure of it; returns a line for each path and how many failed.
///
/// # Errors
/// A failure was avoidable or was not explained, or a long transfer failed.
pub fn judge(lab: &Lab, traffic: Traffic, timeline: &Timeline) -> Result<usize> {
    let mut failures = 0;
    for (path, attempts) in traffic.end()? {
        let judged = lab.wait_until("the log of the last connections", LOGGED, || {
            path.judge(lab, &attempts, timeline).ok()
        });
        let failed = match judged {
            Ok(failed) => failed,
            Err(_) => path.judge(lab, &attempts, timeline)?,
        };
        println!(
            "{} -> {}: {} connections, {failed} failed",
            path.source,
            path.destination,
            attempts.len()
        );
        failures += failed;
    }
    Ok(failures)
}

/// Ends the traffic, of which nothing may have failed.
///
/// # Errors
/// Something has.
pub fn unharmed(traffic: Traffic) -> Result<usize> {
    let mut count = 0;
    for (path, attempts) in traffic.end()? {
        if let Some(failed) = attempts.iter().find(|one| one.failure.is_some()) {
            bail!("{path:?}: {failed:?}");
        }
        count += attempts.len();
    }
    Ok(count)
}
