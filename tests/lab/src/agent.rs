//! The agent: the process that owns a lab.
//!
//! One loop owns the state of the cluster. Requests from the socket and reports from the tasks of
//! pods and programs arrive as events. After each batch of events the loop publishes what follows
//! from the new state (object files, hosts files, kube-proxy rules, status). It writes only what
//! differs from the previous publication.

mod ca;
mod clock;
mod container;
mod daemon;
mod events;
mod kubelet;
mod probe;
mod program;
mod publish;
mod sandbox;
mod server;
mod supervisor;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh::certs::LocalCa;
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use crate::model::Key;
use crate::model::cluster::Cluster;
use crate::options::{IdentitySource, Options};
use crate::poll;
use crate::protocol::{ProgramState, Status};
use crate::registry::{self, LabDir};
use crate::tools;

use events::{Event, ReplySender};
use program::Program;

/// Capacity of the event queue; senders wait while it is full.
const EVENT_QUEUE_CAPACITY: usize = 1024;

/// The first start of a certificate authority generates two keys, which takes milliseconds.
const CA_START_TIMEOUT: Duration = Duration::from_secs(10);

/// The killed processes have exited already; reaping them takes microseconds.
const REAP_TIMEOUT: Duration = Duration::from_millis(500);

/// What every task of the agent shares.
#[derive(Debug)]
struct LabContext {
    dir: LabDir,
    options: Options,
    fabric: String,
    /// The daemon's binary; none when the lab runs without daemons.
    daemon: Option<PathBuf>,
    /// The binary of the certificate authority; none when it is not a process of the lab.
    ambit: Option<PathBuf>,
    events: mpsc::Sender<Event>,
}

/// The state of the lab and the handles of everything that runs in it.
struct Agent {
    context: Rc<LabContext>,
    cluster: Cluster,
    published: publish::Published,
    status: watch::Sender<Status>,
    pods: BTreeMap<Key, watch::Sender<kubelet::DesiredState>>,
    daemons: BTreeMap<String, supervisor::ProgramHandle>,
    ca: Option<supervisor::ProgramHandle>,
    /// Creates the folder of the certificate authority, if that is not a process.
    ca_folder: Option<JoinHandle<Result<()>>>,
    deletions: Vec<events::PendingDeletion>,
    /// Whether the lab stays when the owning connection closes.
    is_kept: bool,
    tasks: JoinSet<()>,
}

/// Runs the agent until the lab is taken down. Its stdin is the lab's locked file.
pub(crate) fn run(name: &str, options: Options) -> Result<()> {
    // A session of its own, so that Ctrl-C in the terminal that started the lab does not reach the
    // agent. It fails only for a process group leader, which gets no Ctrl-C of that terminal.
    let _ = nix::unistd::setsid();
    // Orphaned children of the lab's programs become children of the agent, which reaps them: in a
    // container there may be no init process that does.
    nix::sys::prctl::set_child_subreaper(true).context("prctl")?;
    let dir = LabDir::new(name)?;
    std::fs::write(dir.root().join("lock"), std::process::id().to_string()).context("lock")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(serve(dir, options)))
}

async fn serve(dir: LabDir, options: Options) -> Result<()> {
    let (sender, mut events) = mpsc::channel(EVENT_QUEUE_CAPACITY);
    let daemon = match options.run_daemons {
        true => Some(tools::binary("ztunnel", options.bin_dir.as_deref())?),
        false => None,
    };
    let ambit = match options.identity {
        IdentitySource::Ca => Some(tools::binary("ambit", options.bin_dir.as_deref())?),
        _ => None,
    };
    let fabric = format!("ambit-{}-fabric", dir.name());
    let context = Rc::new(LabContext {
        dir: dir.clone(),
        options,
        fabric,
        daemon,
        ambit,
        events: sender,
    });
    let mut agent = Agent::new(Rc::clone(&context));
    if context.options.identity != IdentitySource::Ca {
        agent.start_ca_folder();
    }
    sandbox::create_fabric(&context).await?;
    if context.options.identity == IdentitySource::Ca {
        agent.start_ca(&mut events).await?;
    }
    agent.publish().await?;
    let listener = tokio::net::UnixListener::bind(dir.socket()).context("socket")?;
    let mut server = JoinSet::new();
    server.spawn_local(server::listen(
        listener,
        Rc::clone(&context),
        agent.status.subscribe(),
    ));
    writeln!(std::io::stdout(), "listening").context("stdout")?;
    let down_reply = agent.run_until_down(events).await;
    // Programs are killed when their tasks are dropped.
    agent.tasks.shutdown().await;
    // Nothing may write into the lab's folder while it is removed.
    let _ = agent.finish_ca_folder().await;
    let removed = registry::remove_all(&dir);
    reap();
    if let Some(reply) = down_reply {
        // The client may have disconnected.
        let _ = reply.send(
            removed
                .as_ref()
                .map(|()| serde_json::Value::Null)
                .map_err(|e| format!("{e:#}")),
        );
        // Lets the connection's task write the response.
        tokio::task::yield_now().await;
    }
    removed
}

/// Reaps the killed programs and their children. All of them have exited: a lab is removed only
/// after nothing runs in its namespaces.
fn reap() {
    let reaped = || match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        // No child is left.
        Err(Errno::ECHILD) => Some(()),
        _ => None,
    };
    poll::until(REAP_TIMEOUT, Duration::from_millis(1), reaped);
}

impl Agent {
    fn new(context: Rc<LabContext>) -> Self {
        let cluster = Cluster::new(context.dir.name());
        let (status, _) = watch::channel(publish::empty_status(&context));
        Self {
            context,
            cluster,
            published: publish::Published::default(),
            status,
            pods: BTreeMap::new(),
            daemons: BTreeMap::new(),
            ca: None,
            ca_folder: None,
            deletions: Vec::new(),
            is_kept: false,
            tasks: JoinSet::new(),
        }
    }

    /// Starts to create the folder of the certificate authority in the background: the first use of
    /// the cryptographic library in a process takes 0.1 s of CPU time (jitter entropy).
    fn start_ca_folder(&mut self) {
        let folder = self.context.dir.ca();
        self.ca_folder = Some(spawn_blocking(move || {
            LocalCa::create(&folder)
                .map(drop)
                .context("cannot create the certificate authority")
        }));
    }

    /// Waits until the folder of the certificate authority is complete.
    async fn finish_ca_folder(&mut self) -> Result<()> {
        match self.ca_folder.take() {
            Some(task) => task.await.context("certificate authority")?,
            None => Ok(()),
        }
    }

    /// Starts the certificate authority and waits until it listens. It runs before the first daemon,
    /// as in a cluster: a daemon reads the root at its start.
    async fn start_ca(&mut self, events: &mut mpsc::Receiver<Event>) -> Result<()> {
        ca::create_token_keys(&self.context).await?;
        let launch = self.context.options.ca_launch.clone();
        let mut ca = supervisor::ProgramHandle::new(Rc::clone(&self.context), Program::Ca, launch);
        if let Some(task) = ca.start() {
            self.tasks.spawn_local(task);
        }
        self.ca = Some(ca);
        let started = async {
            while let Some(event) = events.recv().await {
                self.handle_event(event).await;
                match self.ca.as_ref().map(|ca| &ca.state) {
                    Some(ProgramState::Starting) => {}
                    Some(ProgramState::Exited(how)) => {
                        let log = std::fs::read_to_string(self.context.dir.ca_log());
                        bail!("{how}; log: {}", log.unwrap_or_default().trim_end());
                    }
                    _ => return Ok(()),
                }
            }
            Ok(())
        };
        let started = tokio::time::timeout(CA_START_TIMEOUT, started).await;
        started
            .context("it does not listen")
            .flatten()
            .context("the certificate authority")
    }

    /// Handles events until the lab must be removed. Returns where to reply after the removal.
    async fn run_until_down(&mut self, mut events: mpsc::Receiver<Event>) -> Option<ReplySender> {
        let mut terminate = signal(SignalKind::terminate()).ok()?;
        let mut interrupt = signal(SignalKind::interrupt()).ok()?;
        loop {
            let first = tokio::select! {
                event = events.recv() => event?,
                _ = terminate.recv() => return None,
                _ = interrupt.recv() => return None,
                // A finished task has sent its last report as an event.
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => continue,
            };
            // All queued events are published together.
            let mut next = Some(first);
            while let Some(event) = next {
                match event {
                    Event::Down(reply) => return Some(reply),
                    Event::OwnerGone if !self.is_kept => return None,
                    event => self.handle_event(event).await,
                }
                next = events.try_recv().ok();
            }
            if let Err(error) = self.publish().await {
                eprintln!("publish: {error:#}");
            }
        }
    }
}
