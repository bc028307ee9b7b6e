//! The lab of the certificate suites, and the load that runs in it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{IpFamily, Lab, Options};

use super::{CertTimeline, ConnectionRecord, EchoStream, LoadPath, ShortConnections};
use crate::manifest::{self, Pod};
use crate::programs::{PORT, nginx};
use crate::tcp_load::EchoServer;

/// The nodes.
pub const NODES: [&str; 2] = ["a", "b"];

/// The paths of the load: across the nodes in both directions, and within one node.
pub const PATHS: [LoadPath<'static>; 3] = [
    LoadPath {
        node: "a",
        source: "client-a",
        destination: "web-b",
    },
    LoadPath {
        node: "b",
        source: "client-b",
        destination: "web-a",
    },
    LoadPath {
        node: "a",
        source: "client-a",
        destination: "web-a",
    },
];

/// Short connections per second on each path: a third of what two cores can do while a build runs.
const CONNECTIONS_PER_SECOND: u32 = 10;

/// Rate of each echo stream in KiB per second, in each direction.
const STREAM_KIB_PER_SECOND: u32 = 256;

/// How long the last connections of a load may take to appear in the log.
const LOG_DEADLINE: Duration = Duration::from_secs(5);

/// The pods of [`PATHS`], each with its own identity, and a pod outside the mesh.
pub fn manifests() -> String {
    let client = |name: &str, node: &str| Pod::new("shop", name).on(node).into();
    let web = |name: &str, node: &str| {
        let pod = Pod::new("shop", name).on(node).port(None, PORT);
        pod.runs(nginx(&[PORT], name)).into()
    };
    manifest::all([
        manifest::two_nodes(),
        manifest::namespace("shop", Some("ambient")),
        manifest::namespace("outside", None),
        client("client-a", "a"),
        client("client-b", "b"),
        web("web-a", "a"),
        web("web-b", "b"),
        Pod::new("outside", "outsider").on("a").into(),
    ])
}

/// Brings up a lab of [`manifests`] with these arguments for every daemon.
///
/// # Errors
/// The lab does not come up.
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

/// Short connections on all paths, and an echo stream across the nodes in each direction.
#[derive(Debug)]
pub struct BackgroundLoad {
    short: Vec<(LoadPath<'static>, ShortConnections)>,
    streams: Vec<(LoadPath<'static>, EchoStream)>,
    _echoes: Vec<EchoServer>,
}

impl BackgroundLoad {
    /// Starts the load. Returns when every stream has received its first bytes.
    ///
    /// # Errors
    /// A stream has received none.
    pub fn start(lab: &Lab) -> Result<Self> {
        let ip = |pod: &str| lab.pod_ip(&format!("shop/{pod}"), IpFamily::V4);
        let (mut short, mut streams, mut echoes) = (Vec::new(), Vec::new(), Vec::new());
        for path in PATHS {
            let (from, to) = (format!("shop/{}", path.source), ip(path.destination)?);
            short.push((
                path,
                ShortConnections::start(lab, &from, to, CONNECTIONS_PER_SECOND)?,
            ));
            if path.source.ends_with('a') != path.destination.ends_with('a') {
                let echo = EchoServer::start(lab, &format!("shop/{}", path.destination))?;
                let stream = EchoStream::start(lab, &from, to, echo.port(), STREAM_KIB_PER_SECOND)?;
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

    /// Checks that no stream has failed.
    ///
    /// # Errors
    /// A stream has failed.
    pub fn check_streams(&mut self) -> Result<()> {
        let mut streams = self.streams.iter_mut();
        streams.try_for_each(|(_, stream)| stream.check_alive())
    }

    /// The stream of a client.
    pub fn stream_of(&mut self, client: &str) -> Option<&mut EchoStream> {
        let found = self
            .streams
            .iter_mut()
            .find(|(path, _)| path.source == client);
        found.map(|(_, stream)| stream)
    }

    /// How many short connections of each path have succeeded so far.
    pub fn success_counts(&self) -> Vec<usize> {
        let successes = |(_, short): &(_, ShortConnections)| {
            let all = short.records();
            all.iter().filter(|record| record.failure.is_none()).count()
        };
        self.short.iter().map(successes).collect()
    }

    /// Waits until `more` further short connections have succeeded on every path.
    ///
    /// # Errors
    /// They have not after `timeout`.
    pub fn wait_progress(&self, lab: &Lab, more: usize, timeout: Duration) -> Result<()> {
        let before = self.success_counts();
        lab.wait_until("connections to succeed on every path", timeout, || {
            let now = self.success_counts();
            let all = now
                .iter()
                .zip(&before)
                .all(|(now, before)| *now >= before + more);
            all.then_some(())
        })
    }

    /// Stops the load and checks the streams. Returns the short connections by path.
    ///
    /// # Errors
    /// A stream or a client program failed.
    pub fn finish(self) -> Result<Vec<(LoadPath<'static>, Vec<ConnectionRecord>)>> {
        self.finish_except("")
    }

    /// Like [`Self::finish`], but ignores the stream of `client`, which has been cut off.
    ///
    /// # Errors
    /// Another stream or a client program failed.
    pub fn finish_except(
        self,
        client: &str,
    ) -> Result<Vec<(LoadPath<'static>, Vec<ConnectionRecord>)>> {
        for (path, stream) in self.streams {
            if path.source != client {
                let echoed = stream.finish().context("echo stream")?;
                ensure!(echoed > 0, "an echo stream received nothing");
            }
        }
        let end =
            |(path, short): (LoadPath<'static>, ShortConnections)| Ok((path, short.finish()?));
        self.short.into_iter().map(end).collect()
    }
}

/// Stops the load and checks every failed connection, see [`LoadPath::check_failures`]. Returns how many failed.
///
/// # Errors
/// A check or a stream failed.
pub fn finish_and_check_failures(
    lab: &Lab,
    load: BackgroundLoad,
    timeline: &CertTimeline,
) -> Result<usize> {
    let mut failures = 0;
    for (path, records) in load.finish()? {
        let checked = lab.wait_until("the log of the last connections", LOG_DEADLINE, || {
            path.check_failures(lab, &records, timeline).ok()
        });
        let failed = match checked {
            Ok(failed) => failed,
            Err(_) => path.check_failures(lab, &records, timeline)?,
        };
        println!(
            "{} -> {}: {} connections, {failed} failed",
            path.source,
            path.destination,
            records.len()
        );
        failures += failed;
    }
    Ok(failures)
}

/// Stops the load and checks that no connection failed. Returns how many there were.
///
/// # Errors
/// A connection failed.
pub fn finish_without_failures(load: BackgroundLoad) -> Result<usize> {
    let mut count = 0;
    for (path, records) in load.finish()? {
        if let Some(failed) = records.iter().find(|record| record.failure.is_some()) {
            bail!("{path:?}: {failed:?}");
        }
        count += records.len();
    }
    Ok(count)
}
