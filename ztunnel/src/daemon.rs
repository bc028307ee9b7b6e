//! Start, run and stop: who owns what.
//!
//! One control thread runs everything here on a current-thread runtime; the data plane has threads
//! of its own, and work inside pods' namespaces has its own thread too. All tasks are owned by
//! [`run`], which ends them in this order: enrolment first (its rules stay in the kernel), then the
//! data plane, which drains, and the ports for operators last, so that a drain can be watched.

mod identities;
mod ports;
mod signals;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

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
use crate::enrolment::{self, Enrolment, NetnsFolder, purge_removed};
use crate::guard::Guard;
use crate::identity::Identities;
use crate::netns::{Netns, NetnsThreads};
use crate::readiness::{PendingTask, Readiness};
use crate::revocation::{RevocationError, RevocationFile};
use crate::telemetry::{Log, Telemetry};
use ports::Ports;
use signals::Signals;

/// Why the daemon cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port is taken or not ours to open.
    #[error("cannot listen on {address} for {what}; is another daemon running here?")]
    Listen {
        /// What would have been served.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The system refused something that every process may have.
    #[error("cannot {what}")]
    System {
        /// What was refused.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The certificate authority.
    #[error("cannot use the certificate authority in {folder}; is --ca-dir right?")]
    Authority {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        #[source]
        source: AuthorityError,
    },
    /// The address of the certificate authority.
    #[error(transparent)]
    IstioCa(#[from] IstioCaError),
    /// The revoked certificates.
    #[error(transparent)]
    Revocations(#[from] RevocationError),
    /// The objects.
    #[error(transparent)]
    Source(#[from] FolderError),
    /// The data plane.
    #[error(transparent)]
    DataPlane(#[from] dataplane::Error),
    /// The metrics.
    #[error("cannot set up the metrics")]
    Metrics(#[from] prometheus::Error),
    /// A part that should run until it is stopped has ended by itself.
    #[error("{0} has ended by itself")]
    Ended(&'static str),
}

/// Runs the daemon until a signal, or the admin port, asks it to stop; then drains. Runs in a
/// `LocalSet`.
///
/// A second signal ends the process at once.
///
/// # Errors
/// Fails if something that the daemon needs is not there at the start, or ends while it runs.
pub async fn run(config: Config, log: Log) -> Result<(), Error> {
    let mut signals = Signals::new().map_err(|source| Error::System {
        what: "catch signals",
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
        ended = daemon.first_end() => ended,
    };
    tokio::select! {
        () = daemon.stop(&config) => {}
        signal = signals.next() => {
            tracing::warn!(signal, "second signal: ending without waiting for open connections");
            std::process::exit(FORCED);
        }
    }
    outcome
}

/// Exit code after a second signal: connections were cut that the operator had asked to drain.
const FORCED: i32 = 1;

/// The running parts. Each stops when its token says so, and is joined.
struct Daemon {
    data_plane: Arc<DataPlane>,
    readiness: Arc<Readiness>,
    /// What decides: sources, certificates, enrolment. Stops before the drain.
    deciding: JoinSet<Result<(), Error>>,
    stop_deciding: CancellationToken,
    /// What serves those that were decided for: keys, and the ports for operators. Stops after the
    /// drain.
    serving: JoinSet<()>,
    stop_serving: CancellationToken,
}

impl Daemon {
    fn start(config: &Config, log: Log, quit: CancellationToken) -> Result<Self, Error> {
        let ports = Ports::open(config)?;
        let telemetry = Arc::new(Telemetry::new(Some(log.clone()))?);
        let readiness = Readiness::new();
        // The data plane answers for readiness as soon as it runs, which is before there is a list
        // of what it has to wait for.
        let _starting = readiness.register_task("the daemon is starting");
        let store = Store::new();
        let (certificates, renewal) = identities::certificates(config)?;
        let revoked = config.crl_path.as_deref().map(RevocationFile::open);
        let revoked = revoked.transpose()?;
        let revocations = revoked.as_ref().map(|file| file.revocations().clone());
        let identities = Identities::new(certificates, revocations.unwrap_or_default());
        let data_plane = DataPlaneConfig {
            workers: config.workers,
            max_connections_per_pod: MAX_CONNECTIONS_PER_POD,
            max_handshakes_per_pod: MAX_HANDSHAKES_PER_POD,
            identities: identities.clone(),
            trust_domain_aliases: config.mesh.trust_domain_aliases.clone(),
            tunnel_max_age: config.tunnel_max_age,
            readiness: Some((ports.readiness, readiness.clone())),
        };
        let data_plane = Arc::new(DataPlane::start(
            data_plane,
            store.clone(),
            telemetry.clone(),
        )?);
        let source = FolderSource::new(&config.source_folder, config.mesh.clone(), store.clone());
        let enrolment = enrolment(config, &store, &data_plane, &identities, &telemetry)?;
        let mut daemon = Self {
            data_plane: data_plane.clone(),
            readiness,
            deciding: JoinSet::new(),
            stop_deciding: CancellationToken::new(),
            serving: JoinSet::new(),
            stop_serving: CancellationToken::new(),
        };
        let statuses = enrolment.statuses();
        let admin = Admin {
            store: store.clone(),
            data_plane: data_plane.clone(),
            identities: identities.clone(),
            log,
            workloads: ports::workload_states(store.clone(), statuses),
            config: config.to_json(),
            quit,
        };
        daemon.serve(renewal, identities, telemetry.clone());
        if let Some(file) = revoked {
            let stop = daemon.stop_serving.clone();
            daemon.serving.spawn_local(file.run(stop));
        }
        daemon.serving.spawn_local(admin::serve(
            ports.admin,
            admin,
            daemon.stop_serving.clone(),
        ));
        daemon.serving.spawn_local(admin::serve_metrics(
            ports.stats,
            telemetry.clone(),
            daemon.stop_serving.clone(),
        ));
        daemon.decide(source, enrolment, &store, telemetry);
        tracing::info!(node = %config.node, workers = data_plane.workers(), "ztunnel started");
        Ok(daemon)
    }

    fn serve(&mut self, renewal: RenewalTask, identities: Identities, telemetry: Arc<Telemetry>) {
        self.serving
            .spawn_local(renewal.run(self.stop_serving.clone()));
        let stop = self.stop_serving.clone();
        self.serving
            .spawn_local(async move { identities.run(&telemetry, stop).await });
    }

    fn decide(
        &mut self,
        source: FolderSource,
        enrolment: Enrolment,
        store: &Store,
        telemetry: Arc<Telemetry>,
    ) {
        let stop = &self.stop_deciding;
        let loaded = source.loaded();
        let reading = self
            .readiness
            .register_task("the source folder has not been read yet");
        let enrolling = self
            .readiness
            .register_task("pods of this node have not been enrolled yet");
        let source_stop = stop.clone();
        self.deciding
            .spawn_local(async move { Ok(source.run(source_stop).await?) });
        self.deciding
            .spawn_local(when(enrolment.settled(), enrolling, stop.clone()));
        self.deciding
            .spawn_local(when(loaded.clone(), reading, stop.clone()));
        let purge = purge_removed(store.clone(), self.data_plane.clone(), stop.clone());
        self.deciding.spawn_local(async move {
            purge.await;
            Ok(())
        });
        self.deciding
            .spawn_local(problems(store.clone(), telemetry, stop.clone()));
        let stop = stop.clone();
        self.deciding.spawn_local(async move {
            // An empty store would say that no pod is in the mesh.
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = becomes_true(loaded) => {}
            }
            enrolment.run(stop).await;
            Ok(())
        });
    }

    /// Waits for a part that ends although nobody asked it to.
    async fn first_end(&mut self) -> Result<(), Error> {
        tokio::select! {
            Some(ended) = self.deciding.join_next() => {
                let by_itself = Err(Error::Ended("a control task"));
                ended.unwrap_or(Ok(())).and(by_itself)
            }
            Some(_) = self.serving.join_next() => Err(Error::Ended("a serving task")),
            else => Err(Error::Ended("every control task")),
        }
    }

    async fn stop(&mut self, config: &Config) {
        let _draining = self.readiness.register_task("the daemon is stopping");
        self.stop_deciding.cancel();
        while self.deciding.join_next().await.is_some() {}
        tracing::info!(deadline = ?config.termination_deadline, "draining");
        self.data_plane.drain(config.termination_deadline).await;
        self.stop_serving.cancel();
        while self.serving.join_next().await.is_some() {}
        tracing::info!("stopped");
    }
}

/// Pods whose namespaces are worked on at a time. To replace a pod's rules takes 15 ms, most of it the
/// kernel's wait until nobody reads the old ones: 100 pods take 2.1 s one by one, 1.2 s like this.
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
            what: "start a thread",
            source,
        })
    };
    let here = Netns::current().map_err(|source| Error::System {
        what: "open this network namespace",
        source,
    })?;
    Ok(Enrolment::new(enrolment::Dependencies {
        node: config.node.clone(),
        node_netns: here.id(),
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

/// Readiness waits for something no longer, once a flag becomes true.
async fn when(
    flag: watch::Receiver<bool>,
    waiting: PendingTask,
    stop: CancellationToken,
) -> Result<(), Error> {
    tokio::select! {
        () = stop.cancelled() => return Ok(()),
        () = becomes_true(flag) => drop(waiting),
    }
    stop.cancelled().await;
    Ok(())
}

async fn becomes_true(mut flag: watch::Receiver<bool>) {
    if flag.wait_for(|flag| *flag).await.is_err() {
        // Who would have set it has ended, which is reported as an end of its own.
        std::future::pending::<()>().await;
    }
}

/// Publishes how many problems the objects have; the source says which.
async fn problems(
    store: Store,
    telemetry: Arc<Telemetry>,
    stop: CancellationToken,
) -> Result<(), Error> {
    let mut changed = store.subscribe();
    loop {
        changed.borrow_and_update();
        telemetry.record_problems(store.load().diagnostics().len());
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = changed.changed() => if changed.is_err() { return Ok(()) },
        }
    }
}
