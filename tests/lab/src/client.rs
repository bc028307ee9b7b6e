//! Talking to a lab's agent, and starting one.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use crate::options::Options;
use crate::protocol::{Request, Status};
use crate::registry::{self, LabDir};
use crate::tools;

/// The agent answers everything but deletions and long polls at once; those are bounded by grace
/// periods and by the deadline in the request.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// Where an agent listens. Each request has a connection of its own, so that one that waits does
/// not hold up another.
#[derive(Debug)]
pub(crate) struct Client {
    lab: String,
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(dir: &LabDir) -> Self {
        Self {
            lab: dir.name().to_owned(),
            socket: dir.socket(),
        }
    }

    fn connect(&self) -> Result<UnixStream> {
        let lab = &self.lab;
        let stream = UnixStream::connect(&self.socket)
            .map_err(|_| anyhow!("no lab {lab} is up; `lab up DIR --name {lab}` starts one"))?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        stream.set_write_timeout(Some(ANSWER_DEADLINE))?;
        Ok(stream)
    }

    pub(crate) fn ask(&self, request: &Request) -> Result<Value> {
        self.ask_on(&self.connect()?, request)
    }

    /// Ties the lab's life to the connection that is returned.
    pub(crate) fn own(&self) -> Result<UnixStream> {
        let stream = self.connect()?;
        self.ask_on(&stream, &Request::Own)?;
        Ok(stream)
    }

    fn ask_on(&self, mut stream: &UnixStream, request: &Request) -> Result<Value> {
        let mut line = serde_json::to_string(request).context("request")?;
        line.push('\n');
        let gone = || format!("lab {}: its agent does not answer", self.lab);
        stream.write_all(line.as_bytes()).with_context(gone)?;
        let mut answer = String::new();
        BufReader::new(stream)
            .read_line(&mut answer)
            .with_context(gone)?;
        let answer: Result<Value, String> = serde_json::from_str(&answer).with_context(gone)?;
        answer.map_err(|message| anyhow!(message))
    }

    /// The status once its generation is above `after`, or after `wait`.
    pub(crate) fn status(&self, after: Option<u64>, wait: Duration) -> Result<Status> {
        // Well below the answer's deadline; who waits longer asks again.
        let wait = wait.min(ANSWER_DEADLINE / 4);
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let answer = self.ask(&Request::Status { after, wait_ms })?;
        serde_json::from_value(answer).context("the agent's answer")
    }
}

/// Sweeps, claims the name and starts an agent for it; returns when the agent listens.
pub(crate) fn launch(name: &str, options: &Options) -> Result<(LabDir, Child)> {
    tools::check()?;
    let binary = tools::binary("lab", options.bin_dir.as_deref())?;
    let (dir, lock) = registry::claim(name)?;
    let log = std::fs::File::create(dir.agent_log()).context("agent log")?;
    let mut agent = Command::new(binary)
        .args(["agent", "--name", name, "--options"])
        .arg(serde_json::to_string(options).context("options")?)
        // The agent's stdin is the locked file: the lock lives exactly as long as the agent.
        .stdin(lock)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the lab's agent")?;
    // One line says that it listens; end of file that it has died.
    let mut said = String::new();
    if let Some(stdout) = agent.stdout.take() {
        BufReader::new(stdout.take(64))
            .read_line(&mut said)
            .context("the lab's agent")?;
    }
    if said.trim() == "listening" {
        return Ok((dir, agent));
    }
    let _ = agent.wait();
    let log = std::fs::read_to_string(dir.agent_log()).unwrap_or_default();
    registry::take_down(&dir)?;
    bail!("the lab's agent did not start: {}", log.trim_end())
}
