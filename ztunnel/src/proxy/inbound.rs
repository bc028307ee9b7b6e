//! What reaches the pod through the mesh: verified peer, CONNECT, the application.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use hbone::{
    Accepted, Authority, Baggage, ConnectRequest, ConnectResponse, Peer, Reason, Rejected,
    ServeOutcome, ServeSummary, TunnelService,
};
use mesh::{Model, Service, Workload};
use spiffe::SpiffeId;
use tokio::net::TcpStream;

use super::Error;
use super::address::{canonical, endpoint_of, is_own, port_behind, refuse_elsewhere, reset};
use super::flow::Flow;
use crate::dataplane::PodContext;
use crate::dataplane::registry::{Direction, Slot};
use crate::dataplane::unproven::Place;

/// Serves one tunnel that a peer opened to the pod.
pub(crate) async fn serve(pod: Rc<PodContext>, transport: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let local = match transport.local_addr() {
        Ok(local) => canonical(local),
        Err(_) => return reset(transport),
    };
    let abort = pod.ends.abort.child_token();
    let place = pod.unproven.enter(abort.clone());
    let identity = tokio::select! {
        biased;
        () = abort.cancelled() => {
            pushed_out(&pod, peer, local);
            return reset(transport);
        }
        identity = identity(&pod) => identity,
    };
    let identity = match identity {
        Ok(identity) => identity,
        Err(error) => {
            refused(&pod, Direction::Inbound, peer, Some(local), &error);
            return reset(transport);
        }
    };
    let tunnel = Rc::new(Tunnel {
        pod: pod.clone(),
        local,
        identity: OnceCell::new(),
        standing: RefCell::new(Standing::Unproven(place)),
        overloaded: Cell::new(false),
    });
    let end = hbone::serve(
        transport,
        &identity.server,
        tunnel.clone(),
        &pod.serve,
        pod.ends.drain.clone(),
        abort,
    )
    .await;
    drop(identity);
    match (end.outcome, &*tunnel.standing.borrow()) {
        (ServeOutcome::Aborted, Standing::Unproven(_)) => pushed_out(&pod, peer, local),
        _ => report(&pod, peer, local, &end),
    }
}

/// Tells of a handshake that made room for others, unless it is the pod that has gone.
fn pushed_out(pod: &PodContext, peer: SocketAddr, local: SocketAddr) {
    if !pod.ends.abort.is_cancelled() {
        let error = Error::HandshakeLimit;
        refused(pod, Direction::Inbound, peer, Some(local), &error);
    }
}

async fn identity(pod: &PodContext) -> Result<Arc<crate::identity::Identity>, Error> {
    let identity = {
        let model = pod.store.load();
        model
            .workload(&pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(pod.uid.clone()))?
            .identity
            .clone()
    };
    Ok(pod.identities.ready(&identity).await?)
}

/// Counts and logs a tunnel that broke, whether it carried something or not: what its streams tell of
/// their ends does not say what its peer did to it. What a peer does in good order is told by its
/// streams alone.
fn report(pod: &PodContext, peer: SocketAddr, local: SocketAddr, end: &ServeSummary) {
    let (ServeOutcome::Failed, Some(error)) = (end.outcome, &end.error) else {
        return;
    };
    let error = Error::Tunnel(error.clone());
    if end.streams == 0 {
        return refused(pod, Direction::Inbound, peer, Some(local), &error);
    }
    pod.telemetry.failed(Direction::Inbound, error.code());
    let identity = end.peer.as_ref().map(|peer| &peer.identity);
    tracing::event!(
        target: "access",
        tracing::Level::WARN,
        src.addr = %peer,
        src.identity = identity.map(tracing::field::display),
        dst.addr = %local,
        pod = %pod.uid,
        direction = Direction::Inbound.name(),
        streams = end.streams,
        error = error.text(),
        reason = error.code(),
        "tunnel failed"
    );
}

/// Counts and logs what failed before there was a connection to speak of.
pub(super) fn refused(
    pod: &PodContext,
    direction: Direction,
    peer: SocketAddr,
    wanted: Option<SocketAddr>,
    error: &Error,
) {
    pod.telemetry.failed(direction, error.code());
    tracing::event!(
        target: "access",
        tracing::Level::WARN,
        src.addr = %peer,
        dst.addr = wanted.map(tracing::field::display),
        pod = %pod.uid,
        direction = direction.name(),
        error = error.text(),
        reason = error.code(),
        "connection failed"
    );
}

/// The decisions about one tunnel's streams.
struct Tunnel {
    pod: Rc<PodContext>,
    /// The address that the peer dialled; what it asks for has to be the same pod address.
    local: SocketAddr,
    /// Who the peer proved to be, shared by the accounts of all its streams.
    identity: OnceCell<Arc<SpiffeId>>,
    standing: RefCell<Standing>,
    /// It has been told once that streams are refused.
    overloaded: Cell<bool>,
}

/// What a tunnel counts as.
enum Standing {
    /// One of the pod's handshakes, held for its drop.
    Unproven(#[allow(dead_code)] Place),
    /// One of the pod's connections, held for its drop.
    Proven(#[allow(dead_code)] Slot),
    /// A peer that is known, for whom there was no room.
    Refused,
}

impl Tunnel {
    /// Counts and logs that nothing of what a known peer wants is looked at.
    fn turned_away(&self, peer: &Peer, error: &Error) {
        let from = canonical(peer.address);
        let local = Some(self.local);
        refused(&self.pod, Direction::Inbound, from, local, error);
    }
}

impl TunnelService for Tunnel {
    async fn connect(&self, peer: &Peer, request: ConnectRequest) -> Result<Accepted, Rejected> {
        let from = canonical(peer.address);
        let Some(slot) = self.pod.admit() else {
            self.turned_away(peer, &Error::ConnectionLimit);
            return Err(rejected(&Error::ConnectionLimit));
        };
        let mut flow = Flow::begin(&self.pod, slot, Direction::Inbound, from, self.local);
        match self.establish(peer, from, &request, &mut flow).await {
            Ok((upstream, response)) => {
                flow.opened();
                let opts = flow.relay_opts();
                Ok(Accepted {
                    upstream,
                    response,
                    opts,
                    on_end: Box::new(move |end| flow.closed(&end)),
                })
            }
            Err(error) => {
                flow.failed(&error);
                Err(rejected(&error))
            }
        }
    }

    fn accept_tunnel(&self, peer: &Peer) -> bool {
        let slot = self.pod.admit();
        let admitted = slot.is_some();
        if !admitted {
            self.turned_away(peer, &Error::ConnectionLimit);
        }
        self.standing
            .replace(slot.map_or(Standing::Refused, Standing::Proven));
        admitted
    }

    fn on_refused_stream(&self, peer: &Peer) {
        let error = Error::Tunnel(Reason::TooManyStreams.into());
        // Its peer may go on for ever: each is counted, and the first told.
        if self.overloaded.replace(true) {
            return self.pod.telemetry.failed(Direction::Inbound, error.code());
        }
        self.turned_away(peer, &error);
    }

    fn on_bad_request(&self, peer: &Peer, reason: Reason, detail: &str) {
        let from = canonical(peer.address);
        self.pod.telemetry.failed(Direction::Inbound, reason.code());
        tracing::event!(
            target: "access",
            tracing::Level::WARN,
            src.addr = %from,
            src.identity = %peer.identity,
            dst.addr = %self.local,
            direction = Direction::Inbound.name(),
            error = %format_args!("{reason}: {detail}"),
            reason = reason.code(),
            "connection failed"
        );
    }
}

fn rejected(error: &Error) -> Rejected {
    Rejected {
        status: error.status(),
        reason: error.code(),
    }
}

impl Tunnel {
    /// Decides about a request and dials the application. Authorization stands between the two: the
    /// flow is registered, the peer is proven, the target is known, and nothing has reached the
    /// application yet. A policy that comes while it is dialled stops the flow.
    async fn establish(
        &self,
        peer: &Peer,
        from: SocketAddr,
        request: &ConnectRequest,
        flow: &mut Flow,
    ) -> Result<(TcpStream, ConnectResponse), Error> {
        flow.via(self.local, Some(request.authority.clone()));
        let (target, answer) = {
            let model = self.pod.store.load();
            let workload = model
                .workload(&self.pod.uid)
                .ok_or_else(|| Error::WorkloadUnknown(self.pod.uid.clone()))?;
            let identity = self
                .identity
                .get_or_init(|| Arc::new(peer.identity.clone()))
                .clone();
            let source = self.pod.source(&model, from.ip(), Some(&identity)).cloned();
            flow.from(source, Some(identity));
            let host = request
                .forwarded
                .as_ref()
                .and_then(|forwarded| forwarded.host.as_deref());
            let target = self.target(&model, workload, &request.authority);
            let port = target
                .as_ref()
                .map_or(request.authority.port(), SocketAddr::port);
            flow.to(
                Some(workload.clone()),
                service_behind(&model, workload, host, port),
            );
            self.check_trust_domain(workload, peer)?;
            (target?, baggage(workload))
        };
        flow.authorize(target)?;
        let upstream = flow
            .unless_stopped(self.pod.sockets.dial_from(from.ip(), target))
            .await?;
        Ok((
            upstream,
            ConnectResponse {
                baggage: Some(answer),
            },
        ))
    }

    fn check_trust_domain(&self, workload: &Workload, peer: &Peer) -> Result<(), Error> {
        let theirs = peer.identity.trust_domain();
        if self.pod.is_one_mesh(&workload.identity, theirs) {
            return Ok(());
        }
        Err(Error::ForeignTrustDomain(theirs.to_string()))
    }

    /// Where in the pod a request leads. The address is always the one that the peer dialled, so a
    /// name can never lead elsewhere.
    fn target(
        &self,
        model: &Model,
        workload: &Workload,
        authority: &Authority,
    ) -> Result<SocketAddr, Error> {
        let elsewhere = || Error::NotThisPod {
            authority: authority.to_string(),
        };
        let target = match authority {
            Authority::Address(address) => canonical(*address),
            Authority::Host { name, port } => {
                let port = port_behind(model, workload, name, *port).ok_or_else(elsewhere)?;
                SocketAddr::new(self.local.ip(), port)
            }
        };
        if is_own(target.port()) {
            return Err(Error::SelfCall(target));
        }
        if target.ip() != self.local.ip() {
            return Err(elsewhere());
        }
        refuse_elsewhere(workload, target)?;
        Ok(target)
    }
}

/// The service that was meant: the one that the client named if this pod is behind it, else the
/// first that leads to the port.
pub(super) fn service_behind(
    model: &Model,
    pod: &Workload,
    host: Option<&str>,
    port: u16,
) -> Option<Arc<Service>> {
    let services = || {
        pod.services
            .iter()
            .filter_map(|name| model.service(&name.namespace, &name.name))
    };
    if let Some(named) = host.and_then(|host| services().find(|service| *service.hostname == *host))
    {
        return Some(named.clone());
    }
    let leads_here = |service: &&Arc<Service>| {
        endpoint_of(service, pod)
            .is_some_and(|endpoint| endpoint.ports.iter().any(|ports| ports.target == port))
    };
    services().find(leads_here).cloned()
}

/// A workload as the tunnel's headers describe it.
pub(super) fn baggage(workload: &Workload) -> Baggage {
    let text = |value: &Arc<str>| (!value.is_empty()).then(|| value.to_string());
    Baggage {
        cluster: text(&workload.cluster),
        namespace: text(&workload.namespace),
        workload_type: Some(workload.workload_type.as_str().into()),
        workload_name: text(&workload.workload_name),
        service_name: text(&workload.canonical_name),
        service_version: text(&workload.canonical_revision),
        region: text(&workload.locality.region),
        zone: text(&workload.locality.zone),
    }
}
