//! The programs that the lab runs: the command that starts each, and when it is ready.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result};
use tokio::process::Command;

use super::{LabContext, ca, clock, daemon};
use crate::options::LaunchOptions;
use crate::registry::LabDir;

/// A program that the lab runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Program {
    /// The mesh daemon of a node, in the node's namespace.
    Daemon {
        /// The node.
        node: String,
        /// The node's namespace.
        netns: String,
    },
    /// The certificate authority, outside the cluster.
    Ca,
}

impl Program {
    /// The command that starts the program. Its output goes to the program's log.
    pub(super) fn command(&self, context: &LabContext, launch: &LaunchOptions) -> Result<Command> {
        let dir = &context.dir;
        let (netns, binary) = match self {
            Self::Daemon { netns, .. } => (netns, &context.daemon),
            Self::Ca => (&context.fabric, &context.ambit),
        };
        let binary = binary
            .as_ref()
            .context("this lab runs without this program")?;
        let mut command = Command::new("ip");
        // `env` sets the environment of the program only, not of the `ip` that executes it.
        command.args(["netns", "exec", netns, "env"]);
        if let Self::Daemon { .. } = self {
            command.args(assignments(&context.options.daemon_env));
        }
        command.args(assignments(&launch.env));
        command.args(assignments(&clock::environment(dir, launch.clock)?));
        command.arg(binary);
        match self {
            Self::Daemon { node, .. } => daemon::add_arguments(&mut command, context, node),
            Self::Ca => ca::add_arguments(&mut command, dir),
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

    /// Whether the program is ready now.
    pub(super) async fn is_ready(&self, context: &LabContext) -> bool {
        match self {
            Self::Daemon { netns, .. } => daemon::is_ready(netns).await,
            Self::Ca => ca::is_listening(&context.fabric).await,
        }
    }

    fn log(&self, dir: &LabDir) -> PathBuf {
        match self {
            Self::Daemon { node, .. } => dir.node_log(node),
            Self::Ca => dir.ca_log(),
        }
    }
}

fn assignments(environment: &[(String, String)]) -> impl Iterator<Item = String> {
    environment
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
}
