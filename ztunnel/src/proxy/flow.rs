//! The account of one connection: registered at its start, counted and logged exactly once at its
//! end, whatever the end is.

use std::fmt::Display;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hbone::{Authority, RelayOpts, RelayOutcome, RelaySummary, Side, StopToken};
use mesh::{EndpointLease, Service, Workload};
use spiffe::SpiffeId;
use tokio::time::Instant;

use super::Error;
use super::error::{flags_of, text_of};
use crate::dataplane::PodContext;
use crate::dataplane::registry::{Connection, Direction, Registered, Request, Slot};
use crate::telemetry::{Ended, Open, Parties, ResponseFlags};

/// The code of a connection that ended as its two ends wanted.
const CLOSED: &str = "closed";

/// One connection from its acceptance to its line in the access log.
pub(super) struct Flow {
    pod: Rc<PodContext>,
    registered: Registered,
    parties: Parties,
    /// Where it goes on the network, as far as that is known.
    destination: SocketAddr,
    authority: Option<Authority>,
    started: Instant,
    lease: Option<EndpointLease>,
    ended: bool,
    _open: Open,
}

impl Flow {
    /// Registers a connection of `direction` from `source` to where its opener wanted to go.
    pub(super) fn begin(
        pod: &Rc<PodContext>,
        slot: Slot,
        direction: Direction,
        source: SocketAddr,
        wanted: SocketAddr,
    ) -> Self {
        Self {
            registered: pod.register(slot, Connection::new(direction, source, wanted)),
            parties: Parties {
                reporter: direction,
                source: None,
                source_identity: None,
                destination: None,
                service: None,
                mutual_tls: false,
            },
            destination: wanted,
            authority: None,
            started: Instant::now(),
            lease: None,
            ended: false,
            _open: pod.telemetry.open(direction),
            pod: pod.clone(),
        }
    }

    /// The signal that ends this connection from anywhere.
    pub(super) fn stop(&self) -> StopToken {
        self.registered.stop.clone()
    }

    /// What the relay counts in and is stopped by.
    pub(super) fn relay_opts(&self) -> RelayOpts {
        RelayOpts {
            counters: self.registered.counters.clone(),
            stop: self.stop(),
            ..RelayOpts::default()
        }
    }

    /// Who opened it. `identity` is what it proved; the workload alone proves nothing.
    pub(super) fn from(
        &mut self,
        workload: Option<Arc<Workload>>,
        identity: Option<Arc<SpiffeId>>,
    ) {
        self.parties.mutual_tls = identity.is_some();
        self.parties.source = workload;
        self.parties.source_identity = identity;
    }

    /// Whom it reaches.
    pub(super) fn to(&mut self, workload: Option<Arc<Workload>>, service: Option<Arc<Service>>) {
        self.parties.destination = workload;
        self.parties.service = service;
    }

    /// Where it goes on the network, and what the CONNECT asks for if it goes through a tunnel.
    pub(super) fn via(&mut self, destination: SocketAddr, authority: Option<Authority>) {
        self.destination = destination;
        self.authority = authority;
    }

    /// What counts it at its endpoint.
    pub(super) fn hold(&mut self, lease: EndpointLease) {
        self.lease = Some(lease);
    }

    /// Asks the policies whether the source may reach `destination` in the pod.
    ///
    /// The order keeps a connection from slipping between a policy and its check: first what it
    /// asks for is written where every re-check finds it, and only then the model is loaded that
    /// decides. A policy that is not in this model comes with a re-check that sees the connection.
    pub(super) fn authorize(&self, destination: SocketAddr) -> Result<(), Error> {
        let request = self.registered.asks(Request {
            identity: self.parties.source_identity.clone(),
            destination,
        });
        let model = self.pod.store.load();
        let workload = model
            .workload(&self.pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(self.pod.uid.clone()))?;
        self.pod
            .authorize(&model, workload, &self.registered, request)
            .map_err(Error::Denied)
    }

    /// Both sides are connected: from now on it counts as opened and its bytes are reported while
    /// it lives.
    pub(super) fn opened(&self) {
        // Set once; a connection opens once.
        let _ = self.registered.actual_destination.set(self.destination);
        let _ = self.registered.hbone.set(self.authority.is_some());
        self.registered
            .opened(self.pod.telemetry.series(&self.parties));
    }

    /// Waits for `work` unless somebody stops the connection first.
    pub(super) async fn unless_stopped<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            reason = self.registered.stop.stopped() => Err(self.stopped(reason)),
            result = work => result,
        }
    }

    /// Why somebody ended it: the policy, if that is why.
    pub(super) fn stopped(&self, reason: &'static str) -> Error {
        match self.registered.denial() {
            Some(denial) => Error::Denied(denial.clone()),
            None => Error::Stopped(reason),
        }
    }

    /// It never carried a byte.
    pub(super) fn failed(mut self, error: &Error) {
        tracing::debug!(fault = ?error.fault(), reason = error.code(), "a connection failed");
        self.fail(error);
    }

    /// It carried bytes and has ended.
    pub(super) fn closed(mut self, end: &RelaySummary) {
        match &end.outcome {
            RelayOutcome::Closed => self.end(None, CLOSED, None),
            // What the applications do to their connection is theirs to do, and no failure of the
            // mesh.
            RelayOutcome::Reset {
                by: Side::Downstream,
            } => self.end(None, "reset_by_downstream", None),
            RelayOutcome::Reset { by: Side::Upstream } => self.end(None, "reset_by_upstream", None),
            RelayOutcome::Stopped { reason } => self.fail(&self.stopped(reason)),
            RelayOutcome::Failed(error) => {
                let reason = error.reason();
                let text = text_of(error);
                self.end(Some((&text, flags_of(reason))), reason.code(), None);
            }
        }
    }

    fn fail(&mut self, error: &Error) {
        let failure = Some((&error.text() as &dyn Display, error.flags()));
        self.end(failure, error.code(), error.policy());
    }

    fn end(
        &mut self,
        failure: Option<(&dyn Display, ResponseFlags)>,
        reason: &str,
        policy: Option<&Arc<str>>,
    ) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // One that failed before it opened is opened and closed at once, so that the two counters
        // always meet.
        if self.registered.series().is_none() {
            self.registered
                .opened(self.pod.telemetry.series(&self.parties));
        }
        self.registered.report();
        if let Some(series) = self.registered.series() {
            series.closed();
            if let Some((_, flags)) = failure {
                series.failed(flags);
            }
        }
        if failure.is_some() {
            self.pod.telemetry.failed(self.parties.reporter, reason);
        }
        if let Some(policy) = policy {
            self.pod.telemetry.denied(policy);
        }
        self.pod.telemetry.access(&Ended {
            parties: &self.parties,
            source: self.registered.source,
            destination: self.destination,
            hbone: self
                .authority
                .as_ref()
                .map(|authority| authority as &dyn Display),
            sent: self.registered.counters.sent.load(Ordering::Relaxed),
            received: self.registered.counters.received.load(Ordering::Relaxed),
            duration: self.started.elapsed(),
            error: failure.map(|(error, _)| error),
            reason,
            policy: policy.map(AsRef::as_ref),
        });
    }
}

impl Drop for Flow {
    /// Whoever served it was dropped: its opener gave up while it was being connected.
    fn drop(&mut self) {
        let error = self.stopped(self.registered.stop.reason().unwrap_or("cancelled"));
        self.fail(&error);
    }
}

#[cfg(test)]
mod tests;
