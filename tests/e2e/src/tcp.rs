//! One TCP connection between two scripted programs, over every path that a connection can take.
//!
//! The two ends are `tcp_peer.py`, a small program on plain sockets that follows a script of steps
//! (`send 100k`, `shut`, `drain`, `reset`) and prints what it sees, one event per line
//! (`received 102400 intact`, `fin`, `rst`). It compares every byte with the stream that the other
//! end sends. A [`Connection`] states both scripts and what both ends must see, and holds on every
//! [`Path`]: the direct one shows that it is TCP that is described, the others that the mesh adds
//! and takes away nothing.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Options, Process};

use crate::manifest::{self, Pod};

/// The longest script takes 70 s; a peer that sees nothing for 90 s says so and ends.
const DEADLINE: Duration = Duration::from_secs(120);

/// The program that plays one end of a connection.
const PEER: &str = include_str!("tcp_peer.py");

/// From where to where, and through what. Client and server are always on different nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Both pods are outside the mesh: plain TCP.
    Direct,
    /// Both pods are in the mesh, over IPv4: two daemons and a tunnel.
    Meshed,
    /// The same over IPv6.
    MeshedV6,
    /// The client alone is in the mesh: its daemon relays in plain.
    Leaving,
    /// The server alone is in the mesh: its daemon relays in plain.
    Entering,
}

impl Path {
    /// Every path.
    pub const ALL: [Self; 5] = [
        Self::Direct,
        Self::Meshed,
        Self::MeshedV6,
        Self::Leaving,
        Self::Entering,
    ];

    /// The client's pod.
    pub fn client(self) -> &'static str {
        match self {
            Self::Direct | Self::Entering => "plain/client",
            Self::Meshed | Self::MeshedV6 | Self::Leaving => "mesh/client",
        }
    }

    /// The server's pod.
    pub fn server(self) -> &'static str {
        match self {
            Self::Direct | Self::Leaving => "plain/server",
            Self::Meshed | Self::MeshedV6 | Self::Entering => "mesh/server",
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

/// What the two ends of a connection do, and what they must see of each other.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The client's steps, once it is connected.
    pub client: &'a [&'a str],
    /// What the client sees, in this order.
    pub client_sees: &'a [&'a str],
    /// The server's steps, once it has accepted.
    pub server: &'a [&'a str],
    /// What the server sees, in this order.
    pub server_sees: &'a [&'a str],
}

/// What one end saw and measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transcript {
    /// One line per event.
    pub events: Vec<String>,
    /// Times and amounts, which differ from run to run.
    pub measured: Vec<String>,
}

impl Transcript {
    /// Of the process' output.
    pub fn of(stdout: &str) -> Self {
        let (measured, events) = stdout
            .lines()
            .map(str::to_owned)
            .partition(|line| line.starts_with('#'));
        Self { events, measured }
    }

    /// The first number behind these words in a measurement: `blocked after` 3145728.
    pub fn number(&self, words: &str) -> Option<f64> {
        let behind = self
            .measured
            .iter()
            .find_map(|line| line.split_once(words))?
            .1;
        behind.split_whitespace().next()?.parse().ok()
    }
}

/// What both ends saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The client's transcript.
    pub client: Transcript,
    /// The server's transcript.
    pub server: Transcript,
}

/// A running pair of scripted ends.
#[derive(Debug)]
pub struct Running {
    client: Process,
    server: Process,
    _side_channel: tempfile::TempDir,
}

impl Running {
    /// Starts both ends in their pods.
    ///
    /// # Errors
    /// A pod is missing, or there is no python3.
    pub fn start(lab: &Lab, path: Path, client: &[&str], server: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir().context("a folder for the side channel")?;
        let channel = dir.path().join("s").display().to_string();
        let listen = peer(&[&[&channel, "listen"], server].concat());
        let address = path.address(lab)?.to_string();
        let connect = peer(&[&[&channel, "connect", &address], client].concat());
        Ok(Self {
            server: lab.spawn(path.server(), &refs(&listen))?,
            client: lab.spawn(path.client(), &refs(&connect))?,
            _side_channel: dir,
        })
    }

    /// Waits until the client has seen this.
    ///
    /// # Errors
    /// It has not at the deadline.
    pub fn wait_client(&self, event: &str) -> Result<()> {
        self.client.wait_stdout(&format!("{event}\n"), DEADLINE)
    }

    /// Waits until the server has seen this.
    ///
    /// # Errors
    /// It has not at the deadline.
    pub fn wait_server(&self, event: &str) -> Result<()> {
        self.server.wait_stdout(&format!("{event}\n"), DEADLINE)
    }

    /// Ends the server's step `hold`.
    ///
    /// # Errors
    /// It has ended.
    pub fn release_server(&mut self) -> Result<()> {
        self.server.write(b"go on\n")
    }

    /// Ends the client's step `hold`.
    ///
    /// # Errors
    /// It has ended.
    pub fn release_client(&mut self) -> Result<()> {
        self.client.write(b"go on\n")
    }

    /// Waits for the end of both scripts.
    ///
    /// # Errors
    /// A script did not end, or broke.
    pub fn finish(self) -> Result<Observed> {
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
            Transcript::of(&client.stdout),
            Transcript::of(&server.stdout),
        );
        Ok(Observed { client, server })
    }
}

/// The command line of a scripted end.
pub fn peer(arguments: &[&str]) -> Vec<String> {
    program(PEER, arguments)
}

/// The command line of a python program. The packaged interpreter is preferred to one of the
/// user's, which may be a wrapper; -S and -E keep the surroundings out.
pub(crate) fn program(text: &str, arguments: &[&str]) -> Vec<String> {
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
pub fn refs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// Client pods on node `a` and server pods on node `b`, in the mesh and outside.
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

/// The lab of this test process. Its tests share it, so that their connections share tunnels and
/// daemons as those of a cluster do. It goes when the process ends.
///
/// # Panics
/// It does not come up.
pub fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| match up(Options::default()) {
        Ok(lab) => lab,
        Err(error) => panic!("{error:#}"),
    })
}

/// A lab of [`manifests`]. Buffers of its pods' sockets grow as far as Linux lets them by default, whatever
/// this machine's do: that bounds what is in flight on a connection that nobody reads, and what many of them
/// take of the memory that all sockets of a machine share (`tcp_mem`), past which the kernel resets anybody's.
///
/// # Errors
/// It does not come up.
pub fn up(options: Options) -> Result<Lab> {
    let lab = Lab::up(manifests(), options)?;
    let set = "cd /proc/sys/net/ipv4 && echo 4096 131072 6291456 >tcp_rmem && echo 4096 16384 4194304 >tcp_wmem";
    for pod in ["mesh/client", "mesh/server", "plain/client", "plain/server"] {
        lab.exec(pod, &["sh", "-c", set])?
            .ok()
            .with_context(|| format!("buffers of {pod}"))?;
    }
    Ok(lab)
}

/// The connection on one path, to its end.
///
/// # Errors
/// A script did not end.
pub fn observe(lab: &Lab, path: Path, connection: &Connection<'_>) -> Result<Observed> {
    Running::start(lab, path, connection.client, connection.server)?.finish()
}

impl Connection<'_> {
    /// Makes this connection on every path at the same time, and fails unless each end sees on each
    /// path exactly what it must. Returns what was seen, for what a test measures beside it.
    ///
    /// # Panics
    /// An end saw something else; the message has both transcripts of each path that differs.
    pub fn is_the_same_on_every_path(&self) -> Vec<(Path, Observed)> {
        self.is_the_same_on(&Path::ALL)
    }

    /// The same on these paths only, for what would take too long on all.
    ///
    /// # Panics
    /// An end saw something else.
    pub fn is_the_same_on(&self, paths: &[Path]) -> Vec<(Path, Observed)> {
        let lab = lab();
        let runs: Vec<_> = std::thread::scope(|scope| {
            let start = |path: &Path| {
                let path = *path;
                scope.spawn(move || (path, observe(lab, path, self)))
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

    fn difference(&self, path: Path, run: &Result<Observed>) -> Option<String> {
        let observed = match run {
            Ok(observed) => observed,
            Err(error) => return Some(format!("{path:?}: {error:#}")),
        };
        let ends = [
            ("client", &observed.client, "connected", self.client_sees),
            ("server", &observed.server, "accepted", self.server_sees),
        ];
        let as_it_must = ends.iter().all(|(_, saw, first, sees)| {
            saw.events
                .iter()
                .map(String::as_str)
                .eq([*first].into_iter().chain(sees.iter().copied()))
        });
        let shown = ends.map(|(end, saw, _, sees)| {
            format!(
                "  {end} must see {sees:?}\n         saw      {:?}\n         {:?}",
                saw.events, saw.measured
            )
        });
        (!as_it_must).then(|| format!("{path:?}:\n{}", shown.join("\n")))
    }
}
