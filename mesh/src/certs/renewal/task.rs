//! The task that issues and renews.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{CertificatesConfig, CertificatesState, Counters, Shared};
use crate::certs::slots::{Attempt, CertStore, Finished, Got};
use crate::certs::verify::verify;
use crate::certs::{CertificateSource, IssueError, IssuedCertificate, TrustBundle, UpdateCounts};

/// The time of day can be set, and timers stand still while a machine sleeps: the clocks are looked
/// at this often whatever is due.
const LOOK: Duration = Duration::from_secs(30);
/// What happens within so much time is published together: with thousands of identities to start
/// with, each publication is about all of them.
const PUBLISH: Duration = Duration::from_millis(10);
/// An attempt that was under way for longer when the source came back may wait for nobody.
const STALE: Duration = Duration::from_secs(1);

/// The task that issues and renews; whoever made it runs it once, and owns it.
pub struct RenewalTask {
    shared: Arc<Shared>,
    source: Arc<dyn CertificateSource>,
    config: CertificatesConfig,
    wanted: watch::Receiver<Arc<BTreeSet<SpiffeId>>>,
    bundles: watch::Receiver<Arc<TrustBundle>>,
    rotations: Option<watch::Receiver<UpdateCounts>>,
    /// What of each was taken over.
    taken: Arc<BTreeSet<SpiffeId>>,
    seen: UpdateCounts,
    /// The last bundle that was not empty.
    bundle: Arc<TrustBundle>,
    slots: CertStore,
    counters: Counters,
    jobs: JoinSet<Result<IssuedCertificate, IssueError>>,
    flights: HashMap<Id, Flight>,
    /// When something was last published, and whether something else is to be.
    published: Option<Instant>,
    dirty: bool,
}

/// A job under way.
struct Flight {
    attempt: Attempt,
    since: Instant,
    abort: AbortHandle,
}

type Landed = Result<(Id, Result<IssuedCertificate, IssueError>), JoinError>;

impl RenewalTask {
    pub(super) fn new(
        shared: Arc<Shared>,
        wanted: watch::Receiver<Arc<BTreeSet<SpiffeId>>>,
        source: Arc<dyn CertificateSource>,
        config: CertificatesConfig,
    ) -> Self {
        let mut task = Self {
            shared,
            wanted,
            bundles: source.bundle(),
            rotations: source.updates(),
            taken: Arc::default(),
            seen: UpdateCounts::new(),
            bundle: Arc::default(),
            slots: CertStore::new(config.ttl),
            counters: Counters::default(),
            jobs: JoinSet::new(),
            flights: HashMap::new(),
            published: None,
            dirty: true,
            source,
            config,
        };
        task.trust();
        task.rotate();
        task.publish();
        task
    }

    /// Serves until cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut background = JoinSet::new();
        let source = self.source.clone();
        background.spawn(async move { source.run().await });
        loop {
            self.catch_up();
            let pause = self.pause();
            tokio::select! {
                () = stop.cancelled() => break,
                // The handle may be gone; then nothing more is wanted, and stop ends this.
                Ok(()) = self.wanted.changed() => {}
                Ok(()) = self.bundles.changed() => {}
                () = changed(self.rotations.as_mut()) => self.rotate(),
                () = self.shared.need.notified() => {}
                Some(landed) = self.jobs.join_next_with_id() => self.land(landed),
                Some(_) = background.join_next() => {
                    error!(target: "mesh::certs", "the source of certificates has ended by itself");
                    break;
                }
                () = sleep(pause) => {}
            }
            while let Some(landed) = self.jobs.try_join_next_with_id() {
                self.land(landed);
            }
        }
        self.jobs.shutdown().await;
        background.shutdown().await;
    }

    /// Takes over everything that others have said, does what is due, and tells of it.
    fn catch_up(&mut self) {
        self.trust();
        self.want();
        let now = self.shared.now();
        for identity in self.slots.expire(now) {
            error!(target: "mesh::certs", %identity, "certificate_expired: it was not renewed in time");
            self.dirty = true;
        }
        let needed = std::mem::take(
            &mut *self
                .shared
                .needed
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for (identity, need) in &needed {
            self.slots.prioritize(identity, *need, now);
        }
        let free = self.config.concurrency.saturating_sub(self.jobs.len());
        for attempt in self.slots.start(now, free) {
            self.take_off(attempt);
        }
        if self.dirty && self.held_back() == Duration::ZERO {
            self.publish();
        }
    }

    /// A bundle that says nothing never takes the place of one that does.
    fn trust(&mut self) {
        let found = self.bundles.borrow_and_update().clone();
        if found.is_empty() || found == self.bundle {
            return;
        }
        info!(target: "mesh::certs", roots = found.roots().len(), "trust bundle");
        self.slots.trust(&found, self.shared.now(), fastrand::f64);
        self.bundle = found;
        self.dirty = true;
    }

    fn want(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        if Arc::ptr_eq(&wanted, &self.taken) {
            return;
        }
        let gone = self.slots.want(&wanted, self.shared.now());
        for identity in &gone {
            self.source.forget(identity);
        }
        self.taken = wanted;
        self.dirty = true;
        // What is issued for nobody has a place that others could use.
        let slots = &self.slots;
        let idle = self
            .flights
            .values()
            .filter(|flight| !slots.awaits(&flight.attempt));
        idle.for_each(|flight| flight.abort.abort());
    }

    fn rotate(&mut self) {
        let Some(rotations) = &mut self.rotations else {
            return;
        };
        let found = rotations.borrow_and_update().clone();
        let now = self.shared.now();
        for (identity, count) in &found {
            if self.seen.get(identity) != Some(count) {
                self.slots.rotated(identity, now);
            }
        }
        self.seen = found;
    }

    fn take_off(&mut self, attempt: Attempt) {
        let (source, ttl) = (self.source.clone(), self.config.ttl);
        let (identity, deadline) = (attempt.identity.clone(), self.config.deadline);
        let abort = self.jobs.spawn(async move {
            let issued = timeout(deadline, source.issue(&identity, ttl)).await;
            issued.unwrap_or_else(|_| {
                let message = format!("not issued within {deadline:?}");
                Err(IssueError::new(&identity, IssueError::TIMEOUT, message))
            })
        });
        let flight = Flight {
            attempt,
            since: Instant::now(),
            abort: abort.clone(),
        };
        self.flights.insert(abort.id(), flight);
    }

    fn land(&mut self, landed: Landed) {
        let id = match &landed {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Some(Flight { attempt, .. }) = self.flights.remove(&id) else {
            return;
        };
        match landed {
            Ok((_, outcome)) => self.finish(&attempt, outcome),
            Err(error) if error.is_cancelled() => self.slots.give_up(&attempt, self.shared.now()),
            Err(_) => {
                let error = IssueError::new(&attempt.identity, "source_failed", "it panicked");
                self.finish(&attempt, Err(error));
            }
        }
    }

    fn finish(&mut self, attempt: &Attempt, outcome: Result<IssuedCertificate, IssueError>) {
        // The answer may have come with new roots.
        self.trust();
        let now = self.shared.now();
        let identity = &attempt.identity;
        let outcome = outcome.and_then(|issued| verify(issued, identity, &self.bundle, now));
        let told = match &outcome {
            Ok(certificate) => Ok(certificate.serial.clone()),
            Err(error) => Err(error.clone()),
        };
        let finished = self.slots.finish(attempt, outcome, now, fastrand::f64);
        let Some(Finished {
            got,
            recovered,
            repeated,
        }) = finished
        else {
            return;
        };
        self.dirty = true;
        match told {
            Ok(serial) => {
                let renewed = got == Some(Got::Renewal);
                match got {
                    Some(Got::First) => self.counters.first_issues += 1,
                    Some(Got::Renewal) => self.counters.renewals += 1,
                    Some(Got::Same) | None => {}
                }
                match got {
                    Some(Got::First | Got::Renewal) => {
                        info!(target: "mesh::certs", %identity, serial, renewed, "certificate issued");
                    }
                    // Nothing new, or for somebody who is not wanted any more.
                    Some(Got::Same) | None => {
                        debug!(target: "mesh::certs", %identity, serial, "no newer certificate yet");
                    }
                }
            }
            Err(error) => {
                // Whoever waits has it tried every second; once is enough to be told why it fails.
                match repeated {
                    false => warn!(target: "mesh::certs", "{error}"),
                    true => debug!(target: "mesh::certs", "{error}"),
                }
                *self.counters.failures.entry(error.code).or_default() += 1;
            }
        }
        if recovered {
            info!(target: "mesh::certs", "the source of certificates answers again");
            self.abort_stale();
        }
    }

    /// Attempts that began in the outage may hang until their deadline, on connections to what is no
    /// longer there. They are made again.
    fn abort_stale(&self) {
        let stale = self
            .flights
            .values()
            .filter(|flight| flight.since.elapsed() > STALE);
        stale.for_each(|flight| flight.abort.abort());
    }

    fn publish(&mut self) {
        self.shared.publish(CertificatesState {
            identities: self.slots.status(),
            bundle: self.bundle.clone(),
            counters: self.counters.clone(),
        });
        self.published = Some(Instant::now());
        self.dirty = false;
    }

    /// How long until something may be published again.
    fn held_back(&self) -> Duration {
        self.published
            .map_or(Duration::ZERO, |at| PUBLISH.saturating_sub(at.elapsed()))
    }

    fn pause(&self) -> Duration {
        let free = self.jobs.len() < self.config.concurrency;
        let next = self.slots.next(self.shared.now(), free);
        let next = next.map_or(LOOK, |next| next.saturating_duration_since(Instant::now()));
        let next = match self.dirty {
            true => next.min(self.held_back()),
            false => next,
        };
        next.clamp(Duration::from_millis(1), LOOK)
    }
}

async fn changed(rotations: Option<&mut watch::Receiver<UpdateCounts>>) {
    let open = match rotations {
        Some(rotations) => rotations.changed().await.is_ok(),
        None => false,
    };
    if !open {
        // A source that has no more to say is no reason to look.
        std::future::pending::<()>().await;
    }
}
