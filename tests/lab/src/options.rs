//! Options for bringing up a lab.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Default of [`Options::ready_timeout`]. A lab of two nodes and four pods is ready in about a
/// second; the rest is for a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// Options for bringing up a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// The lab's name, unique on the machine: up to 24 of `a-z0-9-`. Default: a generated name.
    pub name: Option<String>,
    /// Whether each node runs a daemon. Without daemons every pod starts at once, unmeshed.
    pub run_daemons: bool,
    /// Extra arguments for every daemon, after the lab's own.
    pub daemon_args: Vec<String>,
    /// Extra environment for every daemon.
    pub daemon_env: Vec<(String, String)>,
    /// Extra launch options for the daemons of single nodes, by node name.
    pub node_launch: BTreeMap<String, LaunchOptions>,
    /// Where the daemons get the identities of their pods.
    pub identity: IdentitySource,
    /// Extra launch options for the certificate authority of [`IdentitySource::Ca`].
    pub ca_launch: LaunchOptions,
    /// The folder with the `ztunnel` and `lab` binaries. Default: `$AMBIT_BIN_DIR`, else the
    /// target folder of the running executable.
    pub bin_dir: Option<PathBuf>,
    /// How long to wait until all daemons and pods are ready.
    pub ready_timeout: Duration,
    /// Whether `up` waits until all daemons and pods are ready. Otherwise it returns once the
    /// manifests are accepted.
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
            ready_timeout: READY_TIMEOUT,
            wait_until_ready: true,
        }
    }
}

impl Options {
    /// A lab without daemons, to compare with how programs behave without a mesh.
    pub fn without_daemons() -> Self {
        Self {
            run_daemons: false,
            ..Self::default()
        }
    }
}

/// Where the daemons get the identities of their pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdentitySource {
    /// The folder of a certificate authority, including its key.
    Folder,
    /// An `ambit ca` process outside the cluster that every node reaches, with a token per node.
    Ca,
    /// The SPIRE agent that listens on this socket. The lab does not start it.
    Spire(PathBuf),
    /// Configured by [`Options::daemon_args`] or [`Options::node_launch`]; the lab passes nothing.
    Custom,
}

/// Extra options for one of the lab's programs, in addition to what the lab always passes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchOptions {
    /// Extra arguments.
    pub args: Vec<String>,
    /// Extra environment.
    pub env: Vec<(String, String)>,
    /// The program's wall clock.
    pub clock: Clock,
}

impl LaunchOptions {
    /// Options with these arguments.
    pub fn args(args: &[&str]) -> Self {
        Self {
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            ..Self::default()
        }
    }

    /// The same options with this clock.
    #[must_use]
    pub fn clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }
}

/// A program's wall clock. The monotonic clock, and so timers, are not shifted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Clock {
    /// The machine's clock.
    #[default]
    System,
    /// Ahead of the machine's clock.
    Ahead(Duration),
    /// Behind the machine's clock.
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
    /// Both families, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Whether the address is of this family.
    pub fn contains(self, ip: IpAddr) -> bool {
        Self::of(ip) == self
    }
}
