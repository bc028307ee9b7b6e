//! Start, run and stop.

use std::future::{Ready, ready};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use component::ErrorChain;
use component::admin::{self, Request, Response};
use http::{Method, StatusCode};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::authenticate::Authenticator;
use super::config::CaConfig;
use super::folder::FolderError;
use super::keeper::Keeper;
use super::log;
use super::metrics::Metrics;
use super::server::Server;
use super::service::Service;
use super::serving::Serving;
use super::token::{KeyFileError, SignedTokens};

/// How often folders and key files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Why the authority cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log, the signals or the runtime are not to be had.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A port is taken or not ours to open.
    #[error("cannot listen on {address} for {what}")]
    Listen {
        /// What would have been served.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The authority's files cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The keys that tokens are checked with cannot be used.
    #[error("callers cannot be recognised")]
    Keys(#[source] KeyFileError),
    /// TLS cannot be set up.
    #[error("TLS cannot be set up")]
    Tls(#[source] rustls::Error),
    /// The metrics cannot be set up.
    #[error("the metrics cannot be set up")]
    Metrics(#[source] prometheus::Error),
}

/// An authority that is serving.
#[derive(Debug)]
pub struct Running {
    /// Where the service listens.
    pub address: SocketAddr,
    /// Where the metrics are.
    pub metrics: SocketAddr,
    /// Where the readiness page is.
    pub readiness: SocketAddr,
    stop: CancellationToken,
    serving: JoinSet<()>,
    looking: JoinSet<()>,
}

impl Running {
    /// Stops taking requests, lets those that have begun end, and then stops the rest.
    pub async fn stop(mut self) {
        self.stop.cancel();
        while self.serving.join_next().await.is_some() {}
        self.looking.shutdown().await;
    }

    /// Ends only if a part of it does, which none should.
    async fn ended(&mut self) {
        tokio::select! {
            Some(_) = self.serving.join_next() => {}
            Some(_) = self.looking.join_next() => {}
        }
    }
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Fails if the authority cannot start.
pub fn run(config: &CaConfig) -> Result<(), Error> {
    let system = |what| move |source| Error::System { what, source };
    let _written = log::install(&config.log).map_err(system("start the log"))?;
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
            () = running.ended() => tracing::error!("a part of the authority has ended"),
        }
        running.stop().await;
        tracing::info!("stopped");
        Ok(())
    });
    outcome.inspect_err(|error| tracing::error!(error = %ErrorChain(error), "cannot start"))
}

/// Opens the folder and the ports, and serves from there on.
///
/// # Errors
/// Fails if one of them cannot be used.
pub async fn start(config: &CaConfig, clock: mesh::certs::Clock) -> Result<Running, Error> {
    let tokens = SignedTokens::open(&config.token_key, &config.audience).map_err(Error::Keys)?;
    let tokens = Arc::new(tokens);
    let keeper = Arc::new(Keeper::open(&config.dir, &config.state_dir, clock)?);
    let metrics = Metrics::new().map_err(Error::Metrics)?;
    let serving = Serving::new(config.names.clone());
    let tls = serving.tls().map_err(Error::Tls)?;
    let looks = Looks {
        keeper: keeper.clone(),
        serving: serving.clone(),
        tokens: tokens.clone(),
        metrics: metrics.clone(),
    };
    looks.once();
    let service = Service::new(
        keeper.clone(),
        tokens as Arc<dyn Authenticator>,
        config.trust_domain.clone(),
        config.limits,
        metrics.clone(),
    );
    let listener = listen("the service", config.listen).await?;
    let stats = listen_admin("metrics", config.metrics).await?;
    let readiness = listen_admin("readiness", config.readiness).await?;

    let stop = CancellationToken::new();
    let mut running = Running {
        address: listener.local_addr().unwrap_or(config.listen),
        metrics: stats.local_addr().unwrap_or(config.metrics),
        readiness: readiness.local_addr().unwrap_or(config.readiness),
        stop: stop.clone(),
        serving: JoinSet::new(),
        looking: JoinSet::new(),
    };
    running.looking.spawn(looks.forever());
    let metrics_page = metrics_page(metrics.clone());
    let readiness_page = readiness_page(keeper, serving, stop.clone());
    // The pages are served until the end of a drain, and then aborted.
    let until_aborted = CancellationToken::new();
    running
        .looking
        .spawn(admin::serve(stats, until_aborted.clone(), metrics_page));
    running
        .looking
        .spawn(admin::serve(readiness, until_aborted, readiness_page));
    let server = Server::new(tls, service, metrics);
    running
        .serving
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
    keeper: Arc<Keeper>,
    serving: Arc<Serving>,
    stop: CancellationToken,
) -> impl Fn(Request) -> Ready<Response> + Send + Sync {
    let respond = move || {
        let problem = if stop.is_cancelled() {
            "the authority is stopping\n"
        } else if !serving.ready() {
            "the service has no certificate to show\n"
        } else if keeper.signing().not_after() <= keeper.now() {
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

/// What is looked at again and again.
struct Looks {
    keeper: Arc<Keeper>,
    serving: Arc<Serving>,
    tokens: Arc<SignedTokens>,
    metrics: Metrics,
}

impl Looks {
    fn once(&self) {
        self.keeper.look();
        self.serving.look(&self.keeper);
        self.metrics.standing(&self.keeper.standing());
    }

    async fn forever(self) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut complaint = None;
        loop {
            ticks.tick().await;
            self.once();
            let complains = self
                .tokens
                .look()
                .err()
                .map(|error| ErrorChain(&error).to_string());
            if let Some(error) = complains.as_ref().filter(|_| complains != complaint) {
                tracing::warn!(error, "the keys of before go on checking tokens");
            }
            complaint = complains;
        }
    }
}

/// On a machine without IPv6, "any address" means any of IPv4.
async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let bound = match TcpListener::bind(address).await {
        Err(error) if address.is_ipv6() && address.ip().is_unspecified() => {
            let v4 = TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await;
            v4.map_err(|_| error)
        }
        bound => bound,
    };
    bound.map_err(|source| Error::Listen {
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
