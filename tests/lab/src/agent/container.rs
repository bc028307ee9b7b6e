//! A container: one program in the pod's network namespace.

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

use super::kubelet::{Pod, Wish};
use super::probe;
use crate::model::pod::{Phase, PodEntry};
use crate::process::exit_code;

/// A program that ends is started again after this, then after twice as long, and so on.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);

/// How the containers of a pod are.
#[derive(Debug, Default)]
pub(super) struct Containers {
    states: Vec<State>,
    restart: Restart,
}

#[derive(Debug, Default, Clone)]
struct State {
    running: bool,
    ready: bool,
    restarts: u32,
    /// How it ended last.
    exit: Option<i32>,
    message: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Restart {
    #[default]
    Always,
    OnFailure,
    Never,
}

/// The pod's state as the sum of its containers'.
pub(super) struct Sum {
    pub(super) phase: Phase,
    pub(super) ready: bool,
    pub(super) restarts: u32,
    pub(super) message: String,
}

impl Containers {
    pub(super) fn new(spec: &PodSpec) -> Self {
        let restart = match spec.restart_policy.as_deref() {
            Some("Never") => Restart::Never,
            Some("OnFailure") => Restart::OnFailure,
            _ => Restart::Always,
        };
        Self {
            states: vec![State::default(); spec.containers.len()],
            restart,
        }
    }

    pub(super) fn sum(&self) -> Sum {
        let all = |of: &dyn Fn(&State) -> bool| self.states.iter().all(of);
        let over =
            |state: &State| !state.running && state.exit.is_some_and(|code| !self.again(code));
        let phase = if all(&|state| over(state) && state.exit == Some(0)) {
            Phase::Succeeded
        } else if all(&over) {
            Phase::Failed
        } else if all(&|state| state.running || state.exit.is_some()) {
            Phase::Running
        } else {
            Phase::Pending
        };
        Sum {
            phase,
            ready: all(&|state| state.running && state.ready),
            restarts: self.states.iter().map(|state| state.restarts).sum(),
            message: self
                .states
                .iter()
                .map(|state| state.message.clone())
                .find(|m| !m.is_empty())
                .unwrap_or_default(),
        }
    }

    fn again(&self, code: i32) -> bool {
        match self.restart {
            Restart::Always => true,
            Restart::OnFailure => code != 0,
            Restart::Never => false,
        }
    }
}

/// Runs a container, again and again as the restart policy says, until the pod is to go.
pub(super) async fn supervise(
    pod: Rc<Pod>,
    index: usize,
    container: Container,
    mut wishes: watch::Receiver<Wish>,
) {
    let set = |change: &dyn Fn(&mut State)| {
        change(&mut pod.containers.borrow_mut().states[index]);
        pod.changed.notify_one();
    };
    let mut backoff = FIRST_BACKOFF;
    loop {
        let code = match spawn(&pod, &container) {
            Ok(mut child) => {
                let at_once =
                    container.readiness_probe.is_none() && container.startup_probe.is_none();
                set(&|state| {
                    (state.running, state.ready) = (true, at_once);
                    state.message.clear();
                });
                let ready = |ready, why: String| {
                    set(&|state| {
                        state.ready = ready;
                        state.message.clone_from(&why);
                    });
                };
                tokio::select! {
                    status = child.wait() => code(status),
                    why = probe::watch(&pod, &container, &ready) => {
                        set(&|state| state.message.clone_from(&why));
                        end(&mut child, Duration::ZERO, pending()).await
                    }
                    grace = deleted(&mut wishes) => {
                        end(&mut child, grace, hurried(&mut wishes)).await;
                        set(&|state| (state.running, state.ready) = (false, false));
                        return;
                    }
                }
            }
            Err(error) => {
                set(&|state| state.message = format!("container {}: {error:#}", container.name));
                127
            }
        };
        let again = pod.containers.borrow().again(code);
        set(&|state| {
            (state.running, state.ready, state.exit) = (false, false, Some(code));
            state.restarts += u32::from(again);
            if again && state.message.is_empty() {
                state.message = format!("container {}: ended with code {code}", container.name);
            }
        });
        let pause = tokio::time::timeout(backoff, deleted(&mut wishes));
        if !again || pause.await.is_ok() {
            return;
        }
        backoff = (backoff * 2).min(LONGEST_BACKOFF);
    }
}

/// Runs an init container to its end.
pub(super) async fn init(
    pod: &Pod,
    container: &Container,
    mut wishes: watch::Receiver<Wish>,
) -> Result<()> {
    let mut child = spawn(pod, container)?;
    let code = tokio::select! {
        status = child.wait() => code(status),
        grace = deleted(&mut wishes) => end(&mut child, grace, hurried(&mut wishes)).await,
    };
    if code != 0 {
        bail!("init container {}: ended with code {code}", container.name);
    }
    Ok(())
}

/// The grace period, once the pod is to go.
async fn deleted(wishes: &mut watch::Receiver<Wish>) -> Duration {
    match wishes.wait_for(|wish| wish.delete.is_some()).await {
        Ok(wish) => Duration::from_secs(wish.delete.unwrap_or_default()),
        // The agent is going, and ends all processes itself.
        Err(_) => pending().await,
    }
}

/// Ends when the pod is deleted once more, with no grace at all.
async fn hurried(wishes: &mut watch::Receiver<Wish>) {
    if wishes
        .wait_for(|wish| wish.delete == Some(0))
        .await
        .is_err()
    {
        pending::<()>().await;
    }
}

fn spawn(pod: &Pod, container: &Container) -> Result<Child> {
    let env = pod.environment(container);
    let log = pod.world.dir.pod_log(&pod.key.0, &pod.key.1);
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
    // A group of its own, so that what it leaves behind can be ended with it.
    command.current_dir(dir).process_group(0).kill_on_drop(true);
    command.spawn().context("ip netns exec")
}

/// SIGTERM to the program, SIGKILL to it and to what it started when the grace period is over, or
/// `hurry` is.
async fn end(child: &mut Child, grace: Duration, hurry: impl Future<Output = ()>) -> i32 {
    let Some(pid) = child
        .id()
        .and_then(|pid| pid.try_into().ok())
        .map(Pid::from_raw)
    else {
        return code(child.wait().await);
    };
    let _ = kill(pid, Signal::SIGTERM);
    let status = tokio::select! {
        status = child.wait() => Some(status),
        () = tokio::time::sleep(grace) => None,
        () = hurry => None,
    };
    let _ = killpg(pid, Signal::SIGKILL);
    match status {
        Some(status) => code(status),
        None => code(child.wait().await),
    }
}

fn code(status: std::io::Result<ExitStatus>) -> i32 {
    // A program that cannot be waited for has ended in some way that nobody will know.
    exit_code(status.unwrap_or_else(|_| ExitStatus::from_raw(1 << 8)))
}
