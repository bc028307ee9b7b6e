//! What the operator asks the daemon: its state on loopback, its metrics, whether it is ready.
//!
//! - 15000, loopback only: `GET /`, `GET /config_dump`, `POST /logging`, `POST /quitquitquit`;
//! - 15020: `GET /metrics` and `GET /stats/prometheus`;
//! - 15021: `GET /healthz/ready`, see [`readiness`].

mod dump;
pub mod readiness;

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

/// A pod of this node as enrolment sees it.
#[derive(Clone, Debug)]
pub struct WorkloadState {
    /// The pod.
    pub uid: WorkloadUid,
    /// The verified state, such as `enrolled` or `pending`.
    pub state: &'static str,
    /// Why it is in that state, if there is more to say than the state does.
    pub reason: Option<String>,
    /// Since when it is in that state.
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

/// What the admin pages show and do.
pub struct Admin {
    /// The mesh as this daemon knows it.
    pub store: Store,
    /// Whose connections are listed.
    pub data_plane: Arc<DataPlane>,
    /// Whose certificates are listed.
    pub identities: Identities,
    /// Whose levels can be changed.
    pub log: Log,
    /// Answers with the pods of this node.
    pub workloads: Box<dyn Fn() -> Vec<WorkloadState>>,
    /// The configuration in force, as it is shown.
    pub config: serde_json::Value,
    /// Ends the daemon in good order.
    pub quit: CancellationToken,
}

/// Serves the admin port until stopped. Runs in a `LocalSet`. The listener has to be a loopback
/// one: there is no other check of who asks.
pub async fn serve(listener: TcpListener, admin: Admin, stop: CancellationToken) {
    let admin = Rc::new(admin);
    admin::serve(listener, stop, move |request| {
        let admin = admin.clone();
        async move { admin.respond(&request) }
    })
    .await;
}

/// Serves the metrics port until stopped. Runs in a `LocalSet`.
pub async fn serve_stats(
    listener: TcpListener,
    telemetry: Arc<Telemetry>,
    stop: CancellationToken,
) {
    admin::serve(listener, stop, move |request| {
        let telemetry = telemetry.clone();
        async move { stats(&request, &telemetry) }
    })
    .await;
}

fn stats(request: &Request, telemetry: &Telemetry) -> Response {
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
GET  /config_dump        what the mesh looks like from here, and the pods of this node
POST /logging            the log levels; ?level=info,hbone=debug to change, ?reset to return
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
            ("/logging", &Method::POST) => self.logging(request),
            ("/quitquitquit", &Method::POST) => {
                tracing::info!("asked to quit on the admin port");
                self.quit.cancel();
                text(StatusCode::OK, "shutdown now\n")
            }
            ("/" | "/config_dump", _) => method_not_allowed("GET"),
            ("/logging" | "/quitquitquit", _) => method_not_allowed("POST"),
            _ => not_found(),
        }
    }

    fn logging(&self, request: &Request) -> Response {
        let (reset, level) = (request.query_param("reset"), request.query_param("level"));
        if reset.is_none() && level.is_none() {
            return text(
                StatusCode::OK,
                format!("current log level is {}\n", self.log.filter()),
            );
        }
        match self.log.set(level.as_deref()) {
            Ok(now) => {
                tracing::info!(level = %now, "the log levels were changed on the admin port");
                text(StatusCode::OK, format!("current log level is {now}\n"))
            }
            Err(error) => text(StatusCode::BAD_REQUEST, format!("{}\n", ErrorChain(&error))),
        }
    }
}
