//! The process that owns a lab.
//!
//! One loop owns the state of the cluster. Requests from the socket, and reports from the tasks
//! that look after pods and daemons, come to it as events; after each batch of them it publishes
//! what follows from the new state (object files, hosts files, kube-proxy's rules, status), as
//! differences to what it published before.

mod authority;
mod clock;
mod container;
mod daemon;
mod event;
mod kubelet;
mod probe;
mod program;
mod publish;
mod requests;
mod sandbox;
mod server;

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
use tokio::task::JoinSet;

use crate::model::Key;
use crate::model::cluster::Cluster;
use crate::options::{IdentitySource, Options};
use crate::poll;
use crate::protocol::{ProgramState, Status};
use crate::registry::{self, LabDir};
use crate::tools;

use event::{Answer, Event};
use program::Program;

/// Events wait here while one is acted on; a full queue holds the senders back.
const EVENTS: usize = 1024;

/// The first start of a certificate authority makes two keys, which takes milliseconds.
const CA_DEADLINE: Duration = Duration::from_secs(10);

/// A killed process has ended already; its exit is noticed within microseconds.
const REAP_DEADLINE: Duration = Duration::from_millis(500);

/// What every task of the agent needs.
#[derive(Debug)]
struct World {
    dir: LabDir,
    options: Options,
    fabric: String,
    /// The daemon's binary; none when the lab runs without.
    daemon: Option<PathBuf>,
    /// The binary of the certificate authority; none when it is no process of the lab.
    ambit: Option<PathBuf>,
    events: mpsc::Sender<Event>,
}

/// The state, and the handles of everything that runs.
struct Agent {
    world: Rc<World>,
    cluster: Cluster,
    published: publish::Published,
    status: watch::Sender<Status>,
    pods: BTreeMap<Key, watch::Sender<kubelet::Wish>>,
    daemons: BTreeMap<String, daemon::Handle>,
    ca: Option<daemon::Handle>,
    deletions: Vec<requests::Deletion>,
    /// The lab stays when its owner goes.
    keep: bool,
    tasks: JoinSet<()>,
}

/// Runs the agent until the lab is taken down. Called with the lab's locked file as stdin.
pub(crate) fn run(name: &str, options: Options) -> Result<()> {
    // Ctrl-C in the terminal that started the lab is not meant for it. Fails only for a process
    // that leads a group already, which then has no terminal to fear.
    let _ = nix::unistd::setsid();
    // What a program leaves behind when it ends is ours to reap: an init may not be there to do it.
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
    let (sender, mut events) = mpsc::channel(EVENTS);
    let daemon = match options.run_daemons {
        true => Some(tools::binary("ztunnel", options.bin_dir.as_deref())?),
        false => None,
    };
    let ambit = match options.identity {
        IdentitySource::Ca => Some(tools::binary("ambit", options.bin_dir.as_deref())?),
        _ => None,
    };
    let fabric = format!("ambit-{}-fabric", dir.name());
    let world = Rc::new(World {
        dir: dir.clone(),
        options,
        fabric,
        daemon,
        ambit,
        events: sender,
    });
    sandbox::fabric(&world).await?;
    let mut agent = Agent::new(Rc::clone(&world));
    match world.options.identity {
        IdentitySource::Ca => agent.start_ca(&mut events).await?,
        _ => drop(LocalCa::create(&dir.ca()).context("cannot make the certificate authority")?),
    }
    agent.publish().await?;
    let listener = tokio::net::UnixListener::bind(dir.socket()).context("socket")?;
    let mut doors = JoinSet::new();
    doors.spawn_local(server::listen(
        listener,
        Rc::clone(&world),
        agent.status.subscribe(),
    ));
    writeln!(std::io::stdout(), "listening").context("stdout")?;
    let asked = agent.until_down(events).await;
    // Programs end with the tasks that look after them.
    agent.tasks.shutdown().await;
    let wiped = registry::wipe(&dir);
    reap();
    if let Some(asked) = asked {
        // Whoever asked may have gone.
        let _ = asked.send(
            wiped
                .as_ref()
                .map(|()| serde_json::Value::Null)
                .map_err(|e| format!("{e:#}")),
        );
        // The connection's task writes the answer; it has nothing else left to do.
        tokio::task::yield_now().await;
    }
    wiped
}

/// Collects the programs that were killed, and what they had started. All of them have ended: a
/// lab is wiped when nothing runs in its namespaces.
fn reap() {
    let ended = || match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        // No child is left.
        Err(Errno::ECHILD) => Some(()),
        _ => None,
    };
    poll::until(REAP_DEADLINE, Duration::from_millis(1), ended);
}

impl Agent {
    fn new(world: Rc<World>) -> Self {
        let cluster = Cluster::new(world.dir.name());
        let (status, _) = watch::channel(publish::empty_status(&world));
        Self {
            world,
            cluster,
            published: publish::Published::default(),
            status,
            pods: BTreeMap::new(),
            daemons: BTreeMap::new(),
            ca: None,
            deletions: Vec::new(),
            keep: false,
            tasks: JoinSet::new(),
        }
    }

    /// Starts the certificate authority. It is there before the first daemon, as that of a cluster is:
    /// a daemon that starts reads its root.
    async fn start_ca(&mut self, events: &mut mpsc::Receiver<Event>) -> Result<()> {
        authority::prepare(&self.world).await?;
        let launch = self.world.options.ca_launch.clone();
        let mut ca = daemon::Handle::new(Rc::clone(&self.world), Program::Ca, launch);
        if let Some(task) = ca.start() {
            self.tasks.spawn_local(task);
        }
        self.ca = Some(ca);
        let started = async {
            while let Some(event) = events.recv().await {
                self.act(event).await;
                match self.ca.as_ref().map(|ca| &ca.state) {
                    Some(ProgramState::Starting) => {}
                    Some(ProgramState::Exited(how)) => {
                        let log = std::fs::read_to_string(self.world.dir.ca_log());
                        bail!("{how}; it said {}", log.unwrap_or_default().trim_end());
                    }
                    _ => return Ok(()),
                }
            }
            Ok(())
        };
        let started = tokio::time::timeout(CA_DEADLINE, started).await;
        started
            .context("it does not listen")
            .flatten()
            .context("the certificate authority")
    }

    /// Acts on events until the lab is to go; returns whom to tell when it has gone.
    async fn until_down(&mut self, mut events: mpsc::Receiver<Event>) -> Option<Answer> {
        let mut terminate = signal(SignalKind::terminate()).ok()?;
        let mut interrupt = signal(SignalKind::interrupt()).ok()?;
        loop {
            let first = tokio::select! {
                event = events.recv() => event?,
                _ = terminate.recv() => return None,
                _ = interrupt.recv() => return None,
                // Tasks end by themselves; what they had to say they have sent.
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => continue,
            };
            // Everything that has come meanwhile is published together.
            let mut next = Some(first);
            while let Some(event) = next {
                match event {
                    Event::Down(answer) => return Some(answer),
                    Event::OwnerGone if !self.keep => return None,
                    event => self.act(event).await,
                }
                next = events.try_recv().ok();
            }
            if let Err(error) = self.publish().await {
                eprintln!("publish: {error:#}");
            }
        }
    }
}
