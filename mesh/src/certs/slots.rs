//! What is kept for each identity, and what is due when. No clock and no tasks: the time is passed
//! in, so that every decision can be tested.

mod outage;
mod slot;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use spiffe::SpiffeId;
use tokio::time::Instant;

use super::verify::SKEW;
use super::{Certificate, IssueError, TrustBundle};
use outage::CircuitBreaker;
use slot::CertEntry;

pub use status::{IdentityState, IdentityStatus, Priority};

/// The present, by two clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// The time of day, which certificates speak of. It may be wrong, and be set.
    pub(super) wall: SystemTime,
    /// A clock that only runs. Everything that waits goes by it.
    pub(super) steady: Instant,
}

impl Now {
    /// Whether a certificate has ended. When the time of day is set forward by no more than clocks
    /// may be apart, that alone ends nothing; and while it says that a certificate is valid, it is.
    pub(super) fn is_after(self, certificate: &Certificate) -> bool {
        let by_wall = self.wall >= certificate.not_after;
        by_wall && (self.steady >= certificate.ends || self.wall >= certificate.not_after + SKEW)
    }
}

/// All identities that are wanted.
#[derive(Debug)]
pub(super) struct CertStore {
    slots: BTreeMap<SpiffeId, CertEntry>,
    outage: CircuitBreaker,
    /// Life of a certificate as it is asked for.
    ttl: Duration,
    /// Counts the places that were given away.
    turn: u64,
}

/// One place in so many goes to whoever has been due for longest, so that no rush of the urgent can
/// keep the others waiting for ever.
const FAIR: u64 = 4;

/// One attempt at issuing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) identity: SpiffeId,
    /// Tells attempts apart; the outcome of one that was given up is nobody's.
    pub(super) number: u64,
}

/// What an outcome has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Finished {
    /// What came, if anything did.
    pub(super) got: Option<Got>,
    /// The source answers again after an outage.
    pub(super) recovered: bool,
    /// It failed for the reason that the attempt before failed for.
    pub(super) repeated: bool,
}

/// What a certificate that was issued is to its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Got {
    /// The identity had none before.
    First,
    /// It takes the place of another.
    Renewal,
    /// The source has none that is newer than the one that there is.
    Same,
}

impl CertStore {
    pub(super) fn new(ttl: Duration) -> Self {
        Self {
            slots: BTreeMap::new(),
            outage: CircuitBreaker::default(),
            ttl,
            turn: 0,
        }
    }

    /// Takes over what is wanted now, and returns what is not wanted any more.
    pub(super) fn want(&mut self, wanted: &BTreeSet<SpiffeId>, now: Now) -> Vec<SpiffeId> {
        let gone = self
            .slots
            .keys()
            .filter(|identity| !wanted.contains(*identity));
        let gone: Vec<SpiffeId> = gone.cloned().collect();
        self.slots.retain(|identity, _| wanted.contains(identity));
        for identity in wanted {
            if !self.slots.contains_key(identity) {
                self.slots.insert(identity.clone(), CertEntry::new(now));
            }
        }
        gone
    }

    /// Somebody waits for this identity.
    pub(super) fn prioritize(&mut self, identity: &SpiffeId, need: Priority, now: Now) {
        if let Some(slot) = self.slots.get_mut(identity) {
            slot.prioritize(need, now);
        }
    }

    /// The source has something newer for this identity.
    pub(super) fn rotated(&mut self, identity: &SpiffeId, now: Now) {
        if let Some(slot) = self.slots.get_mut(identity) {
            slot.ask_again(now.steady);
        }
    }

    /// The bundle has changed: certificates that do not chain to it are worth nothing to peers that
    /// have it, and are replaced soon. `fortune` gives random numbers from 0 to 1.
    pub(super) fn trust(
        &mut self,
        bundle: &TrustBundle,
        now: Now,
        mut fortune: impl FnMut() -> f64,
    ) {
        for slot in self.slots.values_mut() {
            slot.trust(bundle, now, fortune());
        }
    }

    /// What to issue now; at most `free`. They count as being issued from here. First come those
    /// that a connection waits for, then those that have nothing, then renewals, the first to expire
    /// first.
    pub(super) fn start(&mut self, now: Now, free: usize) -> Vec<Attempt> {
        let mut started = Vec::new();
        while started.len() < free && self.outage.admits(now.steady) {
            let Some(identity) = self.pick(now) else {
                break;
            };
            self.turn += 1;
            self.outage.started(now.steady);
            let Some(slot) = self.slots.get_mut(&identity) else {
                break;
            };
            slot.start(self.turn);
            started.push(Attempt {
                identity,
                number: self.turn,
            });
        }
        started
    }

    fn pick(&self, now: Now) -> Option<SpiffeId> {
        let due = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.due().is_some_and(|due| due <= now.steady));
        let picked = match (self.turn + 1).is_multiple_of(FAIR) {
            true => due.min_by_key(|(_, slot)| slot.due()),
            false => due.min_by_key(|(_, slot)| slot.rank(now)),
        };
        picked.map(|(identity, _)| identity.clone())
    }

    /// Takes an outcome; none if the attempt was given up. `fortune` gives random numbers from 0 to
    /// 1, which spread the renewals of identities that were issued together.
    pub(super) fn finish(
        &mut self,
        attempt: &Attempt,
        outcome: Result<Certificate, IssueError>,
        now: Now,
        mut fortune: impl FnMut() -> f64,
    ) -> Option<Finished> {
        let reachable = outcome
            .as_ref()
            .err()
            .is_none_or(|error| !CircuitBreaker::is(error));
        let recovered = self.outage.outcome(reachable);
        // Forgotten while it was issued: the certificate is dropped, and its key wiped.
        let slot = self
            .slots
            .get_mut(&attempt.identity)
            .filter(|slot| slot.is_at(attempt.number));
        let (got, repeated) = match (slot, outcome) {
            (Some(slot), Ok(certificate)) => {
                let got = slot.issued(certificate, self.ttl, now, fortune());
                (Some(got), false)
            }
            (Some(slot), Err(error)) => (None, slot.failed(error, now, fortune())),
            (None, _) if recovered => (None, false),
            (None, _) => return None,
        };
        if recovered {
            for slot in self.slots.values_mut() {
                slot.recover(now, fortune());
            }
        }
        Some(Finished {
            got,
            recovered,
            repeated,
        })
    }

    /// An attempt was given up without an outcome; another may start at once.
    pub(super) fn give_up(&mut self, attempt: &Attempt, now: Now) {
        let slot = self.slots.get_mut(&attempt.identity);
        if let Some(slot) = slot.filter(|slot| slot.is_at(attempt.number)) {
            slot.given_up(now.steady);
        }
    }

    /// Whether this attempt's outcome is still waited for.
    pub(super) fn awaits(&self, attempt: &Attempt) -> bool {
        let slot = self.slots.get(&attempt.identity);
        slot.is_some_and(|slot| slot.is_at(attempt.number))
    }

    /// Drops certificates that are no longer valid, and names them.
    pub(super) fn expire(&mut self, now: Now) -> Vec<SpiffeId> {
        let slots = self.slots.iter_mut();
        slots
            .filter_map(|(identity, slot)| slot.expire(now).then(|| identity.clone()))
            .collect()
    }

    /// When something is to be done next. With no place free, what is due waits for an outcome and
    /// not for a time.
    pub(super) fn next(&self, now: Now, free: bool) -> Option<Instant> {
        let ends = self.slots.values().filter_map(|slot| slot.ends(now));
        let due = self.slots.values().filter_map(CertEntry::due).min();
        let due = due.filter(|_| free).map(|due| self.outage.defer(due));
        ends.chain(due).min()
    }

    /// Sorted by identity.
    pub(super) fn status(&self) -> Vec<IdentityStatus> {
        let slots = self.slots.iter();
        slots
            .map(|(identity, slot)| slot.status(identity.clone()))
            .collect()
    }
}

/// Why something is due: the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// A connection waits.
    Needed(Instant),
    /// There is nothing that could be used.
    WarmUp(Instant),
    /// What there is expires some day.
    Background(Instant),
}

#[cfg(test)]
mod tests;
