//! The life of the programs that the lab keeps: the mesh daemon of each node, the certificate
//! authority.

use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::sync::mpsc;

use super::World;
use super::event::{Answer, Event};
use super::program::{ANSWER_DEADLINE, Program};
use super::requests::reply;
use crate::http;
use crate::netns;
use crate::options::LaunchOptions;
use crate::protocol::{DaemonAction, ProgramState};

/// How often a program that has just started is asked whether it is ready.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// A program that drains longer than this after SIGTERM is killed. A daemon's own deadline is 5 s.
const DRAIN_DEADLINE: Duration = Duration::from_secs(15);

/// What the agent's loop knows of a program.
pub(super) struct Handle {
    world: Rc<World>,
    program: Program,
    pub(super) launch: LaunchOptions,
    pub(super) state: ProgramState,
    pub(super) pid: Option<u32>,
    actions: Option<mpsc::Sender<DaemonAction>>,
    ends: Vec<Answer>,
}

impl Handle {
    pub(super) fn new(world: Rc<World>, program: Program, launch: LaunchOptions) -> Self {
        let (state, pid, actions, ends) = (ProgramState::Disabled, None, None, Vec::new());
        Self {
            world,
            program,
            launch,
            state,
            pid,
            actions,
            ends,
        }
    }

    /// The task of a new life; none if there is one.
    pub(super) fn start(&mut self) -> Option<impl Future<Output = ()> + use<>> {
        if matches!(self.state, ProgramState::Starting | ProgramState::Ready) {
            return None;
        }
        self.state = ProgramState::Starting;
        let (sender, actions) = mpsc::channel(8);
        self.actions = Some(sender);
        let life = Life {
            world: Rc::clone(&self.world),
            program: self.program.clone(),
            launch: self.launch.clone(),
        };
        Some(life.run(actions))
    }

    /// Ends it; answered when it has ended.
    pub(super) fn end(&mut self, action: DaemonAction, answer: Answer) {
        let alive = matches!(self.state, ProgramState::Starting | ProgramState::Ready);
        match self
            .actions
            .as_ref()
            .filter(|_| alive)
            .map(|actions| actions.try_send(action))
        {
            Some(Ok(())) => self.ends.push(answer),
            _ => reply(answer, Ok(())),
        }
    }

    /// Notes what the program's task reports.
    pub(super) fn report(&mut self, state: ProgramState, pid: Option<u32>) {
        let ended = matches!(state, ProgramState::Exited(_));
        (self.state, self.pid) = (state, pid);
        if ended {
            for answer in self.ends.drain(..) {
                reply(answer, Ok(()));
            }
        }
    }
}

/// One life of a program, from start to exit.
struct Life {
    world: Rc<World>,
    program: Program,
    launch: LaunchOptions,
}

impl Life {
    async fn run(self, mut actions: mpsc::Receiver<DaemonAction>) {
        let how = match self.spawn() {
            Err(error) => format!("did not start: {error:#}"),
            Ok(mut child) => {
                let pid = child.id();
                self.report(ProgramState::Starting, pid).await;
                tokio::select! {
                    status = child.wait() => ended(status),
                    how = self.obey(&mut actions) => end(&mut child, how).await,
                    never = self.watch_readiness(pid) => match never {},
                }
            }
        };
        self.report(ProgramState::Exited(how), None).await;
    }

    async fn report(&self, state: ProgramState, pid: Option<u32>) {
        let _ = self
            .world
            .events
            .send(Event::Program {
                program: self.program.clone(),
                state,
                pid,
            })
            .await;
    }

    fn spawn(&self) -> Result<Child> {
        let mut command = self.program.command(&self.world, &self.launch)?;
        command.spawn().context("ip netns exec")
    }

    async fn obey(&self, actions: &mut mpsc::Receiver<DaemonAction>) -> DaemonAction {
        match actions.recv().await {
            Some(action) => action,
            // The handle has started another life, which it does only after this one's end.
            None => std::future::pending().await,
        }
    }

    /// Reports readiness as it comes and goes.
    async fn watch_readiness(&self, pid: Option<u32>) -> std::convert::Infallible {
        let mut was = false;
        loop {
            let ready = self.program.ready(&self.world).await;
            if ready != was {
                let state = if ready {
                    ProgramState::Ready
                } else {
                    ProgramState::Starting
                };
                self.report(state, pid).await;
                was = ready;
            }
            tokio::time::sleep(if ready { ANSWER_DEADLINE } else { ASK_AGAIN }).await;
        }
    }
}

async fn end(child: &mut Child, how: DaemonAction) -> String {
    if how == DaemonAction::Stop
        && let Some(pid) = child.id().and_then(|pid| pid.try_into().ok())
    {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        if let Ok(status) = tokio::time::timeout(DRAIN_DEADLINE, child.wait()).await {
            return ended(status);
        }
    }
    let _ = child.start_kill();
    ended(child.wait().await)
}

fn ended(status: std::io::Result<std::process::ExitStatus>) -> String {
    match status {
        Ok(status) => format!("ended: {status}"),
        Err(error) => format!("cannot be waited for: {error}"),
    }
}

/// The state in which the node's daemon reports a pod; `None` if it does not know it.
pub(super) async fn workload_state(node_netns: &str, kube_uid: &str) -> Option<String> {
    let get = || {
        let to = SocketAddr::from(([127, 0, 0, 1], 15000));
        http::get(to, "localhost", "/config_dump", &[], ANSWER_DEADLINE)
    };
    let answer = netns::inside_async(node_netns, get).await.ok()?.ok()?;
    let dump = serde_json::from_str(&answer.body).ok()?;
    http::workload_state(&dump, kube_uid).map(str::to_owned)
}
