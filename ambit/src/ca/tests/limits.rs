//! The bounds of one connection, in virtual time.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Uri, header};
use hyper::body::{Body as _, Frame, Incoming};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh::certs::istio_ca::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;

use super::super::server::Server;
use super::super::service::Service;
use super::super::serving_cert::ServingCertResolver;
use super::super::*;
use super::fixture::*;

const SERVICE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// A client connection to an authority.
struct Connection {
    _folder: TempDir,
    signer: TokenSigner,
    requests: SendRequest<Body>,
    metrics: Metrics,
    /// Ends with the connection.
    server_task: JoinSet<()>,
    _client_task: JoinSet<()>,
}

impl Connection {
    async fn open(window: Option<u32>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        create_keys(&path("token.key"), &path("token.pub")).unwrap();
        let authenticator = TokenAuthenticator::open(&path("token.pub"), "istio-ca").unwrap();
        let state = CaState::open(&path("ca"), &path("state"), Arc::new(SystemTime::now)).unwrap();
        let metrics = Metrics::new().unwrap();
        let service = Service::new(
            Arc::new(state),
            Arc::new(authenticator),
            "cluster.local".parse().unwrap(),
            TTL_LIMITS,
            metrics.clone(),
        );
        let tls = ServingCertResolver::new(Vec::new()).tls_config().unwrap();
        let server = Server::new(tls, service, metrics.clone());
        let (client_io, server_io) = tokio::io::duplex(64 * 1024);
        let peer = "192.0.2.1:1".parse().unwrap();
        let stop = CancellationToken::new();
        let mut server_task = JoinSet::new();
        server_task.spawn(server.serve_http2(TokioIo::new(server_io), peer, stop));
        let mut client = http2::Builder::new(TokioExecutor::new());
        client.initial_stream_window_size(window);
        let (requests, connection) = client.handshake(TokioIo::new(client_io)).await.unwrap();
        let mut client_task = JoinSet::new();
        client_task.spawn(async move { drop(connection.await) });
        Self {
            signer: TokenSigner::open(&path("token.key")).unwrap(),
            _folder: folder,
            requests,
            metrics,
            server_task,
            _client_task: client_task,
        }
    }

    async fn issue(&self) -> Result<Vec<String>, Status> {
        let token = token(&self.signer);
        let call = Call {
            token: Some(&token),
            identity: Some(WEB),
            ..Call::default()
        };
        let origin = Uri::from_static("http://ca");
        let sender = RequestSender(self.requests.clone());
        let mut client = IstioCertificateServiceClient::with_origin(sender, origin);
        let response = client.create_certificate(request(call)).await?;
        Ok(response.into_inner().cert_chain)
    }

    /// Sends a request whose body never arrives. Returns its gRPC status, and after how long.
    fn send_stalled(&self) -> impl Future<Output = (String, Duration)> + use<> {
        let request = http::Request::post(format!("http://ca{SERVICE}"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .body(Body::new(PendingBody))
            .unwrap();
        let response = self.requests.clone().send_request(request);
        let start = Instant::now();
        async move {
            let response = response.await.unwrap();
            let status = response.headers()["grpc-status"].to_str().unwrap();
            (status.to_owned(), start.elapsed())
        }
    }

    fn has_refused(&self, reason: &str, times: u32) -> bool {
        let counter = format!("ambit_ca_refused_total{{reason=\"{reason}\"}} {times}");
        self.metrics.scrape().contains(&counter)
    }
}

/// A body that never yields a frame.
struct PendingBody;

impl hyper::body::Body for PendingBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

#[derive(Clone)]
struct RequestSender(SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for RequestSender {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// The gRPC status.
const DEADLINE_EXCEEDED: &str = "4";

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// In whole seconds, despite the granularity of the timer.
fn whole_seconds(duration: Duration) -> u64 {
    (duration + Duration::from_millis(100)).as_secs()
}

#[tokio::test(start_paused = true)]
async fn stalled_request_is_refused_and_its_connection_stays_open() {
    let connection = Connection::open(None).await;
    connection.issue().await.unwrap();
    let (status, duration) = connection.send_stalled().await;
    assert_eq!(
        (status.as_str(), whole_seconds(duration)),
        (DEADLINE_EXCEEDED, 10)
    );
    assert!(connection.has_refused("request_too_slow", 1));
    connection.issue().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn few_requests_are_read_concurrently_before_the_first_grant() {
    let connection = Connection::open(None).await;
    let mut stalled = JoinSet::new();
    (0..8).for_each(|_| drop(stalled.spawn(connection.send_stalled())));
    sleep(seconds(5)).await;
    let start = Instant::now();
    connection.issue().await.unwrap();
    assert_eq!(whole_seconds(start.elapsed()), 5);
    assert!(connection.has_refused("request_too_slow", 8));

    // A request was granted.
    (0..20).for_each(|_| drop(stalled.spawn(connection.send_stalled())));
    sleep(seconds(1)).await;
    let start = Instant::now();
    connection.issue().await.unwrap();
    assert_eq!(whole_seconds(start.elapsed()), 0);
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_stream_limit_wait() {
    let connection = Connection::open(None).await;
    connection.issue().await.unwrap();
    let mut stalled = JoinSet::new();
    (0..150).for_each(|_| drop(stalled.spawn(connection.send_stalled())));
    let mut durations: Vec<u64> = Vec::new();
    while let Some(response) = stalled.join_next().await {
        let (status, duration) = response.unwrap();
        assert_eq!(status, DEADLINE_EXCEEDED);
        durations.push(whole_seconds(duration));
    }
    let first = durations.iter().filter(|seconds| **seconds == 10).count();
    let second = durations.iter().filter(|seconds| **seconds == 20).count();
    assert_eq!((first, second), (128, 22));
}

#[tokio::test(start_paused = true)]
async fn connection_without_a_granted_request_is_closed() {
    for sends_request in [false, true] {
        let mut connection = Connection::open(None).await;
        let start = Instant::now();
        if sends_request {
            connection.send_stalled().await;
        }
        connection.server_task.join_next().await.unwrap().unwrap();
        assert_eq!(whole_seconds(start.elapsed()), 15);
    }
}

#[tokio::test(start_paused = true)]
async fn idle_connection_is_closed_at_the_maximum_age() {
    let mut connection = Connection::open(None).await;
    let start = Instant::now();
    connection.issue().await.unwrap();
    connection.server_task.join_next().await.unwrap().unwrap();
    assert_eq!(whole_seconds(start.elapsed()), 3600);
}

#[tokio::test(start_paused = true)]
async fn unread_response_does_not_keep_an_old_connection_open() {
    // Too small for a response.
    let mut connection = Connection::open(Some(10)).await;
    let start = Instant::now();
    let token = token(&connection.signer);
    let call = Call {
        token: Some(&token),
        identity: Some(WEB),
        ..Call::default()
    };
    let sender = NoReadSender(RequestSender(connection.requests.clone()));
    let origin = Uri::from_static("http://ca");
    let mut client = IstioCertificateServiceClient::with_origin(sender, origin);
    let response = client.create_certificate(request(call));
    tokio::select! {
        _ = response => panic!("the response was read"),
        served = connection.server_task.join_next() => served.unwrap().unwrap(),
    }
    assert_eq!(whole_seconds(start.elapsed()), 3615);
}

/// Reads the head of a response and never its body.
#[derive(Clone)]
struct NoReadSender(RequestSender);

impl tower_service::Service<http::Request<Body>> for NoReadSender {
    type Response = http::Response<Body>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let response = tower_service::Service::call(&mut self.0, request);
        Box::pin(async move {
            let (head, body) = response.await?.into_parts();
            assert!(!body.is_end_stream());
            Ok(http::Response::from_parts(
                head,
                Body::new(UnreadBody(body)),
            ))
        })
    }
}

struct UnreadBody(#[allow(dead_code, reason = "the body keeps the stream open")] Incoming);

impl hyper::body::Body for UnreadBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}
