//! Which identities are there, and which of them is issued next?
//!
//! A pure state machine without tasks: the current time is an argument, so every decision can be
//! tested.

mod circuit_breaker;
mod entry;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::time::Instant;

use super::certificate::Certificate;
use super::clock::Now;
use super::source::IssueError;
use super::trust_bundle::TrustBundle;
use circuit_breaker::CircuitBreaker;
use entry::CertEntry;

pub(super) use entry::IssueOutcome;
pub use status::{IdentityState, IdentityStatus, Priority};

/// One entry for each identity of this node.
#[derive(Debug)]
pub(super) struct CertStore {
    entries: BTreeMap<SpiffeId, CertEntry>,
    circuit_breaker: CircuitBreaker,
    /// Requested lifetime of a certificate.
    ttl: Duration,
    /// Number of requests started so far.
    started: u64,
}

/// Every fourth request goes to the identity that has been due for longest, so that urgent
/// identities cannot starve the others.
const FAIRNESS_INTERVAL: u64 = 4;

/// One request to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IssueRequest {
    pub(super) identity: SpiffeId,
    /// Distinguishes requests for one identity. The outcome of a cancelled request is dropped.
    pub(super) number: u64,
}

/// What the end of a request has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Completion {
    /// The kind of certificate that was issued, if any.
    pub(super) outcome: Option<IssueOutcome>,
    /// The request closed the circuit breaker: the source responds again.
    pub(super) is_recovery: bool,
    /// The request failed with the same reason code as the one before.
    pub(super) is_repeated_failure: bool,
}

impl CertStore {
    pub(super) fn new(ttl: Duration) -> Self {
        Self {
            entries: BTreeMap::new(),
            circuit_breaker: CircuitBreaker::default(),
            ttl,
            started: 0,
        }
    }

    /// Replaces the set of identities, and returns those that were removed.
    pub(super) fn set_identities(
        &mut self,
        identities: &BTreeSet<SpiffeId>,
        now: Now,
    ) -> Vec<SpiffeId> {
        let removed = self
            .entries
            .keys()
            .filter(|identity| !identities.contains(*identity));
        let removed: Vec<SpiffeId> = removed.cloned().collect();
        self.entries
            .retain(|identity, _| identities.contains(identity));
        for identity in identities {
            if !self.entries.contains_key(identity) {
                self.entries.insert(identity.clone(), CertEntry::new(now));
            }
        }
        removed
    }

    /// Records that a pod or a connection waits for this identity.
    pub(super) fn prioritize(&mut self, identity: &SpiffeId, priority: Priority, now: Now) {
        if let Some(entry) = self.entries.get_mut(identity) {
            entry.prioritize(priority, now);
        }
    }

    /// Requests this identity again: the source has a newer certificate.
    pub(super) fn request_update(&mut self, identity: &SpiffeId, now: Now) {
        if let Some(entry) = self.entries.get_mut(identity) {
            entry.reissue_at(now.monotonic);
        }
    }

    /// Checks all certificates against a new trust bundle. Peers that have this bundle reject a
    /// certificate that does not chain to it, so such certificates are replaced soon. `jitter`
    /// returns random numbers from 0 to 1.
    pub(super) fn set_bundle(
        &mut self,
        bundle: &TrustBundle,
        now: Now,
        mut jitter: impl FnMut() -> f64,
    ) {
        for entry in self.entries.values_mut() {
            entry.check_trust(bundle, now, jitter());
        }
    }

    /// Starts at most `free` requests that are due. Identities with a waiting connection come first,
    /// then those without a certificate, then renewals in order of expiry.
    pub(super) fn start_due(&mut self, now: Now, free: usize) -> Vec<IssueRequest> {
        let mut started = Vec::new();
        while started.len() < free && self.circuit_breaker.allows(now.monotonic) {
            let Some(identity) = self.next_due(now) else {
                break;
            };
            self.started += 1;
            self.circuit_breaker.record_start(now.monotonic);
            let Some(entry) = self.entries.get_mut(&identity) else {
                break;
            };
            entry.start(self.started);
            started.push(IssueRequest {
                identity,
                number: self.started,
            });
        }
        started
    }

    fn next_due(&self, now: Now) -> Option<SpiffeId> {
        let due = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.due_at().is_some_and(|due| due <= now.monotonic));
        let next = match (self.started + 1).is_multiple_of(FAIRNESS_INTERVAL) {
            true => due.min_by_key(|(_, entry)| entry.due_at()),
            false => due.min_by_key(|(_, entry)| entry.rank(now)),
        };
        next.map(|(identity, _)| identity.clone())
    }

    /// Takes the result of a request. Returns none if the request was cancelled. `jitter` returns
    /// random numbers from 0 to 1, which spread the renewals of identities issued together.
    pub(super) fn complete(
        &mut self,
        request: &IssueRequest,
        result: Result<Certificate, IssueError>,
        now: Now,
        mut jitter: impl FnMut() -> f64,
    ) -> Option<Completion> {
        let error = result.as_ref().err();
        let is_available = error.is_none_or(|error| !error.is_unavailable());
        let is_recovery = self.circuit_breaker.record_result(is_available);
        // An identity that was removed meanwhile has no entry: the certificate is dropped, and its
        // key wiped.
        let entry = self
            .entries
            .get_mut(&request.identity)
            .filter(|entry| entry.is_in_flight(request.number));
        let (outcome, is_repeated_failure) = match (entry, result) {
            (Some(entry), Ok(certificate)) => {
                let outcome = entry.complete(certificate, self.ttl, now, jitter());
                (Some(outcome), false)
            }
            (Some(entry), Err(error)) => (None, entry.fail(error, now, jitter())),
            (None, _) if is_recovery => (None, false),
            (None, _) => return None,
        };
        if is_recovery {
            for entry in self.entries.values_mut() {
                entry.recover(now, jitter());
            }
        }
        Some(Completion {
            outcome,
            is_recovery,
            is_repeated_failure,
        })
    }

    /// Ends a request without a result. The identity is due again at once.
    pub(super) fn cancel(&mut self, request: &IssueRequest, now: Now) {
        let entry = self.entries.get_mut(&request.identity);
        if let Some(entry) = entry.filter(|entry| entry.is_in_flight(request.number)) {
            entry.cancel(now.monotonic);
        }
    }

    /// Whether the result of this request is still needed.
    pub(super) fn is_in_flight(&self, request: &IssueRequest) -> bool {
        let entry = self.entries.get(&request.identity);
        entry.is_some_and(|entry| entry.is_in_flight(request.number))
    }

    /// Drops expired certificates, and returns their identities.
    pub(super) fn remove_expired(&mut self, now: Now) -> Vec<SpiffeId> {
        let entries = self.entries.iter_mut();
        entries
            .filter_map(|(identity, entry)| entry.remove_expired(now).then(|| identity.clone()))
            .collect()
    }

    /// The next time at which something is due. Without free capacity, requests that are due wait
    /// for another request to end and not for a time.
    pub(super) fn next_deadline(&self, now: Now, has_capacity: bool) -> Option<Instant> {
        let expiries = self
            .entries
            .values()
            .filter_map(|entry| entry.expires_at(now));
        let due = self.entries.values().filter_map(CertEntry::due_at).min();
        let due = due
            .filter(|_| has_capacity)
            .map(|due| self.circuit_breaker.earliest_start(due));
        expiries.chain(due).min()
    }

    /// The status of every identity, sorted by identity.
    pub(super) fn status(&self) -> Vec<IdentityStatus> {
        let entries = self.entries.iter();
        entries
            .map(|(identity, entry)| entry.status(identity.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests;
