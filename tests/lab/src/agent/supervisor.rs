//! Starts, watches and stops the programs that the lab runs.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::sync::mpsc;

use super::LabContext;
use super::daemon::RESPONSE_TIMEOUT;
use super::events::{Event, ReplySender, send_reply};
use super::program::Program;
use crate::options::LaunchOptions;
use crate::protocol::{ProgramAction, ProgramState};

/// Interval of readiness checks until a program is ready.
const STARTING_CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// Interval of readiness checks of a ready program.
const READY_CHECK_INTERVAL: Duration = RESPONSE_TIMEOUT;

/// A program that runs longer than this after SIGTERM is killed. A daemon's own drain timeout is
/// 5 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(15);

/// The agent loop's handle of a program.
pub(super) struct ProgramHandle {
    context: Rc<LabContext>,
    program: Program,
    pub(super) launch: LaunchOptions,
    pub(super) state: ProgramState,
    pub(super) pid: Option<u32>,
    actions: Option<mpsc::Sender<ProgramAction>>,
    /// Replies that are sent when the program exits.
    exit_replies: Vec<ReplySender>,
}

impl ProgramHandle {
    pub(super) fn new(context: Rc<LabContext>, program: Program, launch: LaunchOptions) -> Self {
        Self {
            context,
            program,
            launch,
            state: ProgramState::Disabled,
            pid: None,
            actions: None,
            exit_replies: Vec::new(),
        }
    }

    /// Returns the task that runs the program; `None` if it already runs.
    pub(super) fn start(&mut self) -> Option<impl Future<Output = ()> + use<>> {
        if self.is_running() {
            return None;
        }
        self.state = ProgramState::Starting;
        let (sender, actions) = mpsc::channel(8);
        self.actions = Some(sender);
        let run = ProgramRun {
            context: Rc::clone(&self.context),
            program: self.program.clone(),
            launch: self.launch.clone(),
        };
        Some(run.supervise(actions))
    }

    /// Stops or kills the program. The reply is sent when it has exited.
    pub(super) fn stop(&mut self, action: ProgramAction, reply: ReplySender) {
        match self
            .actions
            .as_ref()
            .filter(|_| self.is_running())
            .map(|actions| actions.try_send(action))
        {
            Some(Ok(())) => self.exit_replies.push(reply),
            _ => send_reply(reply, Ok(())),
        }
    }

    /// Stores what the program's task reports.
    pub(super) fn set_state(&mut self, state: ProgramState, pid: Option<u32>) {
        let has_exited = matches!(state, ProgramState::Exited(_));
        (self.state, self.pid) = (state, pid);
        if has_exited {
            for reply in self.exit_replies.drain(..) {
                send_reply(reply, Ok(()));
            }
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.state, ProgramState::Starting | ProgramState::Ready)
    }
}

/// One run of a program, from start to exit.
struct ProgramRun {
    context: Rc<LabContext>,
    program: Program,
    launch: LaunchOptions,
}

impl ProgramRun {
    async fn supervise(self, mut actions: mpsc::Receiver<ProgramAction>) {
        let how = match self.spawn() {
            Err(error) => format!("did not start: {error:#}"),
            Ok(mut child) => {
                let pid = child.id();
                self.report(ProgramState::Starting, pid).await;
                tokio::select! {
                    status = child.wait() => describe_exit(status),
                    action = next_action(&mut actions) => stop(&mut child, action).await,
                    never = self.watch_readiness(pid) => match never {},
                }
            }
        };
        self.report(ProgramState::Exited(how), None).await;
    }

    async fn report(&self, state: ProgramState, pid: Option<u32>) {
        let _ = self
            .context
            .events
            .send(Event::Program {
                program: self.program.clone(),
                state,
                pid,
            })
            .await;
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = self.program.command(&self.context, &self.launch)?;
        command.spawn().context("ip netns exec")
    }

    /// Reports every change of readiness.
    async fn watch_readiness(&self, pid: Option<u32>) -> std::convert::Infallible {
        let mut was_ready = false;
        loop {
            let is_ready = self.program.is_ready(&self.context).await;
            if is_ready != was_ready {
                let state = if is_ready {
                    ProgramState::Ready
                } else {
                    ProgramState::Starting
                };
                self.report(state, pid).await;
                was_ready = is_ready;
            }
            tokio::time::sleep(if is_ready {
                READY_CHECK_INTERVAL
            } else {
                STARTING_CHECK_INTERVAL
            })
            .await;
        }
    }
}

async fn next_action(actions: &mut mpsc::Receiver<ProgramAction>) -> ProgramAction {
    match actions.recv().await {
        Some(action) => action,
        // The handle has started another run, which it does only after the exit of this one.
        None => std::future::pending().await,
    }
}

async fn stop(child: &mut Child, action: ProgramAction) -> String {
    if action == ProgramAction::Stop
        && let Some(pid) = child.id().and_then(|pid| pid.try_into().ok())
    {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        if let Ok(status) = tokio::time::timeout(DRAIN_TIMEOUT, child.wait()).await {
            return describe_exit(status);
        }
    }
    let _ = child.start_kill();
    describe_exit(child.wait().await)
}

/// The text of [`ProgramState::Exited`].
fn describe_exit(status: std::io::Result<std::process::ExitStatus>) -> String {
    match status {
        Ok(status) => format!("ended: {status}"),
        Err(error) => format!("cannot be waited for: {error}"),
    }
}
