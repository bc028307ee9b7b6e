//! The HTTP endpoints for operators: config dump, log levels and shutdown; metrics.
//!
//! - 15000, loopback only: `GET /`, `GET /config_dump`, `POST /logging`, `POST /quitquitquit`;
//! - 15020: `GET /metrics` and `GET /stats/prometheus`.
//!
//! A data-plane thread serves 15021, see [`crate::readiness`].

mod dump;

use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use component::ErrorChain;
use component::admin::{self, Request, Response, method_not_allowed, not_found, response, text};
use http::{Method, StatusCode};
use mesh::{Store, WorkloadUid};
use tokio_util::sync::CancellationToken;

use crate::dataplane::DataPlane;
use crate::identity::Identities;
use crate::telemetry::{Log, Telemetry};

/// The enrolment state of a pod of this node.
#[derive(Clone, Debug)]
pub struct WorkloadState {
    /// The pod.
    pub uid: WorkloadUid,
    /// The verified state, such as `enrolled` or `pending`.
    pub state: &'static str,
    /// The reason for the state, if it needs one.
    pub reason: Option<String>,
    /// When it entered the state.
    pub since: SystemTime,
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Service account of the pod.
    pub service_account: String,
    /// Trust domain of its identity.
    pub trust_domain: String,
}

/// What the admin endpoints show and change.
pub struct Admin {
    /// The model.
    pub store: Store,
    /// The open connections.
    pub data_plane: Arc<DataPlane>,
    /// The certificates.
    pub identities: Identities,
    /// The log levels.
    pub log: Log,
    /// Returns the pods of this node.
    pub workloads: Box<dyn Fn() -> Vec<WorkloadState>>,
    /// The configuration in force, as JSON.
    pub config: serde_json::Value,
    /// Starts a graceful shutdown of the daemon.
    pub quit: CancellationToken,
}

/// Serves the admin port until stopped. Runs in a `LocalSet`.
///
/// The listener must be bound to a loopback address: there is no other access control.
pub async fn serve(listener: TcpListener, admin: Admin, stop: CancellationToken) {
    let admin = Rc::new(admin);
    admin::serve(listener, stop, move |request| {
        let admin = admin.clone();
        async move { admin.respond(&request) }
    })
    .await;
}

/// Serves the metrics port until stopped. Runs in a `LocalSet`.
pub async fn serve_metrics(
    listener: TcpListener,
    telemetry: Arc<Telemetry>,
    stop: CancellationToken,
) {
    admin::serve(listener, stop, move |request| {
        let telemetry = telemetry.clone();
        async move { respond_metrics(&request, &telemetry) }
    })
    .await;
}

fn respond_metrics(request: &Request, telemetry: &Telemetry) -> Response {
    match (request.path.as_str(), &request.method) {
        ("/metrics" | "/stats/prometheus", &Method::GET) => match telemetry.scrape() {
            Ok(metrics) => admin::metrics(metrics),
            Err(error) => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("{}\n", ErrorChain(&error)),
            ),
        },
        ("/metrics" | "/stats/prometheus", _) => method_not_allowed("GET"),
        _ => not_found(),
    }
}

const INDEX: &str = "\
GET  /config_dump        the model, the certificates, and the pods of this node with their connections
POST /logging            the log levels; ?level=info,hbone=debug to change, ?reset to restore
POST /quitquitquit       drain and exit
";

impl Admin {
    fn respond(&self, request: &Request) -> Response {
        match (request.path.as_str(), &request.method) {
            ("/", &Method::GET) => text(StatusCode::OK, INDEX),
            ("/config_dump", &Method::GET) => match serde_json::to_vec_pretty(&self.dump()) {
                Ok(dump) => response(StatusCode::OK, "application/json", dump),
                Err(error) => text(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    format!("{}\n", ErrorChain(&error)),
                ),
            },
            ("/logging", &Method::POST) => self.respond_logging(request),
            ("/quitquitquit", &Method::POST) => {
                tracing::info!("shutdown requested on the admin port");
                self.quit.cancel();
                text(StatusCode::OK, "shutdown now\n")
            }
            ("/" | "/config_dump", _) => method_not_allowed("GET"),
            ("/logging" | "/quitquitquit", _) => method_not_allowed("POST"),
            _ => not_found(),
        }
    }

    fn respond_logging(&self, request: &Request) -> Response {
        let (reset, level) = (request.query_param("reset"), request.query_param("level"));
        if reset.is_none() && level.is_none() {
            return text(
                StatusCode::OK,
                format!("current log level is {}\n", self.log.filter()),
            );
        }
        match self.log.set_filter(level.as_deref()) {
            Ok(now) => {
                tracing::info!(level = %now, "log levels changed on the admin port");
                text(StatusCode::OK, format!("current log level is {now}\n"))
            }
            Err(error) => text(StatusCode::BAD_REQUEST, format!("{}\n", ErrorChain(&error))),
        }
    }
}
