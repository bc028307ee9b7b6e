//! What one connection may take, in virtual time.

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
use super::super::serving::Serving;
use super::super::*;
use super::bench::*;

const SERVICE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// One connection to an authority.
struct Wire {
    _folder: TempDir,
    key: TokenKey,
    requests: SendRequest<Body>,
    metrics: Metrics,
    /// Ends with the connection.
    served: JoinSet<()>,
    _client: JoinSet<()>,
}

impl Wire {
    async fn open(window: Option<u32>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        create_keys(&path("token.key"), &path("token.pub")).unwrap();
        let tokens = SignedTokens::open(&path("token.pub"), "istio-ca").unwrap();
        let keeper = Keeper::open(&path("ca"), &path("state"), Arc::new(SystemTime::now)).unwrap();
        let metrics = Metrics::new().unwrap();
        let service = Service::new(
            Arc::new(keeper),
            Arc::new(tokens),
            "cluster.local".parse().unwrap(),
            LIMITS,
            metrics.clone(),
        );
        let tls = Serving::new(Vec::new()).tls().unwrap();
        let server = Server::new(tls, service, metrics.clone());
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let peer = "192.0.2.1:1".parse().unwrap();
        let stop = CancellationToken::new();
        let serving = async move { server.requests(TokioIo::new(theirs), peer, stop).await };
        let mut served = JoinSet::new();
        served.spawn(serving);
        let mut client = http2::Builder::new(TokioExecutor::new());
        client.initial_stream_window_size(window);
        let (requests, connection) = client.handshake(TokioIo::new(ours)).await.unwrap();
        let mut driving = JoinSet::new();
        driving.spawn(async move { drop(connection.await) });
        Self {
            key: TokenKey::open(&path("token.key")).unwrap(),
            _folder: folder,
            requests,
            metrics,
            served,
            _client: driving,
        }
    }

    async fn ask(&self) -> Result<Vec<String>, Status> {
        let token = token(&self.key);
        let ask = Ask {
            token: Some(&token),
            identity: Some(WEB),
            ..Ask::default()
        };
        let origin = Uri::from_static("http://ca");
        let requests = Requests(self.requests.clone());
        let mut client = IstioCertificateServiceClient::with_origin(requests, origin);
        let answer = client.create_certificate(request(ask)).await?;
        Ok(answer.into_inner().cert_chain)
    }

    /// A request whose body never comes; what is answered, and after how long.
    fn slow(&self) -> impl Future<Output = (String, Duration)> + use<> {
        let request = http::Request::post(format!("http://ca{SERVICE}"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .body(Body::new(Never))
            .unwrap();
        let answer = self.requests.clone().send_request(request);
        let began = Instant::now();
        async move {
            let answer = answer.await.unwrap();
            let status = answer.headers()["grpc-status"].to_str().unwrap();
            (status.to_owned(), began.elapsed())
        }
    }

    fn refused(&self, reason: &str, times: u32) -> bool {
        let counted = format!("ambit_ca_refused_total{{reason=\"{reason}\"}} {times}");
        self.metrics.scrape().contains(&counted)
    }
}

struct Never;

impl hyper::body::Body for Never {
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
struct Requests(SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Requests {
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

/// gRPC's DEADLINE_EXCEEDED.
const TOO_LATE: &str = "4";

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// In whole seconds: the clock's own grain does not count.
fn whole(duration: Duration) -> u64 {
    (duration + Duration::from_millis(100)).as_secs()
}

#[tokio::test(start_paused = true)]
async fn a_request_that_does_not_come_is_refused_in_time_and_the_connection_goes_on() {
    let wire = Wire::open(None).await;
    wire.ask().await.unwrap();
    let (status, took) = wire.slow().await;
    assert_eq!((status.as_str(), whole(took)), (TOO_LATE, 10));
    assert!(wire.refused("request_too_slow", 1));
    wire.ask().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_was_granted_nothing_yet_has_few_requests_read_at_a_time() {
    let wire = Wire::open(None).await;
    let mut slow = JoinSet::new();
    (0..8).for_each(|_| drop(slow.spawn(wire.slow())));
    sleep(seconds(5)).await;
    let began = Instant::now();
    wire.ask().await.unwrap();
    assert_eq!(whole(began.elapsed()), 5);
    assert!(wire.refused("request_too_slow", 8));

    // Now it is known.
    (0..20).for_each(|_| drop(slow.spawn(wire.slow())));
    sleep(seconds(1)).await;
    let began = Instant::now();
    wire.ask().await.unwrap();
    assert_eq!(whole(began.elapsed()), 0);
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_is_known_has_many_requests_at_a_time_and_waits_with_more() {
    let wire = Wire::open(None).await;
    wire.ask().await.unwrap();
    let mut slow = JoinSet::new();
    (0..150).for_each(|_| drop(slow.spawn(wire.slow())));
    let mut took: Vec<u64> = Vec::new();
    while let Some(answer) = slow.join_next().await {
        let (status, duration) = answer.unwrap();
        assert_eq!(status, TOO_LATE);
        took.push(whole(duration));
    }
    let at_once = took.iter().filter(|took| **took == 10).count();
    let next = took.iter().filter(|took| **took == 20).count();
    assert_eq!((at_once, next), (128, 22));
}

#[tokio::test(start_paused = true)]
async fn a_connection_on_which_nothing_is_granted_ends() {
    for asks in [false, true] {
        let mut wire = Wire::open(None).await;
        let began = Instant::now();
        if asks {
            wire.slow().await;
        }
        wire.served.join_next().await.unwrap().unwrap();
        assert_eq!(whole(began.elapsed()), 15);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_idle_ends_at_its_age() {
    let mut wire = Wire::open(None).await;
    let began = Instant::now();
    wire.ask().await.unwrap();
    wire.served.join_next().await.unwrap().unwrap();
    assert_eq!(whole(began.elapsed()), 3600);
}

#[tokio::test(start_paused = true)]
async fn an_old_connection_ends_although_an_answer_is_never_read() {
    // Too little for an answer.
    let mut wire = Wire::open(Some(10)).await;
    let began = Instant::now();
    let token = token(&wire.key);
    let ask = Ask {
        token: Some(&token),
        identity: Some(WEB),
        ..Ask::default()
    };
    let requests = Unread(Requests(wire.requests.clone()));
    let origin = Uri::from_static("http://ca");
    let mut client = IstioCertificateServiceClient::with_origin(requests, origin);
    let asking = client.create_certificate(request(ask));
    tokio::select! {
        _ = asking => panic!("the answer was read"),
        served = wire.served.join_next() => served.unwrap().unwrap(),
    }
    assert_eq!(whole(began.elapsed()), 3615);
}

/// Takes an answer's head, and never its body.
#[derive(Clone)]
struct Unread(Requests);

impl tower_service::Service<http::Request<Body>> for Unread {
    type Response = http::Response<Body>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let answer = tower_service::Service::call(&mut self.0, request);
        Box::pin(async move {
            let (head, body) = answer.await?.into_parts();
            assert!(!body.is_end_stream());
            Ok(http::Response::from_parts(head, Body::new(Held(body))))
        })
    }
}

struct Held(#[allow(dead_code, reason = "what is held keeps the stream open")] Incoming);

impl hyper::body::Body for Held {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}
