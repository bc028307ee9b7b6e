//! What may one connection take? TLS, HTTP/2, and a bound for every wait, size and count.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh::certs::istio_ca::proto::istio_certificate_service_server::IstioCertificateServiceServer;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codegen::Service as _;
use tonic::{Code, Status};

use super::metrics::Metrics;
use super::refusal::Refusal;
use super::service::{PeerAddr, Service};

/// One per node, and some that are being replaced. Others wait in the listen backlog.
const MAX_CONNECTIONS: usize = 4096;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Until the first request of a connection is granted. A peer that cannot authenticate does not
/// occupy a connection for longer.
const FIRST_GRANT_TIMEOUT: Duration = Duration::from_secs(15);
/// Until a request is read and answered. Longer than the service's own deadline, which gives a better
/// reason.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// After this a connection takes no further requests, so that callers spread over several authorities
/// again.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(3600);
/// For the requests that are open at [`MAX_CONNECTION_AGE`]. Longer than a request takes: what is left
/// then is a response that the peer does not read.
const LAST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);
/// HTTP/2 pings detect a vanished peer after the sum of both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Concurrent requests of one connection. Not below 100, which clients assume before the server's
/// settings arrive: streams above the limit would be refused.
const MAX_STREAMS: u32 = 128;
/// Concurrent requests of one connection before one was granted. Further ones are not even read.
const MAX_STREAMS_BEFORE_GRANT: usize = 8;
/// The head of a request holds a token.
const MAX_HEAD_BYTES: u32 = 32 * 1024;
/// The body of a request holds a certificate signing request.
const MAX_REQUEST_BYTES: usize = 32 * 1024;
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Pause after a failed `accept`, so that a process out of file descriptors does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

type Grpc = IstioCertificateServiceServer<Service>;

/// Accepts connections and serves the gRPC service on them.
#[derive(Clone)]
pub(super) struct Server {
    tls: TlsAcceptor,
    grpc: Grpc,
    metrics: Metrics,
    streams: TaskTracker,
}

impl Server {
    pub(super) fn new(tls: Arc<ServerConfig>, service: Service, metrics: Metrics) -> Self {
        Self {
            tls: TlsAcceptor::from(tls),
            grpc: Grpc::new(service).max_decoding_message_size(MAX_REQUEST_BYTES),
            metrics,
            streams: TaskTracker::new(),
        }
    }

    /// Serves until `stop` is cancelled, then waits for open requests until the deadline.
    pub(super) async fn serve(
        self,
        listener: TcpListener,
        stop: CancellationToken,
        deadline: Duration,
    ) {
        let mut connections = JoinSet::new();
        loop {
            let has_room = connections.len() < MAX_CONNECTIONS;
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if has_room => match accepted {
                    Ok((stream, peer)) => {
                        let server = self.clone();
                        connections.spawn(server.serve_tcp(stream, peer, stop.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        sleep(ACCEPT_BACKOFF).await;
                    }
                },
            }
        }
        drop(listener);
        self.streams.close();
        let drained = async {
            while connections.join_next().await.is_some() {}
            self.streams.wait().await;
        };
        if timeout(deadline, drained).await.is_err() {
            tracing::warn!("requests were open at the termination deadline");
        }
        connections.shutdown().await;
    }

    async fn serve_tcp(self, stream: TcpStream, peer: SocketAddr, stop: CancellationToken) {
        // Without it responses may be delayed; an error has no other effect.
        let _ = stream.set_nodelay(true);
        let Ok(Ok(stream)) = timeout(HANDSHAKE_TIMEOUT, self.tls.accept(stream)).await else {
            self.metrics.handshakes_failed.inc();
            tracing::debug!(%peer, "TLS handshake failed");
            return;
        };
        self.metrics.connections.inc();
        let gauge = self.metrics.connections.clone();
        self.serve_http2(TokioIo::new(stream), peer, stop).await;
        gauge.dec();
    }

    /// Serves the requests of one connection.
    pub(super) async fn serve_http2<I>(self, io: I, peer: SocketAddr, stop: CancellationToken)
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin,
    {
        let state = Arc::new(ConnectionState::new(peer));
        let (grpc, metrics, shared) = (self.grpc.clone(), self.metrics.clone(), state.clone());
        let service = service_fn(move |request| {
            serve_request(grpc.clone(), request, shared.clone(), metrics.clone())
        });
        let connection = http2_builder(self.streams).serve_connection(io, service);
        let mut connection = pin!(connection);
        let mut first_grant = pin!(sleep(FIRST_GRANT_TIMEOUT));
        let mut max_age = pin!(sleep(MAX_CONNECTION_AGE));
        let mut last_response = pin!(sleep(MAX_CONNECTION_AGE + LAST_RESPONSE_TIMEOUT));
        let (mut awaits_grant, mut is_open) = (true, true);
        loop {
            tokio::select! {
                // A peer that violates the protocol or disconnects affects its own connection only.
                _ = connection.as_mut() => return,
                () = last_response.as_mut() => {
                    tracing::debug!(%peer, "closing: the peer does not read its responses");
                    return;
                }
                () = stop.cancelled(), if is_open => is_open = false,
                () = max_age.as_mut(), if is_open => is_open = false,
                () = first_grant.as_mut(), if awaits_grant => {
                    awaits_grant = false;
                    if !state.has_grant() {
                        tracing::debug!(%peer, "closing: no request was granted");
                        return;
                    }
                    continue;
                }
            }
            connection.as_mut().graceful_shutdown();
            last_response
                .as_mut()
                .reset(Instant::now() + LAST_RESPONSE_TIMEOUT);
        }
    }
}

/// What the requests of one connection share.
struct ConnectionState {
    peer: SocketAddr,
    has_grant: AtomicBool,
    /// Permits for requests.
    requests: Semaphore,
}

impl ConnectionState {
    fn new(peer: SocketAddr) -> Self {
        Self {
            peer,
            has_grant: AtomicBool::new(false),
            requests: Semaphore::new(MAX_STREAMS_BEFORE_GRANT),
        }
    }

    fn has_grant(&self) -> bool {
        self.has_grant.load(Ordering::Relaxed)
    }

    /// The first granted request raises the limit of concurrent requests.
    fn record_grant(&self) {
        if !self.has_grant.swap(true, Ordering::Relaxed) {
            self.requests
                .add_permits(MAX_STREAMS as usize - MAX_STREAMS_BEFORE_GRANT);
        }
    }
}

/// Tracks the streams of all connections, for the drain. A stream ends with its response, which has a
/// deadline, or with its connection.
#[derive(Clone)]
struct TrackedExecutor(TaskTracker);

impl<F> Executor<F> for TrackedExecutor
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}

fn http2_builder(streams: TaskTracker) -> http2::Builder<TrackedExecutor> {
    let mut builder = http2::Builder::new(TrackedExecutor(streams));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT);
    builder
}

/// Serves a request. Logs and counts those that fail before they reach the service.
async fn serve_request(
    mut grpc: Grpc,
    mut request: Request<Incoming>,
    connection: Arc<ConnectionState>,
    metrics: Metrics,
) -> Result<Response<tonic::body::Body>, Infallible> {
    let peer = connection.peer;
    request.extensions_mut().insert(PeerAddr(peer));
    let response = async {
        let _permit = connection.requests.acquire().await;
        grpc.call(request).await
    };
    let record_refusal = |reason| {
        metrics.record_refusal(reason);
        tracing::info!(target: "access", outcome = "refused", reason, %peer);
    };
    let Ok(response) = timeout(REQUEST_TIMEOUT, response).await else {
        let message = format!("the request did not arrive within {REQUEST_TIMEOUT:?}");
        let refusal = Refusal::new("request_too_slow", Code::DeadlineExceeded, message);
        record_refusal(refusal.reason);
        return Ok(Status::from(&refusal).into_http());
    };
    let response = response?;
    match response.headers().get("grpc-status") {
        // Only a response with a certificate has its status in the trailers.
        None => connection.record_grant(),
        Some(status) => {
            if let Some(reason) = unread_reason(Code::from_bytes(status.as_bytes())) {
                record_refusal(reason);
            }
        }
    }
    Ok(response)
}

/// The reason for a status that tonic gives to a request before the service sees it. The service
/// itself uses none of these codes.
fn unread_reason(code: Code) -> Option<&'static str> {
    match code {
        Code::OutOfRange => Some("request_too_large"),
        Code::Unimplemented => Some("unknown_method"),
        Code::Internal | Code::Unknown => Some("request_garbled"),
        _ => None,
    }
}
