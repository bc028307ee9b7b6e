//! How a lab is to be brought up.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long [`crate::Lab::up`] and [`crate::Lab::wait_ready`] wait by default. A lab of two nodes
/// and four pods settles in about a second; this leaves room for a busy machine.
const READY_DEADLINE: Duration = Duration::from_secs(30);

/// How a lab is to be brought up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// The lab's name, unique on the machine: up to 24 of `a-z0-9-`. Default: one is made up.
    pub name: Option<String>,
    /// Whether each node runs a daemon. Without daemons every pod starts at once, unmeshed.
    pub run_daemons: bool,
    /// More arguments for every daemon, after the lab's own.
    pub daemon_args: Vec<String>,
    /// More environment for every daemon.
    pub daemon_env: Vec<(String, String)>,
    /// What the daemons of these nodes get beside, by node.
    pub node_launch: BTreeMap<String, LaunchOptions>,
    /// Where the daemons get the identities of their pods from.
    pub identity: IdentitySource,
    /// What the certificate authority gets beside the lab's own arguments, under [`IdentitySource::Ca`].
    pub ca_launch: LaunchOptions,
    /// The folder with the `ztunnel` and `lab` binaries. Default: `$AMBIT_BIN_DIR`, else the
    /// target folder of the running executable.
    pub bin_dir: Option<PathBuf>,
    /// How long to wait until all daemons and pods are ready.
    pub ready_deadline: Duration,
    /// Whether `up` waits until the lab has settled; else it returns once the manifests are accepted.
    pub wait_until_ready: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: None,
            run_daemons: true,
            daemon_args: Vec::new(),
            daemon_env: Vec::new(),
            node_launch: BTreeMap::new(),
            identity: IdentitySource::Folder,
            ca_launch: LaunchOptions::default(),
            bin_dir: None,
            ready_deadline: READY_DEADLINE,
            wait_until_ready: true,
        }
    }
}

impl Options {
    /// A lab without daemons: what the programs do when there is no mesh.
    pub fn without_daemons() -> Self {
        Self {
            run_daemons: false,
            ..Self::default()
        }
    }
}

/// Where the daemons get the identities of their pods from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdentitySource {
    /// The folder of a certificate authority, key and all.
    Folder,
    /// An `ambit ca` process outside the cluster that every node reaches, with a token for each node.
    Ca,
    /// The agent of SPIRE that listens at this socket, which is the test's own.
    Spire(PathBuf),
    /// What [`Options::daemon_args`] or [`Options::node_launch`] say; the lab says nothing of it.
    Custom,
}

/// How one of the lab's programs is started, beside what it always gets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchOptions {
    /// More arguments.
    pub args: Vec<String>,
    /// More environment.
    pub env: Vec<(String, String)>,
    /// What it takes for the time of day.
    pub clock: Clock,
}

impl LaunchOptions {
    /// With these arguments.
    pub fn args(args: &[&str]) -> Self {
        Self {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Self::default()
        }
    }

    /// With this clock.
    #[must_use]
    pub fn clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }
}

/// A program's wall clock. Its timers are right whatever it says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Clock {
    /// The machine's.
    #[default]
    System,
    /// So much later than it is.
    Ahead(Duration),
    /// So much earlier than it is.
    Behind(Duration),
}

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl IpFamily {
    /// Both, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Whether the address is of this family.
    pub fn has(self, ip: IpAddr) -> bool {
        Self::of(ip) == self
    }
}
