//! One identity.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spiffe::SpiffeId;
use tokio::time::Instant;

use super::outage::CircuitBreaker;
use super::{Got, IdentityState, IdentityStatus, Now, Priority, Rank};
use crate::certs::verify::chains;
use crate::certs::{Certificate, IssueError, TrustBundle};

/// First wait after a failure, doubled with each further one; and the only one while somebody waits.
const BACKOFF: Duration = Duration::from_secs(1);
/// Longest wait after a failure.
const BACKOFF_MAX: Duration = Duration::from_secs(150);
/// For how long somebody who said that they wait is believed to. They say so every second.
const NEEDED: Duration = Duration::from_secs(2);
/// Over how long those are spread that have nothing when the source answers again.
const RECOVERY: Duration = Duration::from_secs(1);
/// Over how long at most those are that still have a certificate.
const RECOVERY_MAX: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct CertEntry {
    certificate: Option<Arc<Certificate>>,
    /// When the last certificate ended, if there is none now.
    ended: Option<SystemTime>,
    /// The certificate does not chain to the bundle.
    untrusted: bool,
    error: Option<IssueError>,
    failures: u32,
    due: Instant,
    /// The end of the last attempt that failed.
    failed: Option<Instant>,
    /// The number of the attempt under way.
    attempt: Option<u64>,
    /// What the attempt under way brings is outdated already.
    again: bool,
    /// Who waits for it, and until when they are believed to.
    needed: Option<(Priority, Instant)>,
}

impl CertEntry {
    pub(super) fn new(now: Now) -> Self {
        Self {
            certificate: None,
            ended: None,
            untrusted: false,
            error: None,
            failures: 0,
            due: now.steady,
            failed: None,
            attempt: None,
            again: false,
            needed: None,
        }
    }

    /// When it is to be issued, unless it is being issued.
    pub(super) fn due(&self) -> Option<Instant> {
        self.attempt.is_none().then_some(self.due)
    }

    pub(super) fn is_at(&self, attempt: u64) -> bool {
        self.attempt == Some(attempt)
    }

    pub(super) fn rank(&self, now: Now) -> Rank {
        match &self.certificate {
            _ if self.needed(now) == Some(Priority::Connection) => Rank::Needed(self.due),
            Some(certificate) if !self.untrusted => Rank::Background(certificate.ends),
            _ => Rank::WarmUp(self.due),
        }
    }

    fn needed(&self, now: Now) -> Option<Priority> {
        let (need, until) = self.needed?;
        (until > now.steady).then_some(need)
    }

    pub(super) fn prioritize(&mut self, need: Priority, now: Now) {
        // Issued since that was said.
        if self.certificate.is_some() {
            return;
        }
        let most = self.needed(now).map_or(need, |other| other.max(need));
        self.needed = Some((most, now.steady + NEEDED));
        let again = self.failed.map_or(now.steady, |failed| failed + BACKOFF);
        self.due = self.due.min(again.max(now.steady));
    }

    pub(super) fn ask_again(&mut self, due: Instant) {
        self.again = self.attempt.is_some();
        self.due = self.due.min(due);
    }

    pub(super) fn trust(&mut self, bundle: &TrustBundle, now: Now, fortune: f64) {
        let Some(certificate) = &self.certificate else {
            return;
        };
        let at = now.wall.max(certificate.not_before);
        self.untrusted = chains(&certificate.chain, bundle, at).is_err();
        if self.untrusted {
            self.ask_again(now.steady + RECOVERY.mul_f64(fortune));
        }
    }

    pub(super) fn start(&mut self, attempt: u64) {
        self.attempt = Some(attempt);
        self.again = false;
    }

    pub(super) fn given_up(&mut self, now: Instant) {
        self.attempt = None;
        self.due = now;
    }

    /// What it is to the identity. If it is the one that there is already, nothing is gained, and the
    /// next is asked for when half of what is left has passed.
    pub(super) fn issued(
        &mut self,
        certificate: Certificate,
        ttl: Duration,
        now: Now,
        fortune: f64,
    ) -> Got {
        let held = self.certificate.as_deref();
        let got = match held.is_some() || self.ended.is_some() {
            _ if held.is_some_and(|held| same(held, &certificate)) => Got::Same,
            true => Got::Renewal,
            false => Got::First,
        };
        self.attempt = None;
        self.due = now.steady + half_life(&certificate, ttl, now, fortune);
        if std::mem::take(&mut self.again) {
            self.due = now.steady;
        }
        let chain = self.certificate.as_ref().map(|held| &held.chain);
        if got != Got::Same || chain != Some(&certificate.chain) {
            self.certificate = Some(Arc::new(certificate));
        }
        self.untrusted = false;
        self.ended = None;
        self.failures = 0;
        self.failed = None;
        self.error = None;
        self.needed = None;
        got
    }

    /// True if the attempt before has failed for the same reason.
    pub(super) fn failed(&mut self, error: IssueError, now: Now, fortune: f64) -> bool {
        self.attempt = None;
        self.again = false;
        let doubled = BACKOFF.saturating_mul(1 << self.failures.min(16));
        let wait = match &self.certificate {
            _ if self.needed(now).is_some() => BACKOFF,
            // The nearer the end, the more often: an answer has to come before it.
            Some(certificate) => doubled.min(BACKOFF_MAX).min(left(certificate, now) / 4),
            None => doubled.min(BACKOFF_MAX),
        };
        self.due = now.steady + wait.max(BACKOFF).mul_f64(0.8 + 0.4 * fortune);
        self.failed = Some(now.steady);
        self.failures += 1;
        let code = error.code;
        let before = self.error.replace(error);
        before.is_some_and(|before| before.code == code)
    }

    /// The source answers again: whoever was waiting for that goes on now, one after the other.
    pub(super) fn recover(&mut self, now: Now, fortune: f64) {
        if !self.error.as_ref().is_some_and(CircuitBreaker::is) {
            return;
        }
        let spread = match &self.certificate {
            _ if self.needed(now).is_some() => Duration::ZERO,
            None => RECOVERY,
            Some(certificate) => (left(certificate, now) / 4).min(RECOVERY_MAX),
        };
        self.failures = 0;
        self.failed = None;
        let again = now.steady + spread.mul_f64(fortune);
        self.due = match self.due <= now.steady {
            true => again,
            false => self.due.min(again),
        };
    }

    /// True if there was a certificate that ends now.
    pub(super) fn expire(&mut self, now: Now) -> bool {
        let ended = self.certificate.take_if(|held| now.is_after(held));
        let Some(ended) = ended else {
            return false;
        };
        self.ended = Some(ended.not_after);
        self.untrusted = false;
        // Not even tried yet: the time of day was set, or the machine slept.
        if self.error.is_none() {
            self.due = self.due.min(now.steady);
        }
        true
    }

    /// When to look whether it has expired, if that is still to come.
    pub(super) fn ends(&self, now: Now) -> Option<Instant> {
        let certificate = self.certificate.as_ref()?;
        Some(certificate.ends).filter(|ends| *ends > now.steady)
    }

    pub(super) fn status(&self, identity: SpiffeId) -> IdentityStatus {
        IdentityStatus {
            identity,
            state: match (&self.certificate, self.ended, &self.error) {
                (Some(_), ..) => IdentityState::Available,
                (None, Some(at), _) => IdentityState::Expired { at },
                (None, None, Some(_)) => IdentityState::Unavailable,
                (None, None, None) => IdentityState::Initializing,
            },
            certificate: self.certificate.clone(),
            last_error: self.error.clone(),
        }
    }
}

/// Whether the leaf is one and the same.
fn same(held: &Certificate, came: &Certificate) -> bool {
    let leaf = came.chain.first();
    leaf.is_some() && held.chain.first() == leaf
}

/// What is left of a certificate's life. Both clocks have to agree that there is more.
fn left(certificate: &Certificate, now: Now) -> Duration {
    let by_wall = certificate.not_after.duration_since(now.wall);
    let by_steady = certificate.ends.saturating_duration_since(now.steady);
    by_wall.unwrap_or_default().min(by_steady)
}

/// Half of what is left, give or take a tenth of it. What was before now does not count; nor does
/// what is left beyond the life that was asked for, which may be the time by which this node's clock
/// is behind.
fn half_life(certificate: &Certificate, ttl: Duration, now: Now, fortune: f64) -> Duration {
    let left = left(certificate, now).min(ttl);
    left.mul_f64(0.45 + 0.1 * fortune).max(BACKOFF)
}
