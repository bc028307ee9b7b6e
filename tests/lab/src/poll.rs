//! Polls conditions that raise no event: the exit of a process that is not a child, a file that
//! another program writes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Poll interval of a condition that costs a request or a process.
pub(crate) const INTERVAL: Duration = Duration::from_millis(10);

/// Poll interval of a condition that costs microseconds to check.
pub(crate) const FAST_INTERVAL: Duration = Duration::from_millis(2);

/// Checks every `interval` until `condition` returns a value, and a last time at the deadline.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that sleeps: between two checks of a condition, with a deadline"
)]
pub(crate) fn until<T>(
    timeout: Duration,
    interval: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Option<T> {
    let deadline = Instant::now() + timeout;
    loop {
        let is_last = Instant::now() >= deadline;
        let found = condition();
        if found.is_some() || is_last {
            return found;
        }
        std::thread::sleep(interval);
    }
}

/// Polls a condition that raises no event, every 10 ms. Returns what the condition returned.
///
/// # Errors
/// The condition returned `None` until the timeout; the error names `what`.
pub fn wait_until<T>(
    what: &str,
    timeout: Duration,
    condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    until(timeout, INTERVAL, condition).with_context(|| format!("waited {timeout:?} for {what}"))
}
