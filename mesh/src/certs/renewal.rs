//! Keeps a certificate for every identity that runs here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::slots::{IdentityStatus, Now, Slots};
use super::verify::verify;
use super::{Certificate, CertificateSource, IssueError, Issued, TrustBundle};

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

/// Timers stand still while a machine sleeps, certificates do not: the clock is looked at this
/// often whatever is due.
const LOOK: Duration = Duration::from_secs(30);

/// The certificates of this node's identities. Clones share them.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

struct Shared {
    wanted: watch::Sender<Arc<BTreeSet<SpiffeId>>>,
    version: watch::Sender<u64>,
    current: ArcSwap<BTreeMap<SpiffeId, Arc<Certificate>>>,
    status: ArcSwap<Vec<IdentityStatus>>,
    bundle: ArcSwap<TrustBundle>,
    clock: Clock,
}

/// The task that issues and renews; whoever made it runs it once, and owns it.
pub struct RenewalTask {
    shared: Arc<Shared>,
    wanted: watch::Receiver<Arc<BTreeSet<SpiffeId>>>,
    source: Arc<dyn CertificateSource>,
    config: CertificatesConfig,
    slots: Slots,
    jobs: JoinSet<(SpiffeId, Result<Issued, IssueError>)>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
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
            version: watch::Sender::new(0),
            current: ArcSwap::default(),
            status: ArcSwap::default(),
            bundle: ArcSwap::new(source.bundle().borrow().clone()),
            clock: config.clock.clone(),
        });
        let task = RenewalTask {
            shared: shared.clone(),
            wanted: receiver,
            bundle: source.bundle(),
            source,
            config,
            slots: Slots::default(),
            jobs: JoinSet::new(),
        };
        (Self(shared), task)
    }

    /// Says which identities run here now. New ones are issued at once; others are forgotten, and
    /// their keys wiped as soon as nobody uses them.
    pub fn wanted(&self, identities: BTreeSet<SpiffeId>) {
        let identities = Arc::new(identities);
        self.0.wanted.send_if_modified(|wanted| {
            let modified = **wanted != *identities;
            *wanted = identities;
            modified
        });
    }

    /// The certificate of an identity, unless it has none or it has expired. Takes no lock.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Certificate>> {
        let certificate = self.0.current.load().get(identity)?.clone();
        ((self.0.clock)() < certificate.not_after).then_some(certificate)
    }

    /// A connection waits for this identity's certificate: it is asked for next, and about once a
    /// second, for as long as this is said at least that often.
    pub fn need(&self, _identity: &SpiffeId) {}

    /// Whom peers must chain to.
    pub fn bundle(&self) -> Arc<TrustBundle> {
        self.0.bundle.load_full()
    }

    /// How each wanted identity stands.
    pub fn status(&self) -> Arc<Vec<IdentityStatus>> {
        self.0.status.load_full()
    }

    /// Tells of every certificate that is new, forgotten or expired; the value counts.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let identities: Vec<String> = self
            .0
            .current
            .load()
            .keys()
            .map(ToString::to_string)
            .collect();
        f.debug_struct("Certificates")
            .field("identities", &identities)
            .finish_non_exhaustive()
    }
}

impl RenewalTask {
    /// Serves until cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let now = (self.config.clock)();
            let wanted = self.wanted.borrow_and_update().clone();
            if self.slots.want(&wanted, now) | self.slots.expire(now) {
                self.publish();
            }
            self.start(now);
            let pause = self.pause(now);
            tokio::select! {
                () = stop.cancelled() => break,
                // The handle may be gone; then nothing more is wanted, and stop ends this.
                Ok(()) = self.wanted.changed() => {}
                Some(Ok((identity, outcome))) = self.jobs.join_next() => {
                    self.finish(&identity, outcome);
                }
                () = sleep(pause) => {}
            }
        }
        self.jobs.shutdown().await;
    }

    fn start(&mut self, now: SystemTime) {
        let free = self.config.concurrency.saturating_sub(self.jobs.len());
        for identity in self.slots.start(now, free) {
            let (source, ttl) = (self.source.clone(), self.config.ttl);
            let deadline = self.config.deadline;
            self.jobs.spawn(async move {
                let issued = timeout(deadline, source.issue(&identity, ttl)).await;
                let outcome = issued.unwrap_or_else(|_| {
                    let message = format!("not issued within {deadline:?}");
                    Err(IssueError {
                        identity: identity.clone(),
                        code: "issue_timeout",
                        message,
                    })
                });
                (identity, outcome)
            });
        }
    }

    fn finish(&mut self, identity: &SpiffeId, outcome: Result<Issued, IssueError>) {
        let now = (self.config.clock)();
        let both = Now {
            wall: now,
            steady: tokio::time::Instant::now(),
        };
        let bundle = self.bundle.borrow().clone();
        let outcome = outcome.and_then(|issued| verify(issued, identity, &bundle, both));
        match &outcome {
            Ok(certificate) => info!(
                target: "mesh::certs",
                %identity,
                serial = certificate.serial,
                "certificate issued"
            ),
            Err(error) => warn!(target: "mesh::certs", "{error}"),
        }
        self.slots.finish(identity, outcome, now, fastrand::f64());
        self.publish();
    }

    fn publish(&self) {
        self.shared
            .current
            .store(Arc::new(self.slots.certificates()));
        self.shared.status.store(Arc::new(self.slots.status()));
        self.shared.version.send_modify(|version| *version += 1);
    }

    /// With all places taken, what is due waits for an outcome and not for a time.
    fn pause(&self, now: SystemTime) -> Duration {
        let next = self
            .slots
            .next()
            .and_then(|next| next.duration_since(now).ok());
        match self.jobs.len() < self.config.concurrency {
            true => next.unwrap_or(LOOK).clamp(Duration::from_millis(1), LOOK),
            false => LOOK,
        }
    }
}

#[cfg(test)]
mod tests;
