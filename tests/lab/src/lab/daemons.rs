//! Controls the daemons and reads their logs, metrics and configuration dumps.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Lab;
use crate::http;
use crate::location::Location;
use crate::netns;
use crate::options::LaunchOptions;
use crate::protocol::{ProgramAction, ProgramState, Request, Status};

/// Timeout of a request to a daemon's admin and metrics ports.
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);

impl Lab {
    /// Kills the node's daemon with SIGKILL. It stays stopped until [`Self::start_daemon`].
    ///
    /// # Errors
    /// There is no such node.
    pub fn kill_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, ProgramAction::Kill)
    }

    /// Sends SIGTERM to the node's daemon and waits for its exit. The exit status is in the node's
    /// [`ProgramState::Exited`].
    ///
    /// # Errors
    /// There is no such node, or the daemon does not exit within its drain timeout.
    pub fn stop_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, ProgramAction::Stop)
    }

    /// Starts the node's daemon if it does not run, and waits until it is ready.
    ///
    /// # Errors
    /// There is no such node, or the daemon is not ready at the timeout.
    pub fn start_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, ProgramAction::Start)?;
        let what = format!("the daemon of node {node} to be ready");
        let is_ready = |status: &Status| {
            status
                .node(node)
                .is_ok_and(|node| node.daemon == ProgramState::Ready)
        };
        self.wait_status(&what, self.ready_timeout, is_ready)
            .map(drop)
    }

    /// Stops the node's daemon if it runs, starts it with these options, and waits until it is ready.
    ///
    /// # Errors
    /// There is no such node, or the daemon is not ready at the timeout.
    pub fn restart_daemon_with(&self, node: &str, launch: LaunchOptions) -> Result<()> {
        self.stop_daemon(node)?;
        let launch = Request::SetLaunchOptions {
            node: Some(node.to_owned()),
            launch,
        };
        self.client.send(&launch)?;
        self.start_daemon(node)
    }

    fn daemon(&self, node: &str, action: ProgramAction) -> Result<()> {
        self.client
            .send(&Request::Daemon {
                node: node.to_owned(),
                action,
            })
            .map(drop)
    }

    /// The log of the node's daemon, of all its runs.
    ///
    /// # Errors
    /// There is no such log.
    pub fn daemon_log(&self, node: &str) -> Result<String> {
        read_log(&self.dir.node_log(node))
    }

    /// The stdout and stderr of the pod's containers.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn pod_log(&self, pod: &str) -> Result<String> {
        let status = self.status()?;
        let pod = status.pod(pod)?;
        read_log(&self.dir.pod_log(&pod.namespace, &pod.name))
    }

    /// The daemon's metrics, in the Prometheus text format.
    ///
    /// # Errors
    /// The daemon does not return 200.
    pub fn metrics(&self, node: &str) -> Result<String> {
        self.http_get(
            &Location::Node(node.to_owned()),
            ([127, 0, 0, 1], 15020).into(),
            "/metrics",
        )?
        .ok()
    }

    /// The daemon's configuration dump.
    ///
    /// # Errors
    /// The daemon does not return 200 and JSON.
    pub fn config_dump(&self, node: &str) -> Result<Value> {
        let location = Location::Node(node.to_owned());
        let text = self
            .http_get(&location, ([127, 0, 0, 1], 15000).into(), "/config_dump")?
            .ok()?;
        serde_json::from_str(&text).context("config_dump is not JSON")
    }

    /// Sends a GET request from a location.
    ///
    /// # Errors
    /// No response within 5 s.
    pub fn http_get(
        &self,
        location: &Location,
        to: SocketAddr,
        path: &str,
    ) -> Result<http::Response> {
        let netns = self.netns(location)?;
        netns::run_in(&netns, || http::get(to, path, &[], HTTP_TIMEOUT))?
            .with_context(|| format!("GET http://{to}{path} in {location}"))
    }
}

pub(super) fn read_log(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("no log {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
