//! How the certificate authority starts, runs and stops.

use std::future::{Ready, ready};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use component::admin::{self, Request, Response};
use component::{ErrorChain, LastError};
use http::{Method, StatusCode};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::authentication::Authenticator;
use super::config::CaConfig;
use super::folder::FolderError;
use super::log;
use super::metrics::Metrics;
use super::server::Server;
use super::service::Service;
use super::serving_cert::ServingCertResolver;
use super::state::CaState;
use super::token::{KeyFileError, TokenAuthenticator};

/// How often the folder and the key file are read again.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// Why the authority cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log, the signal handlers or the runtime cannot be set up.
    #[error("cannot {what}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A port is in use, or may not be opened.
    #[error("cannot listen on {address} for {what}")]
    Listen {
        /// What the port is for.
        what: &'static str,
        /// Its address.
        address: SocketAddr,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The authority's files cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The keys that verify tokens cannot be used.
    #[error("cannot load the keys that verify tokens")]
    Keys(#[source] KeyFileError),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The metrics cannot be set up.
    #[error("the metrics cannot be set up")]
    Metrics(#[source] prometheus::Error),
}

/// A running authority.
#[derive(Debug)]
pub struct Running {
    /// Address of the service.
    pub address: SocketAddr,
    /// Address of the metrics.
    pub metrics: SocketAddr,
    /// Address of the readiness page.
    pub readiness: SocketAddr,
    stop: CancellationToken,
    server: JoinSet<()>,
    background: JoinSet<()>,
}

impl Running {
    /// Accepts no further requests, waits for the open ones until the termination deadline, and
    /// stops everything else.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while self.server.join_next().await.is_some() {}
        self.background.shutdown().await;
    }

    /// Waits until a task ends, which none does before a stop.
    async fn first_end(&mut self) {
        tokio::select! {
            Some(_) = self.server.join_next() => {}
            Some(_) = self.background.join_next() => {}
        }
    }
}

/// Runs the authority until SIGTERM or SIGINT.
///
/// # Errors
/// Fails if the authority cannot start.
pub fn run(config: &CaConfig) -> Result<(), Error> {
    let system = |what| move |source| Error::System { what, source };
    let _log_guard = log::install(&config.log).map_err(system("start the log"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(system("start a runtime"))?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(system("catch SIGTERM"))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(system("catch SIGINT"))?;
        let mut running = start(config, Arc::new(SystemTime::now)).await?;
        tracing::info!(address = %running.address, "serving");
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
            () = running.first_end() => tracing::error!("a task ended unexpectedly: stopping"),
        }
        running.stop().await;
        tracing::info!("stopped");
        Ok(())
    });
    outcome.inspect_err(|error| tracing::error!(error = %ErrorChain(error), "cannot start"))
}

/// Opens the folder and the ports, and serves.
///
/// # Errors
/// Fails if a folder, a file or a port cannot be used.
pub async fn start(config: &CaConfig, clock: mesh::certs::Clock) -> Result<Running, Error> {
    let authenticator =
        TokenAuthenticator::open(&config.token_key, &config.audience).map_err(Error::Keys)?;
    let reloader = Reloader {
        state: Arc::new(CaState::open(&config.dir, &config.state_dir, clock)?),
        serving_cert: ServingCertResolver::new(config.names.clone()),
        authenticator: Arc::new(authenticator),
        metrics: Metrics::new().map_err(Error::Metrics)?,
    };
    let tls = reloader.serving_cert.tls_config().map_err(Error::Tls)?;
    reloader.reload_state();
    let service = Service::new(
        reloader.state.clone(),
        reloader.authenticator.clone() as Arc<dyn Authenticator>,
        config.trust_domain.clone(),
        config.ttl_limits,
        reloader.metrics.clone(),
    );
    let listener = listen("the service", config.listen).await?;
    let metrics = listen_admin("metrics", config.metrics).await?;
    let readiness = listen_admin("readiness", config.readiness).await?;

    let stop = CancellationToken::new();
    let mut running = Running {
        address: listener.local_addr().unwrap_or(config.listen),
        metrics: metrics.local_addr().unwrap_or(config.metrics),
        readiness: readiness.local_addr().unwrap_or(config.readiness),
        stop: stop.clone(),
        server: JoinSet::new(),
        background: JoinSet::new(),
    };
    let server = Server::new(tls, service, reloader.metrics.clone());
    let metrics_page = metrics_page(reloader.metrics.clone());
    let readiness_page = readiness_page(
        reloader.state.clone(),
        reloader.serving_cert.clone(),
        stop.clone(),
    );
    // Both pages are served during the drain; `Running::stop` then aborts them.
    let never = CancellationToken::new();
    let background = &mut running.background;
    background.spawn(reloader.run());
    background.spawn(admin::serve(metrics, never.clone(), metrics_page));
    background.spawn(admin::serve(readiness, never, readiness_page));
    running
        .server
        .spawn(server.serve(listener, stop, config.termination_deadline));
    Ok(running)
}

fn metrics_page(metrics: Metrics) -> impl Fn(Request) -> Ready<Response> + Send + Sync {
    move |request: Request| {
        ready(match (request.path.as_str(), &request.method) {
            ("/metrics", &Method::GET) => admin::metrics(metrics.scrape()),
            ("/metrics", _) => admin::method_not_allowed("GET"),
            _ => admin::not_found(),
        })
    }
}

fn readiness_page(
    state: Arc<CaState>,
    serving_cert: Arc<ServingCertResolver>,
    stop: CancellationToken,
) -> impl Fn(Request) -> Ready<Response> + Send + Sync {
    let respond = move || {
        let problem = if stop.is_cancelled() {
            "the authority is stopping\n"
        } else if !serving_cert.is_ready() {
            "the service has no certificate\n"
        } else if state.signing_authority().not_after() <= state.now() {
            "the authority's own certificate has expired\n"
        } else {
            return admin::text(StatusCode::OK, "ready\n");
        };
        admin::text(StatusCode::SERVICE_UNAVAILABLE, problem)
    };
    move |request: Request| {
        ready(match (request.path.as_str(), &request.method) {
            ("/ready" | "/healthz/ready", &Method::GET) => respond(),
            ("/ready" | "/healthz/ready", _) => admin::method_not_allowed("GET"),
            _ => admin::not_found(),
        })
    }
}

/// Follows changes of files and the passing of time.
struct Reloader {
    state: Arc<CaState>,
    serving_cert: Arc<ServingCertResolver>,
    authenticator: Arc<TokenAuthenticator>,
    metrics: Metrics,
}

impl Reloader {
    async fn run(self) {
        let mut ticks = interval(RELOAD_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_key_error = LastError::default();
        loop {
            ticks.tick().await;
            self.reload_state();
            let reloaded = self.authenticator.reload();
            let error = reloaded.as_ref().err();
            if let Some(error) = last_key_error.record(error.map(|error| error as _)) {
                tracing::warn!(
                    error,
                    "keeping the previous token keys: the new file could not be read"
                );
            }
        }
    }

    fn reload_state(&self) {
        self.state.reload();
        self.serving_cert.renew(&self.state);
        self.metrics.set_status(&self.state.status());
    }
}

/// On a machine without IPv6, `[::]` means `0.0.0.0`.
async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let listener = match TcpListener::bind(address).await {
        Err(error) if address.is_ipv6() && address.ip().is_unspecified() => {
            let any_ipv4 = (Ipv4Addr::UNSPECIFIED, address.port());
            TcpListener::bind(any_ipv4).await.map_err(|_| error)
        }
        listener => listener,
    };
    listener.map_err(|source| Error::Listen {
        what,
        address,
        source,
    })
}

async fn listen_admin(
    what: &'static str,
    address: SocketAddr,
) -> Result<std::net::TcpListener, Error> {
    let listener = listen(what, address).await?;
    listener.into_std().map_err(|source| Error::Listen {
        what,
        address,
        source,
    })
}
