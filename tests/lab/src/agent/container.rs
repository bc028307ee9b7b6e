//! Runs a container: one program in the pod's network namespace, restarted by policy.

use std::fs::OpenOptions;
use std::future::pending;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Container, PodSpec};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use super::kubelet::{DesiredState, Pod};
use super::probe;
use crate::model::pod::{Phase, PodEntry};
use crate::process::exit_code;

/// Delay of the first restart. It doubles with every restart.
const INITIAL_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);

/// The states of a pod's containers.
#[derive(Debug, Default)]
pub(super) struct Containers {
    states: Vec<ContainerState>,
    restart_policy: RestartPolicy,
}

#[derive(Debug, Default, Clone)]
struct ContainerState {
    is_running: bool,
    is_ready: bool,
    restarts: u32,
    /// The exit code of the last run.
    exit_code: Option<i32>,
    message: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum RestartPolicy {
    #[default]
    Always,
    OnFailure,
    Never,
}

/// The state of a pod, from the states of its containers.
pub(super) struct Summary {
    pub(super) phase: Phase,
    pub(super) ready: bool,
    pub(super) restarts: u32,
    pub(super) message: String,
}

impl Containers {
    pub(super) fn new(spec: &PodSpec) -> Self {
        let restart_policy = match spec.restart_policy.as_deref() {
            Some("Never") => RestartPolicy::Never,
            Some("OnFailure") => RestartPolicy::OnFailure,
            _ => RestartPolicy::Always,
        };
        Self {
            states: vec![ContainerState::default(); spec.containers.len()],
            restart_policy,
        }
    }

    pub(super) fn summary(&self) -> Summary {
        let all = |predicate: &dyn Fn(&ContainerState) -> bool| self.states.iter().all(predicate);
        let is_terminated = |state: &ContainerState| {
            !state.is_running
                && state
                    .exit_code
                    .is_some_and(|code| !self.restarts_after(code))
        };
        let phase = if all(&|state| is_terminated(state) && state.exit_code == Some(0)) {
            Phase::Succeeded
        } else if all(&is_terminated) {
            Phase::Failed
        } else if all(&|state| state.is_running || state.exit_code.is_some()) {
            Phase::Running
        } else {
            Phase::Pending
        };
        Summary {
            phase,
            ready: all(&|state| state.is_running && state.is_ready),
            restarts: self.states.iter().map(|state| state.restarts).sum(),
            message: self
                .states
                .iter()
                .map(|state| state.message.clone())
                .find(|message| !message.is_empty())
                .unwrap_or_default(),
        }
    }

    fn restarts_after(&self, exit_code: i32) -> bool {
        match self.restart_policy {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => exit_code != 0,
            RestartPolicy::Never => false,
        }
    }
}

/// Runs a container until the pod is deleted, with restarts by the restart policy.
pub(super) async fn supervise(
    pod: Rc<Pod>,
    index: usize,
    container: Container,
    mut desired: watch::Receiver<DesiredState>,
) {
    let update = |change: &dyn Fn(&mut ContainerState)| {
        change(&mut pod.containers.borrow_mut().states[index]);
        pod.changed.notify_one();
    };
    let mut backoff = INITIAL_BACKOFF;
    loop {
        let code = match spawn(&pod, &container) {
            Ok(mut child) => {
                let ready_at_start =
                    container.readiness_probe.is_none() && container.startup_probe.is_none();
                update(&|state| {
                    (state.is_running, state.is_ready) = (true, ready_at_start);
                    state.message.clear();
                });
                let set_ready = |ready, reason: String| {
                    update(&|state| {
                        state.is_ready = ready;
                        state.message.clone_from(&reason);
                    });
                };
                tokio::select! {
                    status = child.wait() => code_of(status),
                    reason = probe::run(&pod, &container, &set_ready) => {
                        update(&|state| state.message.clone_from(&reason));
                        terminate(&mut child, Duration::ZERO, pending()).await
                    }
                    grace = deletion(&mut desired) => {
                        terminate(&mut child, grace, immediate_deletion(&mut desired)).await;
                        update(&|state| (state.is_running, state.is_ready) = (false, false));
                        return;
                    }
                }
            }
            Err(error) => {
                let message = format!("container {}: {error:#}", container.name);
                update(&|state| state.message.clone_from(&message));
                127
            }
        };
        let restarts = pod.containers.borrow().restarts_after(code);
        update(&|state| {
            (state.is_running, state.is_ready, state.exit_code) = (false, false, Some(code));
            state.restarts += u32::from(restarts);
            if restarts && state.message.is_empty() {
                state.message = format!("container {}: ended with code {code}", container.name);
            }
        });
        let delay = tokio::time::timeout(backoff, deletion(&mut desired));
        if !restarts || delay.await.is_ok() {
            return;
        }
        backoff = (backoff * 2).min(MAX_BACKOFF);
    }
}

/// Runs an init container until it exits.
pub(super) async fn run_init(
    pod: &Pod,
    container: &Container,
    mut desired: watch::Receiver<DesiredState>,
) -> Result<()> {
    let mut child = spawn(pod, container)?;
    let code = tokio::select! {
        status = child.wait() => code_of(status),
        grace = deletion(&mut desired) => {
            terminate(&mut child, grace, immediate_deletion(&mut desired)).await
        }
    };
    if code != 0 {
        bail!("init container {}: ended with code {code}", container.name);
    }
    Ok(())
}

/// Waits until the pod is deleted. Returns the grace period.
async fn deletion(desired: &mut watch::Receiver<DesiredState>) -> Duration {
    match desired
        .wait_for(|state| state.deletion_grace.is_some())
        .await
    {
        Ok(state) => Duration::from_secs(state.deletion_grace.unwrap_or_default()),
        // The agent is exiting, and kills all processes itself.
        Err(_) => pending().await,
    }
}

/// Waits until the pod is deleted with a grace period of zero.
async fn immediate_deletion(desired: &mut watch::Receiver<DesiredState>) {
    if desired
        .wait_for(|state| state.deletion_grace == Some(0))
        .await
        .is_err()
    {
        pending::<()>().await;
    }
}

fn spawn(pod: &Pod, container: &Container) -> Result<Child> {
    let env = pod.environment(container);
    let log = pod.context.dir.pod_log(&pod.key.0, &pod.key.1);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log)
        .context("log")?;
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", &pod.entry.netns])
        .args(PodEntry::command(container, &env));
    command
        .envs(env)
        .stdin(Stdio::null())
        .stderr(log.try_clone()?)
        .stdout(log);
    let dir = container
        .working_dir
        .as_ref()
        .map_or_else(|| pod.dir(), Into::into);
    // A process group of its own, so that its children can be killed with it.
    command.current_dir(dir).process_group(0).kill_on_drop(true);
    command.spawn().context("ip netns exec")
}

/// Sends SIGTERM to the program. When the grace period is over or `cut_short` completes, sends
/// SIGKILL to the program and its children.
async fn terminate(child: &mut Child, grace: Duration, cut_short: impl Future<Output = ()>) -> i32 {
    let Some(pid) = child
        .id()
        .and_then(|pid| pid.try_into().ok())
        .map(Pid::from_raw)
    else {
        return code_of(child.wait().await);
    };
    let _ = kill(pid, Signal::SIGTERM);
    let status = tokio::select! {
        status = child.wait() => Some(status),
        () = tokio::time::sleep(grace) => None,
        () = cut_short => None,
    };
    let _ = killpg(pid, Signal::SIGKILL);
    match status {
        Some(status) => code_of(status),
        None => code_of(child.wait().await),
    }
}

fn code_of(status: std::io::Result<ExitStatus>) -> i32 {
    // The exit code of a program that cannot be waited for is unknown; it counts as 1.
    exit_code(status.unwrap_or_else(|_| ExitStatus::from_raw(1 << 8)))
}
