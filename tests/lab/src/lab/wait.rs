//! Waits for the status of a lab, for its daemons, and for conditions without an event.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Lab;
use crate::daemon_sync;
use crate::http;
use crate::poll;
use crate::protocol::{ProgramState, Status};

impl Lab {
    /// Waits until every daemon and every pod is ready, and every daemon has read this state: each
    /// ready pod, whether it is meshed, and each service's endpoints.
    ///
    /// # Errors
    /// [`Options::ready_timeout`] has passed, or a daemon has exited; the error names what is not
    /// ready.
    ///
    /// [`Options::ready_timeout`]: crate::Options::ready_timeout
    pub fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + self.ready_timeout;
        let is_settled =
            |status: &Status| status.not_ready().is_empty() || exited_daemon(status).is_some();
        let status = self.wait_status("the lab to be ready", self.ready_timeout, is_settled)?;
        if let Some((node, how)) = exited_daemon(&status) {
            let log = self.daemon_log(node).unwrap_or_default();
            bail!(
                "node {node}: daemon {how}; last log line: {}",
                log.lines().last().unwrap_or("none")
            );
        }
        for node in status
            .nodes
            .iter()
            .filter(|node| node.daemon == ProgramState::Ready)
        {
            self.wait_daemon_synced(
                &node.name,
                deadline.saturating_duration_since(Instant::now()),
            )?;
        }
        Ok(())
    }

    /// Waits until the daemon of a node has read the current state of the lab. Use it after a label
    /// or an apply whose effect on traffic is tested.
    ///
    /// # Errors
    /// The daemon has not read it at the timeout; the error names the first difference.
    pub fn wait_daemon_synced(&self, node: &str, timeout: Duration) -> Result<()> {
        let mut difference = None;
        let synced = poll::until(timeout, poll::INTERVAL, || {
            difference = match (self.config_dump(node), self.status()) {
                (Ok(dump), Ok(status)) => daemon_sync::first_difference(&dump, &status),
                (Err(error), _) | (_, Err(error)) => Some(format!("{error:#}")),
            };
            difference.is_none().then_some(())
        });
        let difference = difference.unwrap_or_default();
        synced.with_context(|| format!("the daemon of node {node} is not up to date: {difference}"))
    }

    /// Waits until every running daemon has read everything that was applied before this call, of
    /// any kind. It applies a marker service, waits until every daemon reports it, and deletes it:
    /// daemons read changes in order.
    ///
    /// # Errors
    /// A daemon does not report the marker at the timeout.
    pub fn wait_applied(&self, timeout: Duration) -> Result<()> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let marker = format!("marker-{}-{number}", std::process::id());
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {marker}, namespace: default}}\n\
             spec: {{ports: [{{port: 80}}]}}\n"
        );
        self.apply(service).context("the marker service")?;
        let nodes = self.status()?.nodes.into_iter();
        for node in nodes.filter(|node| node.daemon == ProgramState::Ready) {
            let what = format!(
                "the daemon of node {} to report service {marker}",
                node.name
            );
            self.wait_until(&what, timeout, || {
                let dump = self.config_dump(&node.name).ok()?;
                dump.to_string().contains(&marker).then_some(())
            })?;
        }
        self.delete("Service", &format!("default/{marker}"))
    }

    /// Waits for a condition of the lab's status. The agent reports each change, so this does not
    /// poll.
    ///
    /// # Errors
    /// The condition is false at the timeout; the error names `what` and what is not ready.
    pub fn wait_status(
        &self,
        what: &str,
        timeout: Duration,
        condition: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let deadline = Instant::now() + timeout;
        let mut status = self.status()?;
        while !condition(&status) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "waited {timeout:?} for {what}; {}",
                    status.not_ready().join("; ")
                );
            }
            status = self.client.status(Some(status.generation), left)?;
        }
        Ok(status)
    }

    /// Polls a condition that raises no event, every 10 ms. Returns what the condition returned.
    ///
    /// # Errors
    /// The condition returned `None` until the timeout; the error names `what`.
    pub fn wait_until<T>(
        &self,
        what: &str,
        timeout: Duration,
        condition: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        poll::wait_until(what, timeout, condition)
    }

    /// Waits until the node's daemon reports this state (such as `enrolled`) of the pod, or with
    /// `None` until it does not report the pod.
    ///
    /// # Errors
    /// The daemon reports another state at the timeout.
    pub fn wait_workload_state(
        &self,
        pod: &str,
        state: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        let status = self.status()?;
        let pod = status.pod(pod)?;
        let what = format!(
            "{}/{} to be {state:?} in its node's daemon",
            pod.namespace, pod.name
        );
        self.wait_until(&what, timeout, || {
            let dump = self.config_dump(&pod.node).ok()?;
            (http::workload_state(&dump, &pod.uid) == state).then_some(())
        })
    }
}

/// A node whose daemon has exited, and how.
fn exited_daemon(status: &Status) -> Option<(&str, &str)> {
    status.nodes.iter().find_map(|node| match &node.daemon {
        ProgramState::Exited(how) => Some((node.name.as_str(), how.as_str())),
        _ => None,
    })
}
