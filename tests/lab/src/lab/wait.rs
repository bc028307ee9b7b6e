//! Waiting: for events of the lab, and for what has no event.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Lab;
use crate::http;
use crate::poll;
use crate::protocol::{ProgramState, Status};
use crate::settled;

/// How often [`Lab::wait_until`] looks again at a condition that has no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

impl Lab {
    /// Waits until every daemon and every pod is ready, and every daemon knows of it: of each ready
    /// pod, its mode, and each service's endpoints.
    ///
    /// # Errors
    /// The deadline of [`Options::ready_deadline`] has passed, or a daemon is not running; says
    /// what is missing.
    pub fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + self.ready_deadline;
        let settled = |status: &Status| status.not_ready().is_empty() || dead(status).is_some();
        let status = self.wait_status("the lab to be ready", self.ready_deadline, settled)?;
        if let Some((node, how)) = dead(&status) {
            let log = self.daemon_log(node).unwrap_or_default();
            bail!(
                "node {node}: daemon {how}; it said last: {}",
                log.lines().last().unwrap_or("nothing")
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

    /// Waits until the daemon of a node has taken in the state of the lab as it is now: after a
    /// label or an apply, say, whose effect on traffic is to be tested.
    ///
    /// # Errors
    /// It has not at the deadline; says what it lacks.
    pub fn wait_daemon_synced(&self, node: &str, within: Duration) -> Result<()> {
        let mut lacking = None;
        let caught_up = poll::until(within, LOOK_AGAIN, || {
            lacking = match (self.config_dump(node), self.status()) {
                (Ok(dump), Ok(status)) => settled::lacking(&dump, &status),
                (Err(error), _) | (_, Err(error)) => Some(format!("{error:#}")),
            };
            lacking.is_none().then_some(())
        });
        let lacking = lacking.unwrap_or_default();
        caught_up.with_context(|| format!("the daemon of node {node} is not up to date: {lacking}"))
    }

    /// Waits until every daemon that runs has read all that was applied before this call, whatever
    /// kind it is: one more object is applied and taken away again, and daemons read changes in
    /// their order.
    ///
    /// # Errors
    /// A daemon does not show that object at the deadline.
    pub fn wait_applied(&self, within: Duration) -> Result<()> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let fence = format!("fence-{}-{number}", std::process::id());
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {fence}, namespace: default}}\n\
             spec: {{ports: [{{port: 80}}]}}\n"
        );
        self.apply(service).context("the fence")?;
        let nodes = self.status()?.nodes.into_iter();
        for node in nodes.filter(|node| node.daemon == ProgramState::Ready) {
            let what = format!("the daemon of node {} to know service {fence}", node.name);
            self.wait_until(&what, within, || {
                let dump = self.config_dump(&node.name).ok()?;
                dump.to_string().contains(&fence).then_some(())
            })?;
        }
        self.delete("Service", &format!("default/{fence}"))
    }

    /// Waits for a condition of the lab's status, without polling: the agent says when it changes.
    ///
    /// # Errors
    /// It does not hold at the deadline; the error says `what`, and what is unsettled.
    pub fn wait_status(
        &self,
        what: &str,
        within: Duration,
        condition: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let deadline = Instant::now() + within;
        let mut status = self.status()?;
        while !condition(&status) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "waited {within:?} for {what}; {}",
                    status.not_ready().join("; ")
                );
            }
            status = self.client.status(Some(status.generation), left)?;
        }
        Ok(status)
    }

    /// Waits for a condition of the outside world that has no event: it is looked at again every
    /// 20 ms. Returns what the condition returned.
    ///
    /// # Errors
    /// It returned `None` until the deadline; says `what`.
    pub fn wait_until<T>(
        &self,
        what: &str,
        within: Duration,
        condition: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        poll::wait_until(what, within, condition)
    }

    /// Waits until the node's daemon reports this state (`enrolled`) of the pod, or with `None`
    /// until it reports nothing of it.
    ///
    /// # Errors
    /// It does not at the deadline.
    pub fn wait_workload_state(
        &self,
        pod: &str,
        state: Option<&str>,
        within: Duration,
    ) -> Result<()> {
        let status = self.status()?;
        let pod = status.pod(pod)?;
        let what = format!(
            "{}/{} to be {state:?} in its node's daemon",
            pod.namespace, pod.name
        );
        self.wait_until(&what, within, || {
            let dump = self.config_dump(&pod.node).ok()?;
            (http::workload_state(&dump, &pod.uid) == state).then_some(())
        })
    }
}

/// A node whose daemon does not run, and how that ended.
fn dead(status: &Status) -> Option<(&str, &str)> {
    status.nodes.iter().find_map(|node| match &node.daemon {
        ProgramState::Exited(how) => Some((node.name.as_str(), how.as_str())),
        _ => None,
    })
}
