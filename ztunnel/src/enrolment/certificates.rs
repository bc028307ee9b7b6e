//! The wait for the first certificate of each pod's identity.
//!
//! It runs in parallel with the pod's capture and takes as long as necessary. An unavailable
//! certificate authority must not keep a pod out of the mesh: an uncaptured pod would accept any
//! connection and send plaintext.

use mesh::WorkloadUid;
use spiffe::SpiffeId;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::identity::{Identities, IdentityError};

/// Outcomes that may be queued for the reconciler.
const MAX_QUEUED_OUTCOMES: usize = 256;

/// Whether the pod's identity has a certificate.
pub(super) type Outcome = Result<(), IdentityError>;

/// The outcome of one pod's wait for a certificate of this identity.
pub(super) type Report = (WorkloadUid, SpiffeId, Outcome);

/// One pod's wait. Ends when dropped.
pub(super) struct FirstCertificate {
    identity: SpiffeId,
    outcome: Outcome,
    is_reported: bool,
    _wait: DropGuard,
}

impl FirstCertificate {
    /// The identity for which a certificate is awaited.
    pub(super) fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The latest outcome.
    pub(super) fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// Whether an outcome was recorded: a certificate, or a timeout.
    pub(super) fn is_reported(&self) -> bool {
        self.is_reported
    }

    /// Records an outcome. Returns whether it differs from the previous one.
    pub(super) fn record(&mut self, outcome: Outcome) -> bool {
        let is_first = !std::mem::replace(&mut self.is_reported, true);
        let before = std::mem::replace(&mut self.outcome, outcome);
        is_first || before != outcome
    }
}

/// The waits of all pods.
pub(super) struct FirstCertificates {
    identities: Identities,
    waits: JoinSet<()>,
    sender: mpsc::Sender<Report>,
    reports: mpsc::Receiver<Report>,
}

impl FirstCertificates {
    pub(super) fn new(identities: Identities) -> Self {
        let (sender, reports) = mpsc::channel(MAX_QUEUED_OUTCOMES);
        Self {
            identities,
            waits: JoinSet::new(),
            sender,
            reports,
        }
    }

    /// Starts to wait for a certificate of this pod's identity, until there is one or the returned
    /// value is dropped.
    pub(super) fn wait(&mut self, uid: &WorkloadUid, identity: &SpiffeId) -> FirstCertificate {
        let stop = CancellationToken::new();
        let (stopped, identities) = (stop.clone(), self.identities.clone());
        let (uid, wanted, sender) = (uid.clone(), identity.clone(), self.sender.clone());
        let until_issued = async move {
            loop {
                // Returns an error after a few seconds without a certificate.
                let outcome = identities.ready_for_pod(&wanted).await.map(drop);
                let report = (uid.clone(), wanted.clone(), outcome);
                if sender.send(report).await.is_err() || outcome.is_ok() {
                    return;
                }
            }
        };
        self.waits.spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = until_issued => {}
            }
        });
        FirstCertificate {
            identity: identity.clone(),
            outcome: Err(IdentityError::Pending),
            is_reported: false,
            _wait: stop.drop_guard(),
        }
    }

    /// Waits for the next outcome of any pod. Cancel safe.
    pub(super) async fn next(&mut self) -> Report {
        loop {
            tokio::select! {
                biased;
                Some(report) = self.reports.recv() => return report,
                Some(_) = self.waits.join_next() => {}
                // Not reached: `self.sender` keeps the channel open.
                else => std::future::pending().await,
            }
        }
    }

    /// Stops all waits.
    pub(super) async fn stop(&mut self) {
        self.waits.shutdown().await;
    }
}
