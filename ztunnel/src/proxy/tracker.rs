//! Tracks one connection: registers it at its start, and counts and logs it exactly once at its
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
use super::connections::{AuthzRequest, Connection, ConnectionPermit, Direction, Registration};
use super::context::PodContext;
use super::error::{flags_of, text_of};
use crate::telemetry::{AccessLogEntry, ConnectionLabels, OpenConnectionGuard, ResponseFlags};

/// The reason code of a connection that both sides ended with FIN.
const CLOSED: &str = "closed";

/// One connection from its acceptance to its line in the access log.
pub(super) struct ConnectionTracker {
    pod: Rc<PodContext>,
    registration: Registration,
    labels: ConnectionLabels,
    /// The address on the network, as far as it is decided.
    destination: SocketAddr,
    authority: Option<Authority>,
    started: Instant,
    lease: Option<EndpointLease>,
    is_recorded: bool,
    _open: OpenConnectionGuard,
}

impl ConnectionTracker {
    /// Registers a connection from `source` to `original_dst`.
    pub(super) fn start(
        pod: &Rc<PodContext>,
        permit: ConnectionPermit,
        direction: Direction,
        source: SocketAddr,
        original_dst: SocketAddr,
    ) -> Self {
        Self {
            registration: pod.register(permit, Connection::new(direction, source, original_dst)),
            labels: ConnectionLabels {
                reporter: direction,
                source: None,
                source_identity: None,
                destination: None,
                service: None,
                mutual_tls: false,
            },
            destination: original_dst,
            authority: None,
            started: Instant::now(),
            lease: None,
            is_recorded: false,
            _open: pod.telemetry().track_open(direction),
            pod: pod.clone(),
        }
    }

    /// The signal that stops this connection from any thread.
    pub(super) fn stop_signal(&self) -> StopToken {
        self.registration.stop.clone()
    }

    /// The relay's counters and stop signal.
    pub(super) fn relay_opts(&self) -> RelayOpts {
        RelayOpts {
            counters: self.registration.counters.clone(),
            stop: self.stop_signal(),
            ..RelayOpts::default()
        }
    }

    /// Sets the source. `identity` is the verified one; the workload alone verifies nothing.
    pub(super) fn set_source(
        &mut self,
        workload: Option<Arc<Workload>>,
        identity: Option<Arc<SpiffeId>>,
    ) {
        self.labels.mutual_tls = identity.is_some();
        self.labels.source = workload;
        self.labels.source_identity = identity;
    }

    /// Sets the workload that the connection reaches, and the service that it addresses.
    pub(super) fn set_target(
        &mut self,
        workload: Option<Arc<Workload>>,
        service: Option<Arc<Service>>,
    ) {
        self.labels.destination = workload;
        self.labels.service = service;
    }

    /// Sets the address on the network and, for a tunnel, the authority of the CONNECT.
    pub(super) fn set_destination(&mut self, address: SocketAddr, authority: Option<Authority>) {
        self.destination = address;
        self.authority = authority;
    }

    /// Keeps the lease that counts the connection at its endpoint.
    pub(super) fn attach_lease(&mut self, lease: EndpointLease) {
        self.lease = Some(lease);
    }

    /// Evaluates whether the source may reach `destination` in the pod.
    ///
    /// The order keeps a connection from slipping between a policy change and its check: first the
    /// request is stored where every reauthorization finds it, and only then the model is loaded
    /// that decides. A policy that is not in this model comes with a reauthorization that finds the
    /// connection.
    pub(super) fn authorize(&self, destination: SocketAddr) -> Result<(), Error> {
        let request = self.registration.set_request(AuthzRequest {
            identity: self.labels.source_identity.clone(),
            destination,
        });
        let model = self.pod.store().load();
        let workload = model
            .workload(&self.pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(self.pod.uid.clone()))?;
        self.pod
            .authorize(&model, workload, &self.registration, request)
            .map_err(Error::Denied)
    }

    /// Counts the connection as opened: both sides are connected. From now on its bytes are
    /// reported periodically.
    pub(super) fn mark_opened(&self) {
        // Each is set once, because a connection opens once.
        let _ = self.registration.actual_destination.set(self.destination);
        let _ = self.registration.hbone.set(self.authority.is_some());
        self.registration
            .mark_opened(self.pod.telemetry().traffic_series(&self.labels));
    }

    /// Runs `work` until it ends or the connection is stopped.
    pub(super) async fn unless_stopped<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            biased;
            reason = self.registration.stop.stopped() => Err(self.stop_error(reason)),
            result = work => result,
        }
    }

    /// The error for a stop with this reason; names the policy if a denial was the reason.
    pub(super) fn stop_error(&self, reason: &'static str) -> Error {
        match self.registration.denial() {
            Some(denial) => Error::Denied(denial.clone()),
            None => Error::Stopped(reason),
        }
    }

    /// Records a connection that failed before it was relayed.
    pub(super) fn finish_failed(mut self, error: &Error) {
        tracing::debug!(fault = ?error.fault(), reason = error.code(), "a connection failed");
        self.record_failure(error);
    }

    /// Records a connection whose relay has ended.
    pub(super) fn finish(mut self, summary: &RelaySummary) {
        match &summary.outcome {
            RelayOutcome::Closed => self.record(None, CLOSED, None),
            // A reset by an application is no failure of the mesh.
            RelayOutcome::Reset {
                by: Side::Downstream,
            } => self.record(None, "reset_by_downstream", None),
            RelayOutcome::Reset { by: Side::Upstream } => {
                self.record(None, "reset_by_upstream", None);
            }
            RelayOutcome::Stopped { reason } => self.record_failure(&self.stop_error(reason)),
            RelayOutcome::Failed(error) => {
                let reason = error.reason();
                let text = text_of(error);
                self.record(Some((&text, flags_of(reason))), reason.code(), None);
            }
        }
    }

    fn record_failure(&mut self, error: &Error) {
        let failure = Some((&error.text() as &dyn Display, error.response_flags()));
        self.record(failure, error.code(), error.policy());
    }

    fn record(
        &mut self,
        failure: Option<(&dyn Display, ResponseFlags)>,
        reason: &str,
        policy: Option<&Arc<str>>,
    ) {
        if std::mem::replace(&mut self.is_recorded, true) {
            return;
        }
        self.count(failure.map(|(_, flags)| flags), reason, policy);
        self.pod.telemetry().log_access(&AccessLogEntry {
            labels: &self.labels,
            source: self.registration.source,
            destination: self.destination,
            hbone: self
                .authority
                .as_ref()
                .map(|authority| authority as &dyn Display),
            sent: self.registration.counters.sent.load(Ordering::Relaxed),
            received: self.registration.counters.received.load(Ordering::Relaxed),
            duration: self.started.elapsed(),
            error: failure.map(|(error, _)| error),
            reason,
            policy: policy.map(AsRef::as_ref),
        });
    }

    fn count(&self, failure: Option<ResponseFlags>, reason: &str, policy: Option<&Arc<str>>) {
        let telemetry = self.pod.telemetry();
        // A connection that failed before it opened counts as opened and closed, so that the two
        // counters always meet.
        if self.registration.series().is_none() {
            self.registration
                .mark_opened(telemetry.traffic_series(&self.labels));
        }
        self.registration.report_bytes();
        if let Some(series) = self.registration.series() {
            series.record_closed();
            if let Some(flags) = failure {
                series.record_failure(flags);
            }
        }
        if failure.is_some() {
            telemetry.record_failure(self.labels.reporter, reason);
        }
        if let Some(policy) = policy {
            telemetry.record_denial(policy);
        }
    }
}

impl Drop for ConnectionTracker {
    /// Records a connection whose task was dropped: the peer reset its stream while the application
    /// was dialled.
    fn drop(&mut self) {
        let reason = self.registration.stop.reason().unwrap_or("cancelled");
        self.record_failure(&self.stop_error(reason));
    }
}

/// Counts and logs a connection that is refused before it is registered.
pub(super) fn reject(
    pod: &PodContext,
    direction: Direction,
    peer: SocketAddr,
    original_dst: Option<SocketAddr>,
    error: &Error,
) {
    pod.telemetry().record_failure(direction, error.code());
    tracing::event!(
        target: "access",
        tracing::Level::WARN,
        src.addr = %peer,
        dst.addr = original_dst.map(tracing::field::display),
        pod = %pod.uid,
        direction = direction.name(),
        error = error.text(),
        reason = error.code(),
        "connection failed"
    );
}

#[cfg(test)]
mod tests;
