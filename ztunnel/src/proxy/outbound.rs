//! What the pod opens: original destination, route, tunnel or plain TCP, relay.

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
use super::address::{canonical, reset};
use super::captured::{is_direct, register};
use super::flow::Flow;
use super::inbound::baggage;
use crate::dataplane::PodContext;
use crate::dataplane::registry::Direction;

/// Endpoints that are tried for one connection.
const ATTEMPTS: usize = 3;

/// No attempt begins later than this after the application connected: it has its own patience,
/// which is often 30 s.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long one endpoint may take to answer where another could: so that all attempts together begin
/// within [`PATIENCE`]. A peer whose own application takes longer to accept is no loss.
const ANSWER: Duration = Duration::from_secs(5);

/// Carries one connection that the pod opened.
pub(crate) async fn serve(pod: Rc<PodContext>, downstream: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let Some((mut flow, wanted)) = register(&pod, Direction::Outbound, &downstream, peer) else {
        return reset(downstream);
    };
    if is_direct(&downstream, wanted) {
        let source = pod.store.load().workload(&pod.uid).cloned();
        flow.from(source, None);
        flow.failed(&Error::SelfCall(wanted));
        return reset(downstream);
    }
    let stop = flow.stop();
    let connected = tokio::select! {
        biased;
        reason = stop.stopped() => Err(Error::Stopped(reason)),
        () = given_up(&downstream) => return flow.closed(&GIVEN_UP),
        // Boxed, because it is large and a connection spends its life in the relay and not here.
        connected = Box::pin(connect(&pod, &mut flow, peer, wanted)) => connected,
    };
    match connected {
        Ok(upstream) => relay(flow, downstream, upstream).await,
        Err(error) => {
            // Told before the reset, so that whoever sees the reset finds its reason.
            flow.failed(&error);
            reset(downstream);
        }
    }
}

/// Resolves when the application has reset its connection and had said nothing. What it had said goes
/// its way, and the reset after it, as without a mesh.
async fn given_up(downstream: &TcpStream) {
    let reset = downstream.ready(Interest::ERROR).await;
    // Bytes come before the error, which stays for the relay if there are any.
    let first = SockRef::from(downstream).peek(&mut [MaybeUninit::uninit()]);
    if reset.is_ok() && first.is_ok_and(|bytes| bytes > 0) {
        std::future::pending::<()>().await;
    }
}

/// The application did not wait for its connection. That is no failure of the mesh.
const GIVEN_UP: RelaySummary = RelaySummary {
    sent: 0,
    received: 0,
    outcome: RelayOutcome::Reset {
        by: Side::Downstream,
    },
};

/// The other side of a connection.
enum Upstream {
    Tunnel { stream: Box<Stream>, answered: bool },
    Plain(TcpStream),
}

async fn relay(flow: Flow, downstream: TcpStream, upstream: Upstream) {
    flow.opened();
    let mut opts = flow.relay_opts();
    let end = match upstream {
        Upstream::Tunnel { stream, answered } => {
            opts.optimistic = !answered;
            stream.relay(downstream, opts).await
        }
        Upstream::Plain(upstream) => relay_tcp(downstream, upstream, opts).await,
    };
    flow.closed(&end);
}

/// Connects to where the route leads; to the next endpoint if one fails before it has seen anything
/// of the application.
async fn connect(
    pod: &PodContext,
    flow: &mut Flow,
    peer: SocketAddr,
    wanted: SocketAddr,
) -> Result<Upstream, Error> {
    let started = Instant::now();
    let mut tried: Vec<EndpointKey> = Vec::new();
    let mut failure = None;
    for last in (1..=ATTEMPTS).map(|n| n == ATTEMPTS) {
        let (source, route) = decide(pod, wanted, &tried)?;
        let others = Others::of(&route, &tried, last);
        if failure.is_some() && matches!(route, Route::NoEndpoint { .. }) {
            // How the last endpoint failed says more than that none is left.
            break;
        }
        let endpoint = route
            .endpoint()
            .map(|endpoint| (endpoint, route.may_retry()));
        let again = match attempt(pod, flow, peer, source, route, others).await {
            Ok(upstream) => return Ok(upstream),
            Err(error) => {
                let again = (error.retryable() && started.elapsed() < PATIENCE)
                    .then(|| next(&error, endpoint))
                    .flatten();
                failure = Some(error);
                again
            }
        };
        match again {
            Some(Retry::Elsewhere(endpoint)) => tried.push(endpoint),
            Some(Retry::SameEndpoint) => {}
            None => break,
        }
    }
    Err(failure.unwrap_or_else(|| Error::NoEndpoint {
        destination: wanted.to_string(),
        code: "no_healthy_endpoint",
    }))
}

/// The route for the pod as it is now. The model is let go before anything waits.
fn decide(
    pod: &PodContext,
    wanted: SocketAddr,
    tried: &[EndpointKey],
) -> Result<(Arc<Workload>, Route), Error> {
    let model = pod.store.load();
    let source = model
        .workload(&pod.uid)
        .ok_or_else(|| Error::WorkloadUnknown(pod.uid.clone()))?;
    let route = route(&model, source, wanted, tried, &mut pod.random.borrow_mut());
    Ok((source.clone(), route))
}

enum Retry {
    Elsewhere(EndpointKey),
    SameEndpoint,
}

/// A service has other endpoints to try. A pod that was addressed itself has none, but one whose
/// tunnel is just going away takes the next tunnel.
fn next(error: &Error, endpoint: Option<(EndpointKey, bool)>) -> Option<Retry> {
    let (endpoint, of_service) = endpoint?;
    let tunnel_is_leaving = match error {
        Error::Tunnel(error) => matches!(error.reason(), Reason::GoAway | Reason::StreamRefused),
        _ => false,
    };
    match (of_service, tunnel_is_leaving) {
        (true, _) => Some(Retry::Elsewhere(endpoint)),
        (false, true) => Some(Retry::SameEndpoint),
        (false, false) => None,
    }
}

/// The endpoints beside the one that is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Others {
    /// There are none: the answer need not be awaited.
    None,
    /// There are, and there is an attempt left.
    Left,
    /// All were tried, or enough of them: the last one has all the time that it needs.
    Tried,
}

impl Others {
    fn of(route: &Route, tried: &[EndpointKey], last: bool) -> Self {
        let endpoints = match route {
            Route::Mesh {
                service: Some(service),
                ..
            } => service.endpoints.len(),
            _ => 0,
        };
        match endpoints {
            0 | 1 => Self::None,
            n if !last && tried.len() + 1 < n => Self::Left,
            _ => Self::Tried,
        }
    }
}

async fn attempt(
    pod: &PodContext,
    flow: &mut Flow,
    peer: SocketAddr,
    source: Arc<Workload>,
    route: Route,
    others: Others,
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
            flow.from(Some(source.clone()), Some(identity));
            flow.to(Some(workload.clone()), service.clone());
            flow.via(tunnel, Some(Authority::from(target)));
            flow.hold(lease);
            let service = service.as_deref();
            let parties = (&*source, &*workload, service);
            let mut stream = open_tunnel(pod, parties, target, tunnel, peer).await?;
            let answered = answer(&mut stream, others).await?;
            Ok(Upstream::Tunnel { stream, answered })
        }
        Route::Plain {
            target,
            workload,
            service,
            lease,
        } => {
            flow.from(Some(source), None);
            flow.to(workload, service);
            flow.via(target, None);
            flow.hold(lease);
            pod.sockets.dial(target).await.map(Upstream::Plain)
        }
        Route::Passthrough { target } => {
            flow.from(Some(source), None);
            flow.via(target, None);
            pod.sockets.dial(target).await.map(Upstream::Plain)
        }
        Route::NoEndpoint { service, code } => {
            flow.from(Some(source), None);
            let destination = service.as_ref().map_or_else(
                || "this address".into(),
                |service| service.hostname.to_string(),
            );
            flow.to(None, service);
            Err(Error::NoEndpoint { destination, code })
        }
    }
}

/// Through the mesh or not at all: whatever fails here, nothing is sent in clear.
async fn open_tunnel(
    pod: &PodContext,
    (source, workload, service): (&Workload, &Workload, Option<&Service>),
    target: SocketAddr,
    tunnel: SocketAddr,
    peer: SocketAddr,
) -> Result<Box<Stream>, Error> {
    let identity = pod.identities.ready(&source.identity).await?;
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
    let all_names;
    let expect = if pod.trust_domain_aliases.is_empty() {
        std::slice::from_ref(&workload.identity)
    } else {
        all_names = pod.under_all_names(&workload.identity);
        &all_names
    };
    let opened = pod.pool.open(&key, expect, &identity.client, request);
    opened.await.map(Box::new).map_err(Error::Tunnel)
}

/// Where another endpoint could take over, the answer is awaited before the application's first
/// byte leaves. Where none could, the first byte travels with the CONNECT and saves a round trip.
async fn answer(stream: &mut Stream, others: Others) -> Result<bool, Error> {
    match others {
        Others::None => return Ok(false),
        Others::Left => stream.response_within(ANSWER).await,
        Others::Tried => stream.response().await,
    }
    .map(|_| true)
    .map_err(Error::Tunnel)
}
