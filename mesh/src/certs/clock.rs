//! What time is it, by which clock, and has a certificate expired?

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::certificate::Certificate;

/// Returns the time of day. Tests replace the system clock.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Maximum clock difference between two machines of the mesh. A certificate whose validity starts up
/// to this much in the future was issued now by a machine whose clock is ahead.
pub(super) const MAX_CLOCK_SKEW: Duration = Duration::from_secs(300);

/// The current time on two clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    /// The time of day, in which certificates state their validity. It may be wrong or be set.
    pub(super) wall: SystemTime,
    /// A clock that is never set. All delays are measured on it.
    pub(super) monotonic: Instant,
}

impl Now {
    /// Whether a certificate has expired. Setting the time of day forward by up to
    /// [`MAX_CLOCK_SKEW`] alone expires no certificate. A certificate that is valid by the time of
    /// day has not expired.
    pub(super) fn has_expired(self, certificate: &Certificate) -> bool {
        let by_wall = self.wall >= certificate.not_after;
        by_wall
            && (self.monotonic >= certificate.expires_at
                || self.wall >= certificate.not_after + MAX_CLOCK_SKEW)
    }
}

/// Converts a Unix time in seconds. Times before 1970 become 1970: they are past anyway.
pub(super) fn from_unix_seconds(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}
