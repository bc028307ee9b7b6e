//! What does the store hold for one identity, and when is it due?

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spiffe::SpiffeId;
use tokio::time::Instant;

use super::status::{IdentityState, IdentityStatus, Priority};
use crate::certs::certificate::Certificate;
use crate::certs::clock::Now;
use crate::certs::renewal_time::{
    MIN_RETRY_DELAY, RECOVERY_SPREAD, recovery_delay, renewal_delay, retry_delay,
};
use crate::certs::source::IssueError;
use crate::certs::trust_bundle::TrustBundle;
use crate::certs::verify_chain::verify_chain;

/// How long a priority lasts. Waiters renew it every second.
const PRIORITY_TTL: Duration = Duration::from_secs(2);

/// Why an identity is due. The smallest is the most urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// A connection waits.
    Connection(Instant),
    /// It has no usable certificate.
    NoCertificate(Instant),
    /// Its certificate is to be renewed.
    Renewal(Instant),
}

/// The kind of certificate that was issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::certs) enum IssueOutcome {
    /// The first one of the identity.
    First,
    /// It replaces another one.
    Renewal,
    /// The certificate that the identity already has: the source has no newer one.
    Unchanged,
}

#[derive(Debug)]
pub(super) struct CertEntry {
    certificate: Option<Arc<Certificate>>,
    /// The end of the last certificate's validity, if it has expired and was not replaced.
    expired_at: Option<SystemTime>,
    /// Whether the certificate does not chain to the current trust bundle.
    is_untrusted: bool,
    last_error: Option<IssueError>,
    consecutive_failures: u32,
    /// When the next request starts, unless one is in flight.
    due_at: Instant,
    last_failure: Option<Instant>,
    /// The number of the request in flight.
    in_flight: Option<u64>,
    /// Whether the certificate in flight is outdated before it arrives.
    needs_reissue: bool,
    /// What waits for the certificate, and until when that counts.
    waiter: Option<(Priority, Instant)>,
}

impl CertEntry {
    pub(super) fn new(now: Now) -> Self {
        Self {
            certificate: None,
            expired_at: None,
            is_untrusted: false,
            last_error: None,
            consecutive_failures: 0,
            due_at: now.monotonic,
            last_failure: None,
            in_flight: None,
            needs_reissue: false,
            waiter: None,
        }
    }

    /// When the next request starts. None while one is in flight.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.in_flight.is_none().then_some(self.due_at)
    }

    pub(super) fn is_in_flight(&self, request: u64) -> bool {
        self.in_flight == Some(request)
    }

    pub(super) fn rank(&self, now: Now) -> Rank {
        match &self.certificate {
            _ if self.priority(now) == Some(Priority::Connection) => Rank::Connection(self.due_at),
            Some(certificate) if !self.is_untrusted => Rank::Renewal(certificate.expires_at),
            _ => Rank::NoCertificate(self.due_at),
        }
    }

    fn priority(&self, now: Now) -> Option<Priority> {
        let (priority, until) = self.waiter?;
        (until > now.monotonic).then_some(priority)
    }

    pub(super) fn prioritize(&mut self, priority: Priority, now: Now) {
        // The certificate was issued after the waiter asked.
        if self.certificate.is_some() {
            return;
        }
        let highest = self
            .priority(now)
            .map_or(priority, |other| other.max(priority));
        self.waiter = Some((highest, now.monotonic + PRIORITY_TTL));
        let retry_at = self
            .last_failure
            .map_or(now.monotonic, |failure| failure + MIN_RETRY_DELAY);
        self.due_at = self.due_at.min(retry_at.max(now.monotonic));
    }

    /// Requests a replacement at `due` at the latest, also if a request is in flight.
    pub(super) fn reissue_at(&mut self, due: Instant) {
        self.needs_reissue = self.in_flight.is_some();
        self.due_at = self.due_at.min(due);
    }

    pub(super) fn check_trust(&mut self, bundle: &TrustBundle, now: Now, jitter: f64) {
        let Some(certificate) = &self.certificate else {
            return;
        };
        let at = now.wall.max(certificate.not_before);
        self.is_untrusted = verify_chain(&certificate.chain, bundle, at).is_err();
        if self.is_untrusted {
            self.reissue_at(now.monotonic + RECOVERY_SPREAD.mul_f64(jitter));
        }
    }

    pub(super) fn start(&mut self, request: u64) {
        self.in_flight = Some(request);
        self.needs_reissue = false;
    }

    pub(super) fn cancel(&mut self, now: Instant) {
        self.in_flight = None;
        self.due_at = now;
    }

    /// Takes an issued certificate. If it is the one that the entry already has, the next request
    /// follows after half of the remaining lifetime.
    pub(super) fn complete(
        &mut self,
        certificate: Certificate,
        ttl: Duration,
        now: Now,
        jitter: f64,
    ) -> IssueOutcome {
        let current = self.certificate.as_deref();
        let outcome = match current.is_some() || self.expired_at.is_some() {
            _ if current.is_some_and(|current| has_same_leaf(current, &certificate)) => {
                IssueOutcome::Unchanged
            }
            true => IssueOutcome::Renewal,
            false => IssueOutcome::First,
        };
        self.in_flight = None;
        self.due_at = now.monotonic + renewal_delay(&certificate, ttl, now, jitter);
        if std::mem::take(&mut self.needs_reissue) {
            self.due_at = now.monotonic;
        }
        let chain = self.certificate.as_ref().map(|current| &current.chain);
        if outcome != IssueOutcome::Unchanged || chain != Some(&certificate.chain) {
            self.certificate = Some(Arc::new(certificate));
        }
        self.is_untrusted = false;
        self.expired_at = None;
        self.consecutive_failures = 0;
        self.last_failure = None;
        self.last_error = None;
        self.waiter = None;
        outcome
    }

    /// Takes a failure. Returns true if the request before failed with the same reason code.
    pub(super) fn fail(&mut self, error: IssueError, now: Now, jitter: f64) -> bool {
        self.in_flight = None;
        self.needs_reissue = false;
        let has_waiter = self.priority(now).is_some();
        let certificate = self.certificate.as_deref();
        let delay = retry_delay(
            certificate,
            self.consecutive_failures,
            has_waiter,
            now,
            jitter,
        );
        self.due_at = now.monotonic + delay;
        self.last_failure = Some(now.monotonic);
        self.consecutive_failures += 1;
        let code = error.code;
        let previous = self.last_error.replace(error);
        previous.is_some_and(|previous| previous.code == code)
    }

    /// Ends the backoff of an entry that failed because the source did not respond: the source
    /// responds again.
    pub(super) fn recover(&mut self, now: Now, jitter: f64) {
        let error = self.last_error.as_ref();
        if !error.is_some_and(IssueError::is_unavailable) {
            return;
        }
        let has_waiter = self.priority(now).is_some();
        let delay = recovery_delay(self.certificate.as_deref(), has_waiter, now, jitter);
        self.consecutive_failures = 0;
        self.last_failure = None;
        let retry_at = now.monotonic + delay;
        self.due_at = match self.due_at <= now.monotonic {
            true => retry_at,
            false => self.due_at.min(retry_at),
        };
    }

    /// Drops the certificate if it has expired. Returns true if it has.
    pub(super) fn remove_expired(&mut self, now: Now) -> bool {
        let expired = self
            .certificate
            .take_if(|certificate| now.has_expired(certificate));
        let Some(expired) = expired else {
            return false;
        };
        self.expired_at = Some(expired.not_after);
        self.is_untrusted = false;
        // Not requested yet: the time of day was set, or the machine was suspended.
        if self.last_error.is_none() {
            self.due_at = self.due_at.min(now.monotonic);
        }
        true
    }

    /// When the certificate expires on the monotonic clock, if that is in the future.
    pub(super) fn expires_at(&self, now: Now) -> Option<Instant> {
        let certificate = self.certificate.as_ref()?;
        Some(certificate.expires_at).filter(|expiry| *expiry > now.monotonic)
    }

    pub(super) fn status(&self, identity: SpiffeId) -> IdentityStatus {
        IdentityStatus {
            identity,
            state: match (&self.certificate, self.expired_at, &self.last_error) {
                (Some(_), ..) => IdentityState::Available,
                (None, Some(at), _) => IdentityState::Expired { at },
                (None, None, Some(_)) => IdentityState::Unavailable,
                (None, None, None) => IdentityState::Initializing,
            },
            certificate: self.certificate.clone(),
            last_error: self.last_error.clone(),
        }
    }
}

fn has_same_leaf(current: &Certificate, new: &Certificate) -> bool {
    let leaf = new.chain.first();
    leaf.is_some() && current.chain.first() == leaf
}
