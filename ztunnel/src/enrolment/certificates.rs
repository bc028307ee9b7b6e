//! The first certificate of each pod that is brought in: fetched beside its capture, for as long as
//! it takes. An authority that is down keeps no pod out of the mesh, or it would be open to everybody
//! and speak in clear.

use mesh::WorkloadUid;
use spiffe::SpiffeId;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::identity::{Identities, IdentityError};

/// Outcomes that may wait for the reconciler, which takes them as they come.
const OUTCOMES: usize = 256;

/// What became of a wait so far: the pod can prove who it is, or cannot yet.
pub(super) type Outcome = Result<(), IdentityError>;

/// Which pod's wait for which identity has had what outcome.
pub(super) type Told = (WorkloadUid, SpiffeId, Outcome);

/// One pod's wait.
pub(super) struct FirstCertificate {
    of: SpiffeId,
    outcome: Outcome,
    told: bool,
    _wait: DropGuard,
}

impl FirstCertificate {
    /// Whose it is.
    pub(super) fn identity(&self) -> &SpiffeId {
        &self.of
    }

    /// As of now.
    pub(super) fn outcome(&self) -> Outcome {
        self.outcome
    }

    /// Whether something has come of it: a certificate, or a while without one.
    pub(super) fn told(&self) -> bool {
        self.told
    }

    /// Takes over what came of it. False if that is no news.
    pub(super) fn tell(&mut self, outcome: Outcome) -> bool {
        let first = !std::mem::replace(&mut self.told, true);
        let before = std::mem::replace(&mut self.outcome, outcome);
        first || before != outcome
    }
}

/// The waits of all pods.
pub(super) struct FirstCertificates {
    identities: Identities,
    waits: JoinSet<()>,
    tell: mpsc::Sender<Told>,
    told: mpsc::Receiver<Told>,
}

impl FirstCertificates {
    pub(super) fn new(identities: Identities) -> Self {
        let (tell, told) = mpsc::channel(OUTCOMES);
        Self {
            identities,
            waits: JoinSet::new(),
            tell,
            told,
        }
    }

    /// Waits for a certificate of this pod's identity until there is one, or the answer is dropped.
    pub(super) fn wait(&mut self, uid: &WorkloadUid, identity: &SpiffeId) -> FirstCertificate {
        let stop = CancellationToken::new();
        let (stopped, identities) = (stop.clone(), self.identities.clone());
        let (uid, wanted, tell) = (uid.clone(), identity.clone(), self.tell.clone());
        let until_there = async move {
            loop {
                // Takes seconds when there is none.
                let outcome = identities.ready_for_pod(&wanted).await.map(drop);
                let told = (uid.clone(), wanted.clone(), outcome);
                if tell.send(told).await.is_err() || outcome.is_ok() {
                    return;
                }
            }
        };
        self.waits.spawn(async move {
            tokio::select! {
                () = stopped.cancelled() => {}
                () = until_there => {}
            }
        });
        FirstCertificate {
            of: identity.clone(),
            outcome: Err(IdentityError::Pending),
            told: false,
            _wait: stop.drop_guard(),
        }
    }

    /// The next outcome of any pod.
    pub(super) async fn next(&mut self) -> Told {
        loop {
            tokio::select! {
                biased;
                Some(outcome) = self.told.recv() => return outcome,
                Some(_) = self.waits.join_next() => {}
                // There is always a sender: this value's own.
                else => std::future::pending().await,
            }
        }
    }

    /// Ends all waits.
    pub(super) async fn stop(&mut self) {
        self.waits.shutdown().await;
    }
}
