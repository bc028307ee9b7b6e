//! What is kept for each identity, and what is due when. No clock and no tasks: the time is passed
//! in, so that every decision can be tested.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spiffe::SpiffeId;
use tokio::time::Instant;

use super::{Certificate, IssueError};

/// First wait after a failure; doubled with each further one.
const BACKOFF: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const BACKOFF_MAX: Duration = Duration::from_secs(150);

/// The present, by two clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// The time of day, which certificates speak of. It may be wrong, and be set.
    pub(super) wall: SystemTime,
    /// A clock that only runs. Everything that waits goes by it.
    pub(super) steady: Instant,
}

/// How an identity stands.
#[derive(Clone, Debug)]
pub struct IdentityStatus {
    /// Who.
    pub identity: SpiffeId,
    /// How.
    pub state: IdentityState,
    /// Its certificate, also while renewing it fails.
    pub certificate: Option<Arc<Certificate>>,
    /// Why the last attempt failed, if it did.
    pub error: Option<IssueError>,
}

/// Whether an identity can be proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityState {
    /// Nothing was issued yet.
    Initializing,
    /// It has a certificate that is valid.
    Available,
    /// Issuing failed, and there is no valid certificate.
    Unavailable,
}

#[derive(Debug)]
struct Slot {
    certificate: Option<Arc<Certificate>>,
    error: Option<IssueError>,
    failures: u32,
    due: SystemTime,
    issuing: bool,
}

/// All identities that are wanted.
#[derive(Debug, Default)]
pub(super) struct Slots(BTreeMap<SpiffeId, Slot>);

impl Slots {
    /// Takes over what is wanted now; true if a certificate was dropped.
    pub(super) fn want(&mut self, wanted: &BTreeSet<SpiffeId>, now: SystemTime) -> bool {
        let before = self.0.len();
        self.0.retain(|identity, _| wanted.contains(identity));
        let dropped = self.0.len() < before;
        for identity in wanted {
            self.0.entry(identity.clone()).or_insert_with(|| Slot {
                certificate: None,
                error: None,
                failures: 0,
                due: now,
                issuing: false,
            });
        }
        dropped
    }

    /// Identities for which to issue now; at most `limit`. They count as being issued from here.
    /// Those without any certificate come first: their traffic waits.
    pub(super) fn start(&mut self, now: SystemTime, limit: usize) -> Vec<SpiffeId> {
        let mut due: Vec<(bool, &SpiffeId)> = self
            .0
            .iter()
            .filter(|(_, slot)| !slot.issuing && slot.due <= now)
            .map(|(identity, slot)| (slot.certificate.is_some(), identity))
            .collect();
        due.sort_unstable();
        let due: Vec<SpiffeId> = due
            .into_iter()
            .take(limit)
            .map(|(_, id)| id.clone())
            .collect();
        for identity in &due {
            if let Some(slot) = self.0.get_mut(identity) {
                slot.issuing = true;
            }
        }
        due
    }

    /// Takes an outcome. `fortune` is a random number from 0 to 1, which spreads the renewals of
    /// identities that were issued together.
    pub(super) fn finish(
        &mut self,
        identity: &SpiffeId,
        outcome: Result<Certificate, IssueError>,
        now: SystemTime,
        fortune: f64,
    ) {
        // Forgotten while it was issued: the certificate is dropped, and its key wiped.
        let Some(slot) = self.0.get_mut(identity) else {
            return;
        };
        slot.issuing = false;
        match outcome {
            Ok(certificate) => {
                slot.due = now + half_life(&certificate, now, fortune);
                slot.certificate = Some(Arc::new(certificate));
                slot.failures = 0;
                slot.error = None;
            }
            Err(error) => {
                let doubled = BACKOFF.saturating_mul(1 << slot.failures.min(16));
                slot.due = now + doubled.min(BACKOFF_MAX).mul_f64(0.8 + 0.4 * fortune);
                slot.failures += 1;
                slot.error = Some(error);
            }
        }
    }

    /// Drops certificates that are no longer valid; true if there was one.
    pub(super) fn expire(&mut self, now: SystemTime) -> bool {
        let mut expired = false;
        for slot in self.0.values_mut() {
            if slot
                .certificate
                .as_ref()
                .is_some_and(|c| c.not_after <= now)
            {
                slot.certificate = None;
                slot.due = slot.due.min(now + BACKOFF_MAX);
                expired = true;
            }
        }
        expired
    }

    /// When something is to be done next.
    pub(super) fn next(&self) -> Option<SystemTime> {
        let ends = self
            .0
            .values()
            .filter_map(|slot| Some(slot.certificate.as_ref()?.not_after));
        let due = self
            .0
            .values()
            .filter(|slot| !slot.issuing)
            .map(|slot| slot.due);
        ends.chain(due).min()
    }

    pub(super) fn certificates(&self) -> BTreeMap<SpiffeId, Arc<Certificate>> {
        let slots = self.0.iter();
        slots
            .filter_map(|(id, slot)| Some((id.clone(), slot.certificate.clone()?)))
            .collect()
    }

    pub(super) fn status(&self) -> Vec<IdentityStatus> {
        let status = |(identity, slot): (&SpiffeId, &Slot)| IdentityStatus {
            identity: identity.clone(),
            state: match (&slot.certificate, &slot.error) {
                (Some(_), _) => IdentityState::Available,
                (None, Some(_)) => IdentityState::Unavailable,
                (None, None) => IdentityState::Initializing,
            },
            certificate: slot.certificate.clone(),
            error: slot.error.clone(),
        };
        self.0.iter().map(status).collect()
    }
}

/// Half of what is left, give or take a tenth of it. A certificate that is not valid any more is
/// treated as a failure would be.
fn half_life(certificate: &Certificate, now: SystemTime, fortune: f64) -> Duration {
    let left = certificate
        .not_after
        .duration_since(now)
        .unwrap_or_default();
    left.mul_f64(0.45 + 0.1 * fortune).max(BACKOFF)
}
