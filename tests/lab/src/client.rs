//! Sends requests to a lab's agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

use crate::protocol::{Request, Status};
use crate::registry::LabDir;

/// The agent responds at once, except to deletions and long polls. Deletions are bounded by grace
/// periods, long polls by the wait in the request.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);

/// The address of an agent. Each request has a connection of its own, so that a long poll does not
/// block others.
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

    /// Sends a request and returns the response.
    pub(crate) fn send(&self, request: &Request) -> Result<Value> {
        self.send_on(&self.connect()?, request)
    }

    /// Ties the lab to the returned connection: the agent removes the lab when it closes.
    pub(crate) fn own(&self) -> Result<UnixStream> {
        let stream = self.connect()?;
        self.send_on(&stream, &Request::Own)?;
        Ok(stream)
    }

    /// The status once its generation is above `after`, or after `wait`.
    pub(crate) fn status(&self, after: Option<u64>, wait: Duration) -> Result<Status> {
        // Well below the response timeout; a longer wait takes several requests.
        let wait = wait.min(RESPONSE_TIMEOUT / 4);
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let status = self.send(&Request::Status { after, wait_ms })?;
        serde_json::from_value(status).context("the agent's response")
    }

    fn connect(&self) -> Result<UnixStream> {
        let lab = &self.lab;
        let stream = UnixStream::connect(&self.socket)
            .map_err(|_| anyhow!("no lab {lab} is up; `lab up DIR --name {lab}` starts one"))?;
        stream.set_read_timeout(Some(RESPONSE_TIMEOUT))?;
        stream.set_write_timeout(Some(RESPONSE_TIMEOUT))?;
        Ok(stream)
    }

    fn send_on(&self, mut stream: &UnixStream, request: &Request) -> Result<Value> {
        let mut line = serde_json::to_string(request).context("request")?;
        line.push('\n');
        let no_response = || format!("lab {}: its agent does not respond", self.lab);
        stream
            .write_all(line.as_bytes())
            .with_context(no_response)?;
        let mut response = String::new();
        BufReader::new(stream)
            .read_line(&mut response)
            .with_context(no_response)?;
        let response: Result<Value, String> =
            serde_json::from_str(&response).with_context(no_response)?;
        response.map_err(|message| anyhow!(message))
    }
}
