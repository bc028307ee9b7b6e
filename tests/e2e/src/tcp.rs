//! Runs one TCP connection between two scripted programs over every path through and around the mesh.
//!
//! Both ends run `tcp_peer.py`, which executes a script of steps (`send 100k`, `shut`, `drain`, `reset`) on a plain
//! socket and prints one event per line (`received 102400 intact`, `fin`, `rst`). It compares every byte with the
//! stream that the other end sends. A [`Scenario`] has both scripts and the events that both ends must print, the same
//! on every [`Path`]. The direct path checks the scenario against plain TCP, the others check that the mesh changes
//! nothing.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Options, Process};

use crate::manifest::{self, Pod};

/// The longest script takes 70 s; a peer without progress for 90 s prints an event and ends.
const DEADLINE: Duration = Duration::from_secs(120);

/// The program that plays one end of a connection.
const PEER: &str = include_str!("tcp_peer.py");

/// Which of client and server are in the mesh. They are always on different nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Both pods are outside the mesh: plain TCP.
    Direct,
    /// Both pods are in the mesh, over IPv4: two daemons and a tunnel.
    Meshed,
    /// The same over IPv6.
    MeshedV6,
    /// Only the client is in the mesh: its daemon relays to plain TCP.
    MeshToPlain,
    /// Only the server is in the mesh: its daemon relays from plain TCP.
    PlainToMesh,
}

impl Path {
    /// Every path.
    pub const ALL: [Self; 5] = [
        Self::Direct,
        Self::Meshed,
        Self::MeshedV6,
        Self::MeshToPlain,
        Self::PlainToMesh,
    ];

    /// The client's pod.
    pub fn client(self) -> &'static str {
        match self {
            Self::Direct | Self::PlainToMesh => "plain/client",
            Self::Meshed | Self::MeshedV6 | Self::MeshToPlain => "mesh/client",
        }
    }

    /// The server's pod.
    pub fn server(self) -> &'static str {
        match self {
            Self::Direct | Self::MeshToPlain => "plain/server",
            Self::Meshed | Self::MeshedV6 | Self::PlainToMesh => "mesh/server",
        }
    }

    /// The server's address.
    ///
    /// # Errors
    /// The lab has no such pod.
    pub fn address(self, lab: &Lab) -> Result<IpAddr> {
        let family = if self == Self::MeshedV6 {
            IpFamily::V6
        } else {
            IpFamily::V4
        };
        lab.pod_ip(self.server(), family)
    }
}

/// The scripts of both ends of a connection, and the events that they must print.
#[derive(Debug, Clone, Copy)]
pub struct Scenario<'a> {
    /// The client's steps after its connect.
    pub client: &'a [&'a str],
    /// The client's events in order, after `connected`.
    pub client_events: &'a [&'a str],
    /// The server's steps after its accept.
    pub server: &'a [&'a str],
    /// The server's events in order, after `accepted`.
    pub server_events: &'a [&'a str],
}

/// What one end printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    /// The events, one per line.
    pub events: Vec<String>,
    /// The measurements: times and amounts, which differ from run to run.
    pub measurements: Vec<String>,
}

impl Transcript {
    /// Splits a program's stdout into events and measurements.
    pub fn parse(stdout: &str) -> Self {
        let (measurements, events) = stdout
            .lines()
            .map(str::to_owned)
            .partition(|line| line.starts_with('#'));
        Self {
            events,
            measurements,
        }
    }

    /// The first number after these words in a measurement: `blocked after` 3145728.
    pub fn number(&self, words: &str) -> Option<f64> {
        let rest = self
            .measurements
            .iter()
            .find_map(|line| line.split_once(words))?
            .1;
        rest.split_whitespace().next()?.parse().ok()
    }
}

/// What both ends printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcripts {
    /// The client's transcript.
    pub client: Transcript,
    /// The server's transcript.
    pub server: Transcript,
}

/// The programs of a running scenario.
#[derive(Debug)]
pub struct RunningScenario {
    client: Process,
    server: Process,
    _side_channel: tempfile::TempDir,
}

impl RunningScenario {
    /// Starts both ends in their pods.
    ///
    /// # Errors
    /// A pod is missing, or python3 is not installed.
    pub fn start(lab: &Lab, path: Path, client: &[&str], server: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir().context("create a folder for the side channel")?;
        let channel = dir.path().join("s").display().to_string();
        let listen = peer_command(&[&[&channel, "listen"], server].concat());
        let address = path.address(lab)?.to_string();
        let connect = peer_command(&[&[&channel, "connect", &address], client].concat());
        Ok(Self {
            server: lab.spawn(path.server(), &as_strs(&listen))?,
            client: lab.spawn(path.client(), &as_strs(&connect))?,
            _side_channel: dir,
        })
    }

    /// Waits until the client has printed this event.
    ///
    /// # Errors
    /// It has not after 120 s.
    pub fn wait_client(&self, event: &str) -> Result<()> {
        self.client.wait_stdout(&format!("{event}\n"), DEADLINE)
    }

    /// Waits until the server has printed this event.
    ///
    /// # Errors
    /// It has not after 120 s.
    pub fn wait_server(&self, event: &str) -> Result<()> {
        self.server.wait_stdout(&format!("{event}\n"), DEADLINE)
    }

    /// Ends the server's step `hold`.
    ///
    /// # Errors
    /// The server program has ended.
    pub fn release_server(&mut self) -> Result<()> {
        self.server.write(b"go on\n")
    }

    /// Ends the client's step `hold`.
    ///
    /// # Errors
    /// The client program has ended.
    pub fn release_client(&mut self) -> Result<()> {
        self.client.write(b"go on\n")
    }

    /// Waits until both scripts have ended.
    ///
    /// # Errors
    /// A script did not end within 120 s, or failed.
    pub fn finish(self) -> Result<Transcripts> {
        let client = self.client.wait(DEADLINE).context("client")?;
        let server = self.server.wait(DEADLINE).context("server")?;
        for (end, output) in [("client", &client), ("server", &server)] {
            ensure!(
                output.success(),
                "{end}: {}\n{}",
                output.stdout,
                output.stderr
            );
        }
        let (client, server) = (
            Transcript::parse(&client.stdout),
            Transcript::parse(&server.stdout),
        );
        Ok(Transcripts { client, server })
    }
}

/// The command line of `tcp_peer.py`.
pub fn peer_command(arguments: &[&str]) -> Vec<String> {
    python_command(PEER, arguments)
}

/// The command line of a python program. It prefers the system's interpreter, because one in the user's PATH may be a
/// wrapper; -S and -E ignore site packages and environment.
pub(crate) fn python_command(text: &str, arguments: &[&str]) -> Vec<String> {
    let packaged = std::path::Path::new("/usr/bin/python3");
    let python = if packaged.exists() {
        "/usr/bin/python3"
    } else {
        "python3"
    };
    [&[python, "-S", "-E", "-c", text], arguments]
        .concat()
        .iter()
        .map(|&word| word.to_owned())
        .collect()
}

/// A command line as [`Lab::spawn`] takes it.
pub fn as_strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// A client pod on node `a` and a server pod on node `b`, each inside and outside the mesh.
pub fn manifests() -> String {
    let pod = |namespace: &str, name: &str, node: &str| {
        let account = manifest::service_account(namespace, name);
        manifest::all([account, Pod::new(namespace, name).on(node).into()])
    };
    manifest::all([
        manifest::two_nodes(),
        manifest::namespace("mesh", Some("ambient")),
        manifest::namespace("plain", None),
        pod("mesh", "client", "a"),
        pod("mesh", "server", "b"),
        pod("plain", "client", "a"),
        pod("plain", "server", "b"),
    ])
}

/// The lab that all scenarios of this test process share, so that their connections share daemons and tunnels as in a
/// cluster. It is removed when the process ends.
///
/// # Panics
/// The lab does not come up.
pub fn shared_lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| match up(Options::default()) {
        Ok(lab) => lab,
        Err(error) => panic!("{error:#}"),
    })
}

/// Brings up a lab of [`manifests`]. The pods' socket buffers get Linux's default limits, whatever the machine's are.
/// That bounds the bytes in flight on a connection that is not read, and the share of many such connections in the
/// memory of all sockets of the machine (`tcp_mem`), beyond which the kernel resets arbitrary connections.
///
/// # Errors
/// The lab does not come up.
pub fn up(options: Options) -> Result<Lab> {
    let lab = Lab::up(manifests(), options)?;
    let set_buffers = "cd /proc/sys/net/ipv4 && echo 4096 131072 6291456 >tcp_rmem && echo 4096 16384 4194304 >tcp_wmem";
    for pod in ["mesh/client", "mesh/server", "plain/client", "plain/server"] {
        lab.exec(pod, &["sh", "-c", set_buffers])?
            .ok()
            .with_context(|| format!("socket buffers of {pod}"))?;
    }
    Ok(lab)
}

/// Runs a scenario on one path to its end.
///
/// # Errors
/// A script did not end or failed.
fn run(lab: &Lab, path: Path, scenario: &Scenario<'_>) -> Result<Transcripts> {
    RunningScenario::start(lab, path, scenario.client, scenario.server)?.finish()
}

impl Scenario<'_> {
    /// Runs the scenario on every path concurrently and checks the events of both ends. Returns the transcripts, whose
    /// measurements a test may check.
    ///
    /// # Panics
    /// An end printed other events; the message has both transcripts of each such path.
    pub fn assert_on_every_path(&self) -> Vec<(Path, Transcripts)> {
        self.assert_on(&Path::ALL)
    }

    /// Like [`Self::assert_on_every_path`], for a scenario that would take too long on all paths.
    ///
    /// # Panics
    /// An end printed other events.
    pub fn assert_on(&self, paths: &[Path]) -> Vec<(Path, Transcripts)> {
        let lab = shared_lab();
        let runs: Vec<_> = std::thread::scope(|scope| {
            let start = |path: &Path| {
                let path = *path;
                scope.spawn(move || (path, run(lab, path, self)))
            };
            let runs: Vec<_> = paths.iter().map(start).collect();
            runs.into_iter().filter_map(|run| run.join().ok()).collect()
        });
        let different: Vec<_> = runs
            .iter()
            .filter_map(|(path, run)| self.difference(*path, run))
            .collect();
        assert!(
            different.is_empty() && runs.len() == paths.len(),
            "\n{}",
            different.join("\n")
        );
        runs.into_iter()
            .filter_map(|(path, run)| Some((path, run.ok()?)))
            .collect()
    }

    fn difference(&self, path: Path, run: &Result<Transcripts>) -> Option<String> {
        let transcripts = match run {
            Ok(transcripts) => transcripts,
            Err(error) => return Some(format!("{path:?}: {error:#}")),
        };
        let ends = [
            (
                "client",
                &transcripts.client,
                "connected",
                self.client_events,
            ),
            (
                "server",
                &transcripts.server,
                "accepted",
                self.server_events,
            ),
        ];
        let is_expected = ends.iter().all(|(_, transcript, first, expected)| {
            transcript
                .events
                .iter()
                .map(String::as_str)
                .eq([*first].into_iter().chain(expected.iter().copied()))
        });
        let lines = ends.map(|(end, transcript, _, expected)| {
            format!(
                "  {end} expected {expected:?}\n         printed  {:?}\n         {:?}",
                transcript.events, transcript.measurements
            )
        });
        (!is_expected).then(|| format!("{path:?}:\n{}", lines.join("\n")))
    }
}
