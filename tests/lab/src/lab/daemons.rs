//! The daemons: their life, their logs, what they say of themselves.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Lab;
use crate::capture::Location;
use crate::http;
use crate::netns;
use crate::options::LaunchOptions;
use crate::protocol::{DaemonAction, ProgramState, Request, Status};

/// How long the daemon's admin and metrics ports may take to answer.
const HTTP_DEADLINE: Duration = Duration::from_secs(5);

impl Lab {
    /// Kills the node's daemon with SIGKILL; it stays dead until [`Self::start_daemon`].
    ///
    /// # Errors
    /// There is no such node.
    pub fn kill_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, DaemonAction::Kill)
    }

    /// Sends SIGTERM to the node's daemon and waits for its exit. How it ended is in the node's
    /// [`ProgramState::Exited`].
    ///
    /// # Errors
    /// There is no such node, or it did not exit within its drain time.
    pub fn stop_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, DaemonAction::Stop)
    }

    /// Starts the node's daemon again, if it does not run, and waits until it is ready.
    ///
    /// # Errors
    /// It is not ready at the deadline.
    pub fn start_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, DaemonAction::Start)?;
        let what = format!("the daemon of node {node} to be ready");
        let ready = |status: &Status| {
            status
                .node(node)
                .is_ok_and(|node| node.daemon == ProgramState::Ready)
        };
        self.wait_status(&what, self.ready_deadline, ready)
            .map(drop)
    }

    /// Stops the node's daemon if it runs, starts it in this way, and waits until it is ready.
    ///
    /// # Errors
    /// There is no such node, or it is not ready at the deadline.
    pub fn restart_daemon_with(&self, node: &str, launch: LaunchOptions) -> Result<()> {
        self.stop_daemon(node)?;
        let launch = Request::SetLaunchOptions {
            node: Some(node.to_owned()),
            launch,
        };
        self.client.ask(&launch)?;
        self.start_daemon(node)
    }

    fn daemon(&self, node: &str, action: DaemonAction) -> Result<()> {
        self.client
            .ask(&Request::Daemon {
                node: node.to_owned(),
                action,
            })
            .map(drop)
    }

    /// What the node's daemon has logged, over all its lives.
    ///
    /// # Errors
    /// There is no such log.
    pub fn daemon_log(&self, node: &str) -> Result<String> {
        read_log(&self.dir.node_log(node))
    }

    /// What the pod's containers wrote to stdout and stderr.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn pod_log(&self, pod: &str) -> Result<String> {
        let status = self.status()?;
        let pod = status.pod(pod)?;
        read_log(&self.dir.pod_log(&pod.namespace, &pod.name))
    }

    /// The daemon's metrics, in Prometheus' text form.
    ///
    /// # Errors
    /// It does not answer 200.
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
    /// It does not answer 200 and JSON.
    pub fn config_dump(&self, node: &str) -> Result<Value> {
        let place = Location::Node(node.to_owned());
        let text = self
            .http_get(&place, ([127, 0, 0, 1], 15000).into(), "/config_dump")?
            .ok()?;
        serde_json::from_str(&text).context("config_dump is not JSON")
    }

    /// A GET request from inside a place.
    ///
    /// # Errors
    /// No answer within 5 s.
    pub fn http_get(&self, place: &Location, to: SocketAddr, path: &str) -> Result<http::Response> {
        let netns = self.netns(place)?;
        let get = || http::get(to, &to.to_string(), path, &[], HTTP_DEADLINE);
        netns::inside(&netns, get)?.with_context(|| format!("GET http://{to}{path} in {place}"))
    }
}

pub(super) fn read_log(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("no log {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
