//! Connections: TLS, HTTP/2, and a limit for everything that one of them may take.

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
use super::service::{Peer, Service};

/// One per node, and some that are being replaced. More wait in the backlog.
const CONNECTIONS: usize = 4096;
/// For TLS, and then for the first answer that is not a refusal: whoever cannot prove who it is does
/// not keep a place.
const HANDSHAKE: Duration = Duration::from_secs(5);
const FIRST_REQUEST: Duration = Duration::from_secs(15);
/// For reading a request and answering it. More than the service takes, which then says why.
const REQUEST: Duration = Duration::from_secs(10);
/// A connection takes no more requests after this, so that callers spread over several authorities
/// again.
const AGE: Duration = Duration::from_secs(3600);
/// For what is open then: more than a request takes, and what is left is an answer that nobody reads.
const LAST: Duration = Duration::from_secs(15);
/// A peer that vanished without a word is noticed after these two.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(10);
/// Requests of one connection at a time; callers wait with more, which are worked on no sooner. Not
/// below the 100 that clients begin with before they are told: those would be refused.
const STREAMS: u32 = 128;
/// And before one of them was granted: others are not even read.
const STREAMS_UNKNOWN: usize = 8;
/// The head of a request holds a token, its body a certificate signing request.
const HEAD_MOST: u32 = 32 * 1024;
const REQUEST_MOST: usize = 32 * 1024;
const WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// After a failed `accept`, so that a process out of descriptors does not spin.
const PAUSE: Duration = Duration::from_millis(100);

type Grpc = IstioCertificateServiceServer<Service>;

/// What every connection needs.
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
            grpc: Grpc::new(service).max_decoding_message_size(REQUEST_MOST),
            metrics,
            streams: TaskTracker::new(),
        }
    }

    /// Serves until stopped; then lets what has begun end, for as long as the deadline.
    pub(super) async fn serve(
        self,
        listener: TcpListener,
        stop: CancellationToken,
        deadline: Duration,
    ) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                    Ok((stream, peer)) => {
                        connections.spawn(self.clone().connection(stream, peer, stop.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        sleep(PAUSE).await;
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
            tracing::warn!("requests were open at the end of the drain");
        }
        connections.shutdown().await;
    }

    async fn connection(self, stream: TcpStream, peer: SocketAddr, stop: CancellationToken) {
        // It only makes answers wait for each other.
        let _ = stream.set_nodelay(true);
        let Ok(Ok(stream)) = timeout(HANDSHAKE, self.tls.accept(stream)).await else {
            self.metrics.handshakes_failed.inc();
            tracing::debug!(%peer, "no TLS was established");
            return;
        };
        self.metrics.connections.inc();
        let gauge = self.metrics.connections.clone();
        self.requests(TokioIo::new(stream), peer, stop).await;
        gauge.dec();
    }

    /// Answers what comes on one connection.
    pub(super) async fn requests<I>(self, io: I, peer: SocketAddr, stop: CancellationToken)
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin,
    {
        let caller = Arc::new(Caller::new(peer));
        let (grpc, metrics, known) = (self.grpc.clone(), self.metrics.clone(), caller.clone());
        let service = service_fn(move |request| {
            answered(grpc.clone(), request, known.clone(), metrics.clone())
        });
        let connection = builder(self.streams).serve_connection(io, service);
        let mut connection = pin!(connection);
        let (mut first, mut age) = (pin!(sleep(FIRST_REQUEST)), pin!(sleep(AGE)));
        let mut last = pin!(sleep(AGE + LAST));
        let (mut waiting, mut open) = (true, true);
        loop {
            tokio::select! {
                // A peer that breaks the protocol, or goes away, has lost only its own connection.
                _ = connection.as_mut() => return,
                () = last.as_mut() => {
                    tracing::debug!(%peer, "answers were not read");
                    return;
                }
                () = stop.cancelled(), if open => open = false,
                () = age.as_mut(), if open => open = false,
                () = first.as_mut(), if waiting => {
                    waiting = false;
                    if !caller.is_known() {
                        tracing::debug!(%peer, "nothing was asked, or nothing allowed");
                        return;
                    }
                    continue;
                }
            }
            connection.as_mut().graceful_shutdown();
            last.as_mut().reset(Instant::now() + LAST);
        }
    }
}

/// Whoever is at the other end of a connection.
struct Caller {
    peer: SocketAddr,
    known: AtomicBool,
    /// Places for requests.
    places: Semaphore,
}

impl Caller {
    fn new(peer: SocketAddr) -> Self {
        Self {
            peer,
            known: AtomicBool::new(false),
            places: Semaphore::new(STREAMS_UNKNOWN),
        }
    }

    fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// Something is granted.
    fn grant(&self) {
        if !self.known.swap(true, Ordering::Relaxed) {
            self.places.add_permits(STREAMS as usize - STREAMS_UNKNOWN);
        }
    }
}

/// Streams of all connections in one place, to be waited for at the end. Each ends with its answer,
/// for which there is a deadline, or with its connection.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F> Executor<F> for Tracked
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, stream: F) {
        self.0.spawn(stream);
    }
}

fn builder(streams: TaskTracker) -> http2::Builder<Tracked> {
    let mut builder = http2::Builder::new(Tracked(streams));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEAD_MOST)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    builder
}

/// Answers, and counts what never reached the service because it could not be read.
async fn answered(
    mut grpc: Grpc,
    mut request: Request<Incoming>,
    caller: Arc<Caller>,
    metrics: Metrics,
) -> Result<Response<tonic::body::Body>, Infallible> {
    let peer = caller.peer;
    request.extensions_mut().insert(Peer(peer));
    let answer = async {
        let _place = caller.places.acquire().await;
        grpc.call(request).await
    };
    let refused = |reason| {
        metrics.refused(reason);
        tracing::info!(target: "access", outcome = "refused", reason, %peer);
    };
    let Ok(response) = timeout(REQUEST, answer).await else {
        let message = format!("the request was not there within {REQUEST:?}");
        let refusal = Refusal::new("request_too_slow", Code::DeadlineExceeded, message);
        refused(refusal.reason);
        return Ok(Status::from(&refusal).into_http());
    };
    let response = response?;
    match response.headers().get("grpc-status") {
        // Only an answer that holds a certificate has its status at the end.
        None => caller.grant(),
        Some(status) => {
            if let Some(reason) = unread(Code::from_bytes(status.as_bytes())) {
                refused(reason);
            }
        }
    }
    Ok(response)
}

/// Codes that the service itself never answers with.
fn unread(code: Code) -> Option<&'static str> {
    match code {
        Code::OutOfRange => Some("request_too_large"),
        Code::Unimplemented => Some("unknown_method"),
        Code::Internal | Code::Unknown => Some("request_garbled"),
        _ => None,
    }
}
