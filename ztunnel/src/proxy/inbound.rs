//! Connections to the pod through the mesh: handshake, CONNECT, authorization, dial to the
//! application.

use std::cell::{Cell, OnceCell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use hbone::{
    Accepted, Authority, Baggage, ConnectRequest, ConnectResponse, Peer, Reason, Rejected,
    ServeOutcome, ServeSummary, TunnelService,
};
use mesh::{Model, Workload};
use spiffe::SpiffeId;
use tokio::net::TcpStream;

use super::Error;
use super::connections::{ConnectionPermit, Direction};
use super::context::PodContext;
use super::handshakes::HandshakePermit;
use super::local_dst::{addressed_service, refuse_own_port, require_local_dst, target_port};
use super::sockets::{canonical, reset};
use super::tracker::{ConnectionTracker, reject};
use crate::identity::Identity;

/// Serves one tunnel that a peer opened to the pod.
pub(crate) async fn serve(pod: Rc<PodContext>, transport: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let local = match transport.local_addr() {
        Ok(local) => canonical(local),
        Err(_) => return reset(transport),
    };
    let abort = pod.shutdown.abort.child_token();
    let permit = pod.handshakes.admit(abort.clone());
    let identity = tokio::select! {
        biased;
        () = abort.cancelled() => {
            report_evicted(&pod, peer, local);
            return reset(transport);
        }
        identity = identity(&pod) => identity,
    };
    let identity = match identity {
        Ok(identity) => identity,
        Err(error) => {
            reject(&pod, Direction::Inbound, peer, Some(local), &error);
            return reset(transport);
        }
    };
    let tunnel = Rc::new(Tunnel {
        pod: pod.clone(),
        local,
        identity: OnceCell::new(),
        admission: RefCell::new(Admission::Handshake(permit)),
        is_overload_logged: Cell::new(false),
    });
    let summary = hbone::serve(
        transport,
        &identity.server,
        tunnel.clone(),
        &pod.serve_config,
        pod.shutdown.drain.clone(),
        abort,
    )
    .await;
    drop(identity);
    match (summary.outcome, &*tunnel.admission.borrow()) {
        (ServeOutcome::Aborted, Admission::Handshake(_)) => report_evicted(&pod, peer, local),
        _ => report_failed_tunnel(&pod, peer, local, &summary),
    }
}

/// The pod's current certificates.
async fn identity(pod: &PodContext) -> Result<Arc<Identity>, Error> {
    let identity = {
        let model = pod.store().load();
        model
            .workload(&pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(pod.uid.clone()))?
            .identity
            .clone()
    };
    Ok(pod.identities().ready(&identity).await?)
}

/// Counts and logs a handshake that was evicted. A handshake that ended with its pod is not one.
fn report_evicted(pod: &PodContext, peer: SocketAddr, local: SocketAddr) {
    if !pod.shutdown.abort.is_cancelled() {
        let error = Error::HandshakeLimit;
        reject(pod, Direction::Inbound, peer, Some(local), &error);
    }
}

/// Counts and logs a tunnel that failed, with or without streams: the lines of its streams do not
/// describe what its peer did to the tunnel. A tunnel that ended normally has only those lines.
fn report_failed_tunnel(
    pod: &PodContext,
    peer: SocketAddr,
    local: SocketAddr,
    summary: &ServeSummary,
) {
    let (ServeOutcome::Failed, Some(error)) = (summary.outcome, &summary.error) else {
        return;
    };
    let error = Error::Tunnel(error.clone());
    if summary.streams == 0 {
        return reject(pod, Direction::Inbound, peer, Some(local), &error);
    }
    pod.telemetry()
        .record_failure(Direction::Inbound, error.code());
    let identity = summary.peer.as_ref().map(|peer| &peer.identity);
    tracing::event!(
        target: "access",
        tracing::Level::WARN,
        src.addr = %peer,
        src.identity = identity.map(tracing::field::display),
        dst.addr = %local,
        pod = %pod.uid,
        direction = Direction::Inbound.name(),
        streams = summary.streams,
        error = error.text(),
        reason = error.code(),
        "tunnel failed"
    );
}

/// One inbound tunnel, and the decisions about its streams.
struct Tunnel {
    pod: Rc<PodContext>,
    /// The address that the peer dialled. Every CONNECT must address the same pod address.
    local: SocketAddr,
    /// The peer's verified identity, shared by the trackers of all its streams.
    identity: OnceCell<Arc<SpiffeId>>,
    admission: RefCell<Admission>,
    /// Whether a refusal of excess streams has been logged.
    is_overload_logged: Cell<bool>,
}

/// Which limit of the pod a tunnel counts against.
enum Admission {
    /// The handshake limit. The permit is held for its drop.
    Handshake(#[allow(dead_code)] HandshakePermit),
    /// The connection limit. The permit is held for its drop.
    Connection(#[allow(dead_code)] ConnectionPermit),
    /// None: the peer is verified, and the pod has reached its connection limit.
    Refused,
}

impl Tunnel {
    /// Counts and logs that a verified peer's tunnel or stream is refused unseen.
    fn reject(&self, peer: &Peer, error: &Error) {
        let from = canonical(peer.address);
        let local = Some(self.local);
        reject(&self.pod, Direction::Inbound, from, local, error);
    }
}

impl TunnelService for Tunnel {
    async fn connect(&self, peer: &Peer, request: ConnectRequest) -> Result<Accepted, Rejected> {
        let from = canonical(peer.address);
        let Some(permit) = self.pod.try_admit() else {
            self.reject(peer, &Error::ConnectionLimit);
            return Err(rejection(&Error::ConnectionLimit));
        };
        let mut tracker =
            ConnectionTracker::start(&self.pod, permit, Direction::Inbound, from, self.local);
        match self.establish(peer, from, &request, &mut tracker).await {
            Ok((upstream, response)) => {
                tracker.mark_opened();
                let opts = tracker.relay_opts();
                Ok(Accepted {
                    upstream,
                    response,
                    opts,
                    on_end: Box::new(move |end| tracker.finish(&end)),
                })
            }
            Err(error) => {
                tracker.finish_failed(&error);
                Err(rejection(&error))
            }
        }
    }

    fn accept_tunnel(&self, peer: &Peer) -> bool {
        let permit = self.pod.try_admit();
        let is_admitted = permit.is_some();
        if !is_admitted {
            self.reject(peer, &Error::ConnectionLimit);
        }
        self.admission
            .replace(permit.map_or(Admission::Refused, Admission::Connection));
        is_admitted
    }

    fn on_refused_stream(&self, peer: &Peer) {
        let error = Error::Tunnel(Reason::TooManyStreams.into());
        // A peer can cause this without end: each refusal is counted, and the first is logged.
        if self.is_overload_logged.replace(true) {
            let telemetry = self.pod.telemetry();
            return telemetry.record_failure(Direction::Inbound, error.code());
        }
        self.reject(peer, &error);
    }

    fn on_bad_request(&self, peer: &Peer, reason: Reason, detail: &str) {
        let from = canonical(peer.address);
        self.pod
            .telemetry()
            .record_failure(Direction::Inbound, reason.code());
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

fn rejection(error: &Error) -> Rejected {
    Rejected {
        status: error.connect_status(),
        reason: error.code(),
    }
}

impl Tunnel {
    /// Authorizes a CONNECT and dials the application.
    ///
    /// Authorization comes when the connection is registered, the peer is verified and the target
    /// is known, and before anything reaches the application. A policy that changes during the dial
    /// stops the connection.
    async fn establish(
        &self,
        peer: &Peer,
        from: SocketAddr,
        request: &ConnectRequest,
        tracker: &mut ConnectionTracker,
    ) -> Result<(TcpStream, ConnectResponse), Error> {
        tracker.set_destination(self.local, Some(request.authority.clone()));
        let (target, baggage) = self.resolve(peer, from, request, tracker)?;
        tracker.authorize(target)?;
        let upstream = tracker
            .unless_stopped(self.pod.sockets.dial_from(from.ip(), target))
            .await?;
        let response = ConnectResponse {
            baggage: Some(baggage),
        };
        Ok((upstream, response))
    }

    /// Looks up both sides of a CONNECT in the current model: the target in this pod, and this
    /// pod's baggage for the response. Holds the model for no longer than this.
    fn resolve(
        &self,
        peer: &Peer,
        from: SocketAddr,
        request: &ConnectRequest,
        tracker: &mut ConnectionTracker,
    ) -> Result<(SocketAddr, Baggage), Error> {
        let model = self.pod.store().load();
        let workload = model
            .workload(&self.pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(self.pod.uid.clone()))?;
        let identity = self
            .identity
            .get_or_init(|| Arc::new(peer.identity.clone()))
            .clone();
        let source = self
            .pod
            .source_workload(&model, from.ip(), Some(&identity))
            .cloned();
        tracker.set_source(source, Some(identity));
        let host = request
            .forwarded
            .as_ref()
            .and_then(|forwarded| forwarded.host.as_deref());
        let target = self.target(&model, workload, &request.authority);
        let port = target
            .as_ref()
            .map_or(request.authority.port(), SocketAddr::port);
        tracker.set_target(
            Some(workload.clone()),
            addressed_service(&model, workload, host, port),
        );
        self.require_trust_domain(workload, peer)?;
        Ok((target?, baggage(workload)))
    }

    fn require_trust_domain(&self, workload: &Workload, peer: &Peer) -> Result<(), Error> {
        let trust_domain = peer.identity.trust_domain();
        if self.pod.same_trust_domain(&workload.identity, trust_domain) {
            return Ok(());
        }
        Err(Error::ForeignTrustDomain(trust_domain.to_string()))
    }

    /// The address in the pod that an authority names. Its IP is always the one that the peer
    /// dialled, so a host name cannot lead to another address.
    fn target(
        &self,
        model: &Model,
        workload: &Workload,
        authority: &Authority,
    ) -> Result<SocketAddr, Error> {
        let not_this_pod = || Error::NotThisPod {
            authority: authority.to_string(),
        };
        let target = match authority {
            Authority::Address(address) => canonical(*address),
            Authority::Host { name, port } => {
                let port = target_port(model, workload, name, *port).ok_or_else(not_this_pod)?;
                SocketAddr::new(self.local.ip(), port)
            }
        };
        refuse_own_port(target)?;
        if target.ip() != self.local.ip() {
            return Err(not_this_pod());
        }
        require_local_dst(workload, target)?;
        Ok(target)
    }
}

/// A workload's `baggage` header.
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
