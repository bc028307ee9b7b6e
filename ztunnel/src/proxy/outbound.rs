//! Connections that the pod opens: original destination, route, tunnel or plain TCP, relay.

use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{
    Authority, ConnectRequest, Forwarded, PoolKey, Reason, RelayOutcome, RelaySummary, Side,
    Stream, TraceParent, relay_tcp,
};
use mesh::{EndpointKey, Route, Service, Workload, route};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Error;
use super::connections::Direction;
use super::context::PodContext;
use super::inbound::baggage;
use super::redirected::{is_direct, register};
use super::sockets::{canonical, reset};
use super::tracker::ConnectionTracker;

/// Endpoints that are tried for one connection.
const MAX_ATTEMPTS: usize = 3;

/// No attempt begins later than this after the application connected: the application has its own
/// connect timeout, often 30 s.
const RETRY_DEADLINE: Duration = Duration::from_secs(15);

/// How long one endpoint may take to respond while another is left, so that all attempts begin
/// within [`RETRY_DEADLINE`]. The cost is a peer whose application takes longer than this to
/// accept.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one connection that the pod opened.
pub(crate) async fn serve(pod: Rc<PodContext>, downstream: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let Some((mut tracker, original_dst)) = register(&pod, Direction::Outbound, &downstream, peer)
    else {
        return reset(downstream);
    };
    if is_direct(&downstream, original_dst) {
        let source = pod.store().load().workload(&pod.uid).cloned();
        tracker.set_source(source, None);
        tracker.finish_failed(&Error::SelfCall(original_dst));
        return reset(downstream);
    }
    let stop = tracker.stop_signal();
    let connected = tokio::select! {
        biased;
        reason = stop.stopped() => Err(Error::Stopped(reason)),
        () = client_reset(&downstream) => return tracker.finish(&CLIENT_RESET),
        // Boxed, because it is large, and most of a connection's time is in the relay.
        connected = Box::pin(connect(&pod, &mut tracker, peer, original_dst)) => connected,
    };
    match connected {
        Ok(upstream) => relay(tracker, downstream, upstream).await,
        Err(error) => {
            // Recorded before the reset, so that the reason is in log and metric when the
            // application sees the reset.
            tracker.finish_failed(&error);
            reset(downstream);
        }
    }
}

/// Resolves when the application has reset its connection without having sent anything. Bytes that
/// it sent before are still delivered, and the reset after them, as without a mesh.
async fn client_reset(downstream: &TcpStream) {
    let reset = downstream.ready(Interest::ERROR).await;
    // The kernel returns bytes before the error, and keeps the error for the relay.
    let first = SockRef::from(downstream).peek(&mut [MaybeUninit::uninit()]);
    if reset.is_ok() && first.is_ok_and(|bytes| bytes > 0) {
        std::future::pending::<()>().await;
    }
}

/// The application reset its connection before it was relayed, which is no failure of the mesh.
const CLIENT_RESET: RelaySummary = RelaySummary {
    sent: 0,
    received: 0,
    outcome: RelayOutcome::Reset {
        by: Side::Downstream,
    },
};

/// The connection to the destination.
enum Upstream {
    Tunnel {
        stream: Box<Stream>,
        /// Whether the peer's response to the CONNECT has been awaited.
        has_response: bool,
    },
    Plain(TcpStream),
}

async fn relay(tracker: ConnectionTracker, downstream: TcpStream, upstream: Upstream) {
    tracker.mark_opened();
    let mut opts = tracker.relay_opts();
    let end = match upstream {
        Upstream::Tunnel {
            stream,
            has_response,
        } => {
            opts.optimistic = !has_response;
            stream.relay(downstream, opts).await
        }
        Upstream::Plain(upstream) => relay_tcp(downstream, upstream, opts).await,
    };
    tracker.finish(&end);
}

/// Connects along the route; to another endpoint if one fails before it has received a byte of the
/// application.
async fn connect(
    pod: &PodContext,
    tracker: &mut ConnectionTracker,
    peer: SocketAddr,
    original_dst: SocketAddr,
) -> Result<Upstream, Error> {
    let started = Instant::now();
    let mut tried: Vec<EndpointKey> = Vec::new();
    let mut failure = None;
    for is_last in (1..=MAX_ATTEMPTS).map(|n| n == MAX_ATTEMPTS) {
        let (source, route) = select_route(pod, original_dst, &tried)?;
        let options = RetryOptions::of(&route, &tried, is_last);
        if failure.is_some() && matches!(route, Route::NoEndpoint { .. }) {
            // The failure of the last endpoint is more specific than "no endpoint is left".
            break;
        }
        let endpoint = route
            .endpoint()
            .map(|endpoint| (endpoint, route.may_retry()));
        let error = match attempt(pod, tracker, peer, source, route, options).await {
            Ok(upstream) => return Ok(upstream),
            Err(error) => error,
        };
        let retry = (error.is_retryable() && started.elapsed() < RETRY_DEADLINE)
            .then(|| retry_after(&error, endpoint))
            .flatten();
        failure = Some(error);
        match retry {
            Some(Retry::Excluding(endpoint)) => tried.push(endpoint),
            Some(Retry::SameEndpoint) => {}
            None => break,
        }
    }
    Err(failure.unwrap_or_else(|| Error::NoEndpoint {
        destination: original_dst.to_string(),
        code: "no_healthy_endpoint",
    }))
}

/// The route by the current model, which is released before anything is awaited.
fn select_route(
    pod: &PodContext,
    original_dst: SocketAddr,
    tried: &[EndpointKey],
) -> Result<(Arc<Workload>, Route), Error> {
    let model = pod.store().load();
    let source = model
        .workload(&pod.uid)
        .ok_or_else(|| Error::WorkloadUnknown(pod.uid.clone()))?;
    let mut random = pod.random.borrow_mut();
    let route = route(&model, source, original_dst, tried, &mut random);
    Ok((source.clone(), route))
}

enum Retry {
    /// Another endpoint of the service than this one and those tried before.
    Excluding(EndpointKey),
    SameEndpoint,
}

/// What to try after a failure. `endpoint` is the one that failed, and whether a service led to it.
///
/// A service has other endpoints. A pod that was addressed directly has none, but if its tunnel is
/// going away the next tunnel to it can serve.
fn retry_after(error: &Error, endpoint: Option<(EndpointKey, bool)>) -> Option<Retry> {
    let (endpoint, is_of_service) = endpoint?;
    let is_tunnel_going_away = match error {
        Error::Tunnel(error) => matches!(error.reason(), Reason::GoAway | Reason::StreamRefused),
        _ => false,
    };
    match (is_of_service, is_tunnel_going_away) {
        (true, _) => Some(Retry::Excluding(endpoint)),
        (false, true) => Some(Retry::SameEndpoint),
        (false, false) => None,
    }
}

/// Whether other endpoints could serve if an attempt through a tunnel fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RetryOptions {
    /// There is no other endpoint: the response need not be awaited.
    NoAlternative,
    /// There is another endpoint, and an attempt is left.
    AlternativeLeft,
    /// All endpoints, or the maximum of them, were tried: the last attempt has the full timeout.
    Exhausted,
}

impl RetryOptions {
    fn of(route: &Route, tried: &[EndpointKey], is_last: bool) -> Self {
        let endpoints = match route {
            Route::Mesh {
                service: Some(service),
                ..
            } => service.endpoints.len(),
            _ => 0,
        };
        match endpoints {
            0 | 1 => Self::NoAlternative,
            n if !is_last && tried.len() + 1 < n => Self::AlternativeLeft,
            _ => Self::Exhausted,
        }
    }
}

async fn attempt(
    pod: &PodContext,
    tracker: &mut ConnectionTracker,
    peer: SocketAddr,
    source: Arc<Workload>,
    route: Route,
    options: RetryOptions,
) -> Result<Upstream, Error> {
    match route {
        Route::Mesh {
            workload,
            service,
            target,
            tunnel,
            lease,
        } => {
            let identity = Arc::new(source.identity.clone());
            tracker.set_source(Some(source.clone()), Some(identity));
            tracker.set_target(Some(workload.clone()), service.clone());
            tracker.set_destination(tunnel, Some(Authority::from(target)));
            tracker.attach_lease(lease);
            let service = service.as_deref();
            let opened = open_stream(pod, &source, &workload, service, target, tunnel, peer);
            let mut stream = opened.await?;
            let has_response = await_response(&mut stream, options).await?;
            Ok(Upstream::Tunnel {
                stream,
                has_response,
            })
        }
        Route::Plain {
            target,
            workload,
            service,
            lease,
        } => {
            tracker.set_source(Some(source), None);
            tracker.set_target(workload, service);
            tracker.set_destination(target, None);
            tracker.attach_lease(lease);
            pod.sockets.dial(target).await.map(Upstream::Plain)
        }
        Route::Passthrough { target } => {
            tracker.set_source(Some(source), None);
            tracker.set_destination(target, None);
            pod.sockets.dial(target).await.map(Upstream::Plain)
        }
        Route::NoEndpoint { service, code } => {
            tracker.set_source(Some(source), None);
            let destination = service.as_ref().map_or_else(
                || "this address".into(),
                |service| service.hostname.to_string(),
            );
            tracker.set_target(None, service);
            Err(Error::NoEndpoint { destination, code })
        }
    }
}

/// Opens a CONNECT stream in a tunnel to the workload. If that fails, nothing is sent in clear
/// instead.
async fn open_stream(
    pod: &PodContext,
    source: &Workload,
    workload: &Workload,
    service: Option<&Service>,
    target: SocketAddr,
    tunnel: SocketAddr,
    peer: SocketAddr,
) -> Result<Box<Stream>, Error> {
    let identity = pod.identities().ready(&source.identity).await?;
    let key = PoolKey {
        source: source.identity.clone(),
        destination: workload.uid.to_arc(),
        address: tunnel,
    };
    let request = ConnectRequest {
        authority: Authority::from(target),
        baggage: Some(baggage(source)),
        forwarded: Some(Forwarded {
            for_: peer,
            host: service.map(|service| service.hostname.to_string()),
        }),
        traceparent: Some(TraceParent::random()),
    };
    let with_aliases;
    let expected = if pod.trust_domain_aliases().is_empty() {
        std::slice::from_ref(&workload.identity)
    } else {
        with_aliases = pod.with_aliases(&workload.identity);
        &with_aliases
    };
    let opened = pod.pool.open(&key, expected, &identity.client, request);
    opened.await.map(Box::new).map_err(Error::Tunnel)
}

/// Waits for the response to the CONNECT if another endpoint could serve, before the first byte of
/// the application is sent. If none could, that byte travels with the CONNECT and saves a round
/// trip. Returns whether the response was awaited.
async fn await_response(stream: &mut Stream, options: RetryOptions) -> Result<bool, Error> {
    match options {
        RetryOptions::NoAlternative => return Ok(false),
        RetryOptions::AlternativeLeft => stream.response_within(ATTEMPT_TIMEOUT).await,
        RetryOptions::Exhausted => stream.response().await,
    }
    .map(|_| true)
    .map_err(Error::Tunnel)
}
