//! When is a certificate renewed, and when is a failed request repeated?
//!
//! Pure functions. `jitter` is a random number from 0 to 1, which spreads identities that were
//! issued, or that failed, at the same time.

use std::time::Duration;

use super::certificate::Certificate;
use super::clock::Now;

/// First delay after a failure, doubled with each further one. While something waits for the
/// certificate, every delay.
pub(super) const MIN_RETRY_DELAY: Duration = Duration::from_secs(1);
/// Longest delay after a failure.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(150);
/// After an outage, identities without a certificate are requested within this time.
pub(super) const RECOVERY_SPREAD: Duration = Duration::from_secs(1);
/// After an outage, identities with a certificate are requested within this time.
const MAX_RECOVERY_SPREAD: Duration = Duration::from_secs(30);

/// The delay until a new certificate is renewed: half of its remaining lifetime, plus or minus a
/// tenth of that half, at least one second.
///
/// Validity before now does not count. Neither does a remaining lifetime beyond the requested `ttl`:
/// that may be the time by which this node's clock is behind.
pub(super) fn renewal_delay(
    certificate: &Certificate,
    ttl: Duration,
    now: Now,
    jitter: f64,
) -> Duration {
    let remaining = remaining_lifetime(certificate, now).min(ttl);
    remaining.mul_f64(0.45 + 0.1 * jitter).max(MIN_RETRY_DELAY)
}

/// The delay after a failure that `failures` others preceded. The delay shrinks towards the expiry
/// of the certificate, because a response has to come before it.
pub(super) fn retry_delay(
    certificate: Option<&Certificate>,
    failures: u32,
    has_waiter: bool,
    now: Now,
    jitter: f64,
) -> Duration {
    let doubled = MIN_RETRY_DELAY.saturating_mul(1 << failures.min(16));
    let delay = match certificate {
        _ if has_waiter => MIN_RETRY_DELAY,
        Some(certificate) => doubled
            .min(MAX_RETRY_DELAY)
            .min(remaining_lifetime(certificate, now) / 4),
        None => doubled.min(MAX_RETRY_DELAY),
    };
    delay.max(MIN_RETRY_DELAY).mul_f64(0.8 + 0.4 * jitter)
}

/// The delay after an outage of the source has ended.
pub(super) fn recovery_delay(
    certificate: Option<&Certificate>,
    has_waiter: bool,
    now: Now,
    jitter: f64,
) -> Duration {
    let spread = match certificate {
        _ if has_waiter => Duration::ZERO,
        None => RECOVERY_SPREAD,
        Some(certificate) => (remaining_lifetime(certificate, now) / 4).min(MAX_RECOVERY_SPREAD),
    };
    spread.mul_f64(jitter)
}

/// The smaller of the remaining lifetimes by the time of day and by the monotonic clock.
fn remaining_lifetime(certificate: &Certificate, now: Now) -> Duration {
    let by_wall = certificate.not_after.duration_since(now.wall);
    let by_monotonic = certificate
        .expires_at
        .saturating_duration_since(now.monotonic);
    by_wall.unwrap_or_default().min(by_monotonic)
}
