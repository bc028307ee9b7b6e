//! Keeps a certificate for every identity that runs here.

mod task;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use spiffe::SpiffeId;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::slots::{IdentityStatus, Now, Priority};
use super::{Certificate, CertificateSource, TrustBundle};

pub use task::RenewalTask;

/// Tells the time of day; another one than the system's in tests.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// How certificates are kept.
#[derive(Clone)]
pub struct CertificatesConfig {
    /// Life of a leaf.
    pub ttl: Duration,
    /// How many are issued at a time.
    pub concurrency: usize,
    /// How long issuing one may take.
    pub deadline: Duration,
    /// The time of day.
    pub clock: Clock,
}

impl Default for CertificatesConfig {
    fn default() -> Self {
        Self {
            // Istio's default.
            ttl: Duration::from_secs(24 * 3600),
            // What a node starts with is tens of identities; a source is not to feel that as one.
            concurrency: 8,
            deadline: Duration::from_secs(10),
            clock: Arc::new(SystemTime::now),
        }
    }
}

impl fmt::Debug for CertificatesConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificatesConfig")
            .field("ttl", &self.ttl)
            .field("concurrency", &self.concurrency)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// The certificates of this node's identities. Clones share them.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

struct Shared {
    wanted: watch::Sender<Arc<BTreeSet<SpiffeId>>>,
    needed: Mutex<BTreeMap<SpiffeId, Priority>>,
    /// Something was added to `needed`.
    need: Notify,
    version: watch::Sender<u64>,
    state: ArcSwap<CertificatesState>,
    clock: Clock,
}

/// What there is at one moment: certificates and whom to trust belong together.
#[derive(Clone, Debug, Default)]
pub struct CertificatesState {
    /// How each wanted identity stands; sorted by identity.
    pub identities: Vec<IdentityStatus>,
    /// Whom peers must chain to; empty until the source knows.
    pub bundle: Arc<TrustBundle>,
    /// What has happened so far.
    pub counters: Counters,
}

/// Counts of what has happened since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Certificates that were issued for identities that had none before.
    pub first_issues: u64,
    /// Certificates that took the place of others.
    pub renewals: u64,
    /// Attempts that failed, by reason code.
    pub failures: BTreeMap<&'static str, u64>,
}

impl Certificates {
    /// The handle and the task that serves it.
    pub fn new(
        source: Arc<dyn CertificateSource>,
        config: CertificatesConfig,
    ) -> (Self, RenewalTask) {
        let (wanted, receiver) = watch::channel(Arc::default());
        let shared = Arc::new(Shared {
            wanted,
            needed: Mutex::default(),
            need: Notify::new(),
            version: watch::Sender::new(0),
            state: ArcSwap::default(),
            clock: config.clock.clone(),
        });
        let task = RenewalTask::new(shared.clone(), receiver, source, config);
        (Self(shared), task)
    }

    /// Says which identities run here now. New ones are issued at once; others are forgotten, and
    /// their keys wiped as soon as nobody uses them.
    pub fn set_identities(&self, identities: BTreeSet<SpiffeId>) {
        let identities = Arc::new(identities);
        self.0.wanted.send_if_modified(|wanted| {
            let modified = **wanted != *identities;
            *wanted = identities;
            modified
        });
    }

    /// Somebody waits for this identity's certificate: it is tried about once a second, whatever has
    /// failed before, and if it is a connection that waits, before all others. Holds for two seconds;
    /// whoever waits longer says it again. Says nothing of identities that are not wanted.
    pub fn prioritize(&self, identity: &SpiffeId, need: Priority) {
        if !self.0.wanted.borrow().contains(identity) {
            return;
        }
        let mut needed = self.0.needed.lock().unwrap_or_else(PoisonError::into_inner);
        let most = needed.get(identity).map_or(need, |other| need.max(*other));
        needed.insert(identity.clone(), most);
        self.0.need.notify_one();
    }

    /// The certificate of an identity, unless it has none or it has expired. Takes no lock.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Certificate>> {
        let state = self.0.state.load();
        let by_identity = |status: &IdentityStatus| status.identity.cmp(identity);
        let found = state.identities.binary_search_by(by_identity).ok()?;
        let certificate = state.identities[found].certificate.as_ref()?;
        self.is_valid(certificate).then(|| certificate.clone())
    }

    /// Whether a certificate has not expired yet. Clocks that are set by up to five minutes end none.
    pub fn is_valid(&self, certificate: &Certificate) -> bool {
        !self.0.now().is_after(certificate)
    }

    /// How everything stands.
    pub fn state(&self) -> Arc<CertificatesState> {
        self.0.state.load_full()
    }

    /// Tells of every certificate that is new, forgotten or expired, of every failure, and of every
    /// other bundle; the value counts.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }
}

impl Shared {
    fn now(&self) -> Now {
        Now {
            wall: (self.clock)(),
            steady: Instant::now(),
        }
    }

    fn publish(&self, state: CertificatesState) {
        self.state.store(Arc::new(state));
        self.version.send_modify(|version| *version += 1);
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.load();
        let identities = state.identities.iter();
        let identities: Vec<String> = identities.map(|one| one.identity.to_string()).collect();
        f.debug_struct("Certificates")
            .field("identities", &identities)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
