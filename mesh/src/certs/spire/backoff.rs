//! How long is the pause before the agent is tried again?

use std::time::Duration;

/// The first delay, doubled with each further failure.
const MIN_DELAY: Duration = Duration::from_millis(100);
/// The agent is a process on this machine: an attempt costs one system call, and its return should
/// be detected soon.
const MAX_DELAY: Duration = Duration::from_secs(5);

/// The delay after this many consecutive failures, plus or minus 20 %.
pub(super) fn backoff(failures: u32) -> Duration {
    let doubled = MIN_DELAY.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(MAX_DELAY).mul_f64(0.8 + 0.4 * fastrand::f64())
}
