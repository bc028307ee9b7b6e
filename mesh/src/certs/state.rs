//! What do the handle [`Certificates`](super::Certificates) and the task
//! [`RenewalTask`](super::RenewalTask) share?

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use spiffe::SpiffeId;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::clock::{Clock, Now};
use super::store::{IdentityStatus, Priority};
use super::trust_bundle::TrustBundle;

/// A consistent snapshot of all certificates and of the trust bundle.
#[derive(Clone, Debug, Default)]
pub struct CertificatesState {
    /// The status of each identity of the node, sorted by identity.
    pub identities: Vec<IdentityStatus>,
    /// The roots that peers must chain to. Empty until the source has published them.
    pub bundle: Arc<TrustBundle>,
    /// Counts since the start.
    pub counters: Counters,
}

/// Counts since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Certificates that were issued to identities without one.
    pub first_issues: u64,
    /// Certificates that replaced others.
    pub renewals: u64,
    /// Failed requests, by reason code.
    pub failures: BTreeMap<&'static str, u64>,
}

pub(super) struct Shared {
    /// The identities of the node.
    pub(super) identities: watch::Sender<Arc<BTreeSet<SpiffeId>>>,
    /// Identities that were prioritized and that the task has not taken yet.
    priorities: Mutex<BTreeMap<SpiffeId, Priority>>,
    /// Notified when `priorities` gets an entry.
    pub(super) priority_added: Notify,
    /// Incremented with every published state.
    pub(super) version: watch::Sender<u64>,
    pub(super) state: ArcSwap<CertificatesState>,
    clock: Clock,
}

impl Shared {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            identities: watch::Sender::default(),
            priorities: Mutex::default(),
            priority_added: Notify::new(),
            version: watch::Sender::new(0),
            state: ArcSwap::default(),
            clock,
        }
    }

    pub(super) fn now(&self) -> Now {
        Now {
            wall: (self.clock)(),
            monotonic: Instant::now(),
        }
    }

    pub(super) fn publish(&self, state: CertificatesState) {
        self.state.store(Arc::new(state));
        self.version.send_modify(|version| *version += 1);
    }

    pub(super) fn priorities(&self) -> MutexGuard<'_, BTreeMap<SpiffeId, Priority>> {
        self.priorities
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
