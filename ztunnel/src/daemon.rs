//! How the daemon starts, runs and stops, and which part owns which task.
//!
//! One control thread runs the tasks of this module on a current-thread runtime. The data plane and
//! the work inside pods' namespaces have threads of their own. [`run`] owns all tasks and stops
//! them in this order: the control tasks with enrolment, whose rules remain in the kernel; the data
//! plane, which drains; the admin, metrics and readiness ports, so that the drain can be observed.

mod follow;
mod identities;
mod ports;
mod signals;
mod workloads;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::FutureExt;
use mesh::Store;
use mesh::certs::{AuthorityError, IstioCaError, RenewalTask};
use mesh::source::{FolderError, FolderSource};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Admin};
use crate::config::Config;
use crate::dataplane::{
    self, DataPlane, DataPlaneConfig, MAX_CONNECTIONS_PER_POD, MAX_HANDSHAKES_PER_POD,
};
use crate::enrolment::{self, Enrolment, NetnsFolder};
use crate::guard::Guard;
use crate::identity::Identities;
use crate::netns::{Netns, NetnsThreads};
use crate::readiness::{PendingTask, Readiness};
use crate::revocation::{RevocationError, RevocationFile};
use crate::telemetry::{Log, Telemetry};
use follow::{count_problems, purge_deleted};
use ports::Ports;
use signals::Signals;
use workloads::workload_states;

/// Why the daemon cannot start, or must stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port is in use, or the daemon may not open it.
    #[error("cannot listen on {address} for {service}; is another daemon running here?")]
    Listen {
        /// What is served on the port.
        service: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A basic system call failed.
    #[error("cannot {operation}")]
    System {
        /// What failed, as in "cannot ...".
        operation: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The folder of the certificate authority cannot be used.
    #[error("cannot use the certificate authority in {folder}; is --ca-dir right?")]
    Authority {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        #[source]
        source: AuthorityError,
    },
    /// The configuration of the certificate authority's client cannot be used.
    #[error(transparent)]
    IstioCa(#[from] IstioCaError),
    /// The file of revoked certificates cannot be used.
    #[error(transparent)]
    Revocations(#[from] RevocationError),
    /// The folder of objects cannot be used.
    #[error(transparent)]
    Source(#[from] FolderError),
    /// The data plane cannot start.
    #[error(transparent)]
    DataPlane(#[from] dataplane::Error),
    /// The metrics cannot be registered.
    #[error("cannot set up the metrics")]
    Metrics(#[from] prometheus::Error),
    /// A task that runs until it is stopped has ended unexpectedly.
    #[error("{0} has ended unexpectedly")]
    TaskEnded(&'static str),
}

/// Runs the daemon until a signal or a request to the admin port stops it, then drains. A second
/// signal ends the process at once. Must run in a `LocalSet`.
///
/// # Errors
/// Fails if the daemon cannot start, or if one of its tasks ends unexpectedly.
pub async fn run(config: Config, log: Log) -> Result<(), Error> {
    let mut signals = Signals::new().map_err(|source| Error::System {
        operation: "catch signals",
        source,
    })?;
    let quit = CancellationToken::new();
    let mut daemon = Daemon::start(&config, log, quit.clone())?;
    let outcome = tokio::select! {
        signal = signals.next() => {
            tracing::info!(signal, "stopping");
            Ok(())
        }
        () = quit.cancelled() => Ok(()),
        ended = daemon.first_exit() => ended,
    };
    tokio::select! {
        () = daemon.stop(&config) => {}
        signal = signals.next() => {
            tracing::warn!(signal, "second signal: exiting without waiting for open connections");
            std::process::exit(EXIT_FORCED);
        }
    }
    outcome
}

/// Exit code after a second signal: the drain was not completed.
const EXIT_FORCED: i32 = 1;

/// The running parts. Each set of tasks is stopped by its token and then joined.
struct Daemon {
    data_plane: Arc<DataPlane>,
    readiness: Arc<Readiness>,
    /// Source, enrolment and other followers of the model. Stopped before the drain.
    control_tasks: JoinSet<Result<(), Error>>,
    stop_control: CancellationToken,
    /// Certificates, revocation lists, and the admin and metrics ports. Stopped after the drain.
    serving_tasks: JoinSet<()>,
    stop_serving: CancellationToken,
}

impl Daemon {
    fn start(config: &Config, log: Log, quit: CancellationToken) -> Result<Self, Error> {
        let ports = Ports::open(config)?;
        let telemetry = Arc::new(Telemetry::new(Some(log.clone()))?);
        let readiness = Readiness::new();
        // The data plane serves readiness as soon as it runs. This task is pending until the others
        // are registered.
        let _starting = readiness.register_task("the daemon is starting");
        let store = Store::new();
        let (certificates, renewal) = identities::certificates(config)?;
        let revoked = config.crl_path.as_deref().map(RevocationFile::open);
        let revoked = revoked.transpose()?;
        let revocations = revoked.as_ref().map(|file| file.revocations().clone());
        let identities = Identities::new(certificates, revocations.unwrap_or_default());
        let data_plane = data_plane_config(config, &identities, (ports.readiness, &readiness));
        let data_plane = DataPlane::start(data_plane, store.clone(), telemetry.clone())?;
        let data_plane = Arc::new(data_plane);
        let source = FolderSource::new(&config.source_folder, config.mesh.clone(), store.clone());
        let enrolment = enrolment(config, &store, &data_plane, &identities, &telemetry)?;
        let mut daemon = Self {
            data_plane: data_plane.clone(),
            readiness,
            control_tasks: JoinSet::new(),
            stop_control: CancellationToken::new(),
            serving_tasks: JoinSet::new(),
            stop_serving: CancellationToken::new(),
        };
        let statuses = enrolment.statuses();
        let admin = Admin {
            store: store.clone(),
            data_plane: data_plane.clone(),
            identities: identities.clone(),
            log,
            workloads: workload_states(store.clone(), statuses),
            config: config.to_json(),
            quit,
        };
        daemon.start_certificates(renewal, identities, telemetry.clone());
        let (tasks, stop) = (&mut daemon.serving_tasks, &daemon.stop_serving);
        if let Some(file) = revoked {
            tasks.spawn_local(file.run(stop.clone()));
        }
        tasks.spawn_local(admin::serve(ports.admin, admin, stop.clone()));
        let metrics = admin::serve_metrics(ports.stats, telemetry.clone(), stop.clone());
        tasks.spawn_local(metrics);
        daemon.start_control(source, enrolment, &store, telemetry);
        tracing::info!(node = %config.node, workers = data_plane.workers(), "ztunnel started");
        Ok(daemon)
    }

    fn start_certificates(
        &mut self,
        renewal: RenewalTask,
        identities: Identities,
        telemetry: Arc<Telemetry>,
    ) {
        let (tasks, stop) = (&mut self.serving_tasks, &self.stop_serving);
        tasks.spawn_local(renewal.run(stop.clone()));
        let stop = stop.clone();
        tasks.spawn_local(async move { identities.run(&telemetry, stop).await });
    }

    fn start_control(
        &mut self,
        source: FolderSource,
        enrolment: Enrolment,
        store: &Store,
        telemetry: Arc<Telemetry>,
    ) {
        let (tasks, stop) = (&mut self.control_tasks, &self.stop_control);
        let loaded = source.loaded();
        let not_loaded = "the source folder has not been read yet";
        let not_loaded = self.readiness.register_task(not_loaded);
        let not_enrolled = "pods of this node have not been enrolled yet";
        let not_enrolled = self.readiness.register_task(not_enrolled);
        let settled = enrolment.settled();
        let source_stop = stop.clone();
        tasks.spawn_local(async move { Ok(source.run(source_stop).await?) });
        tasks.spawn_local(complete_when(settled, not_enrolled, stop.clone()));
        tasks.spawn_local(complete_when(loaded.clone(), not_loaded, stop.clone()));
        let purge = purge_deleted(store.clone(), self.data_plane.clone(), stop.clone());
        tasks.spawn_local(purge.map(Ok));
        tasks.spawn_local(count_problems(store.clone(), telemetry, stop.clone()).map(Ok));
        let stop = stop.clone();
        tasks.spawn_local(async move {
            // Enrolment must not see the empty store: in it no pod is in the mesh.
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = wait_until_true(loaded) => {}
            }
            enrolment.run(stop).await;
            Ok(())
        });
    }

    /// Waits for a task that ends before it is stopped, and returns its error.
    async fn first_exit(&mut self) -> Result<(), Error> {
        tokio::select! {
            Some(ended) = self.control_tasks.join_next() => {
                let unexpected = Err(Error::TaskEnded("a control task"));
                ended.unwrap_or(Ok(())).and(unexpected)
            }
            Some(_) = self.serving_tasks.join_next() => Err(Error::TaskEnded("a serving task")),
            else => Err(Error::TaskEnded("every control task")),
        }
    }

    /// Stops the control tasks, drains the data plane, then stops the serving tasks.
    async fn stop(&mut self, config: &Config) {
        let _draining = self.readiness.register_task("the daemon is stopping");
        self.stop_control.cancel();
        while self.control_tasks.join_next().await.is_some() {}
        tracing::info!(deadline = ?config.termination_deadline, "draining");
        self.data_plane.drain(config.termination_deadline).await;
        self.stop_serving.cancel();
        while self.serving_tasks.join_next().await.is_some() {}
        tracing::info!("stopped");
    }
}

fn data_plane_config(
    config: &Config,
    identities: &Identities,
    (listener, readiness): (TcpListener, &Arc<Readiness>),
) -> DataPlaneConfig {
    DataPlaneConfig {
        workers: config.workers,
        max_connections_per_pod: MAX_CONNECTIONS_PER_POD,
        max_handshakes_per_pod: MAX_HANDSHAKES_PER_POD,
        identities: identities.clone(),
        trust_domain_aliases: config.mesh.trust_domain_aliases.clone(),
        tunnel_max_age: config.tunnel_max_age,
        readiness: Some((listener, readiness.clone())),
    }
}

/// Threads for work in pods' namespaces. Replacing a pod's rules takes 15 ms, most of it the
/// kernel's wait for readers of the old rules. 100 pods take 2.1 s on one thread and 1.2 s on four.
const NETNS_THREADS: usize = 4;

fn enrolment(
    config: &Config,
    store: &Store,
    data_plane: &Arc<DataPlane>,
    identities: &Identities,
    telemetry: &Arc<Telemetry>,
) -> Result<Enrolment, Error> {
    let threads = |name, count| {
        NetnsThreads::start(name, count).map_err(|source| Error::System {
            operation: "start a thread",
            source,
        })
    };
    let node_netns = Netns::current().map_err(|source| Error::System {
        operation: "open this network namespace",
        source,
    })?;
    Ok(Enrolment::new(enrolment::Dependencies {
        node: config.node.clone(),
        node_netns: node_netns.id(),
        store: store.clone(),
        source: Arc::new(NetnsFolder::new(&config.netns_dir)),
        data_plane: data_plane.clone(),
        identities: identities.clone(),
        telemetry: telemetry.clone(),
        threads: threads("netns", NETNS_THREADS)?,
        guard: Guard::new(threads("guard", 1)?),
        verify_interval: config.verify_interval,
    }))
}

/// Completes a pending task of readiness once a flag becomes true. Ends when stopped.
async fn complete_when(
    flag: watch::Receiver<bool>,
    task: PendingTask,
    stop: CancellationToken,
) -> Result<(), Error> {
    tokio::select! {
        () = stop.cancelled() => return Ok(()),
        () = wait_until_true(flag) => drop(task),
    }
    stop.cancelled().await;
    Ok(())
}

async fn wait_until_true(mut flag: watch::Receiver<bool>) {
    if flag.wait_for(|flag| *flag).await.is_err() {
        // The task that owns the sender has ended, which `first_exit` reports.
        std::future::pending::<()>().await;
    }
}
