//! The programs of ours that the lab keeps: how each is started, and when it is ready.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::Command;

use super::{World, authority, clock};
use crate::http;
use crate::netns;
use crate::options::{IdentitySource, LaunchOptions};
use crate::registry::LabDir;

/// How long a program may take to say whether it is ready.
pub(super) const ANSWER_DEADLINE: Duration = Duration::from_secs(1);

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    /// The mesh daemon of a node, in the node's namespace.
    Daemon {
        /// The node.
        node: String,
        /// Its namespace.
        netns: String,
    },
    /// The certificate authority, outside the cluster.
    Ca,
}

impl Program {
    fn log(&self, dir: &LabDir) -> PathBuf {
        match self {
            Self::Daemon { node, .. } => dir.node_log(node),
            Self::Ca => dir.ca_log(),
        }
    }

    /// The command that starts it, with its log as its output.
    pub(super) fn command(&self, world: &World, launch: &LaunchOptions) -> Result<Command> {
        let dir = &world.dir;
        let (netns, binary) = match self {
            Self::Daemon { netns, .. } => (netns, &world.daemon),
            Self::Ca => (&world.fabric, &world.ambit),
        };
        let binary = binary
            .as_ref()
            .context("this lab runs without this program")?;
        let mut command = Command::new("ip");
        // Only the program itself has this environment, not the `ip` that becomes it.
        command.args(["netns", "exec", netns, "env"]);
        if let Self::Daemon { .. } = self {
            command.args(assignments(&world.options.daemon_env));
        }
        command.args(assignments(&launch.env));
        command.args(assignments(&clock::environment(dir, launch.clock)?));
        command.arg(binary);
        match self {
            Self::Daemon { node, .. } => daemon(&mut command, world, node),
            Self::Ca => authority::arguments(&mut command, dir),
        }
        command.args(&launch.args);
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log(dir))?;
        command
            .stdin(Stdio::null())
            .stderr(log.try_clone()?)
            .stdout(log);
        command.kill_on_drop(true);
        Ok(command)
    }

    pub(super) async fn ready(&self, world: &World) -> bool {
        match self {
            Self::Daemon { netns, .. } => daemon_ready(netns).await,
            Self::Ca => authority::listens(&world.fabric).await,
        }
    }
}

fn assignments(environment: &[(String, String)]) -> impl Iterator<Item = String> {
    environment
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
}

fn daemon(command: &mut Command, world: &World, node: &str) {
    let dir = &world.dir;
    command
        .args(["--node-name", node])
        .arg("--source-folder")
        .arg(dir.objects())
        .arg("--netns-dir")
        .arg(dir.netns_dir());
    match &world.options.identity {
        IdentitySource::Folder => command.arg("--ca-dir").arg(dir.ca()),
        IdentitySource::Ca => authority::daemon_arguments(command, dir, node),
        IdentitySource::Spire(socket) => command.arg("--spire-socket").arg(socket),
        IdentitySource::Custom => command,
    };
    command.args(&world.options.daemon_args);
}

async fn daemon_ready(netns: &str) -> bool {
    let get = || {
        let to = SocketAddr::from(([127, 0, 0, 1], 15021));
        http::get(to, "localhost", "/healthz/ready", &[], ANSWER_DEADLINE)
    };
    matches!(netns::inside_async(netns, get).await, Ok(Ok(answer)) if answer.status == 200)
}
