//! Starts a lab's agent and takes a lab down.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::client::Client;
use crate::options::Options;
use crate::poll;
use crate::protocol::Request;
use crate::registry::{self, LabDir};
use crate::tools;

/// How long an agent may take to exit after its lab is removed, before it is killed.
const AGENT_EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// A killed process exits within milliseconds, unless it is blocked in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// Removes orphaned labs, claims the name and starts an agent. Returns when the agent listens.
pub(crate) fn launch(name: &str, options: &Options) -> Result<(LabDir, Child)> {
    tools::check()?;
    let binary = tools::binary("lab", options.bin_dir.as_deref())?;
    let (dir, lock) = registry::claim(name)?;
    let log = File::create(dir.agent_log()).context("agent log")?;
    let mut agent = Command::new(binary)
        .args(["agent", "--name", name, "--options"])
        .arg(serde_json::to_string(options).context("options")?)
        // The agent's stdin is the locked file, so the lock is held exactly until the agent exits.
        .stdin(lock)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the lab's agent")?;
    // The agent prints one line when it listens; end of file means that it has exited.
    let mut line = String::new();
    if let Some(stdout) = agent.stdout.take() {
        BufReader::new(stdout.take(64))
            .read_line(&mut line)
            .context("the lab's agent")?;
    }
    if line.trim() == "listening" {
        return Ok((dir, agent));
    }
    let _ = agent.wait();
    let log = fs::read_to_string(dir.agent_log()).unwrap_or_default();
    take_down(&dir)?;
    bail!("the lab's agent did not start: {}", log.trim_end())
}

/// Requests the agent to remove the lab and exit, then removes what is left.
pub(crate) fn take_down(dir: &LabDir) -> Result<()> {
    // Without a response from the agent, the lines below remove the lab.
    let _ = Client::new(dir).send(&Request::Down);
    let _base = registry::lock_base()?;
    let exited = || (!dir.root().exists() || dir.is_orphaned()).then_some(());
    if poll::until(AGENT_EXIT_TIMEOUT, poll::FAST_INTERVAL, exited).is_none() {
        registry::kill_agent(dir);
        poll::until(KILL_TIMEOUT, poll::FAST_INTERVAL, exited)
            .with_context(|| format!("lab {}: its agent does not exit", dir.name()))?;
    }
    registry::remove_all(dir)?;
    registry::remove_shared_folders()
}
