//! Waiting for what has no event to wait for: the end of a foreign process, a file that another
//! program writes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How often a condition is looked at that costs more, such as a request.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Looks every `step` until `look` finds something, and a last time at the deadline.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place that sleeps: between two looks at a condition, with a deadline"
)]
pub(crate) fn until<T>(
    within: Duration,
    step: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Option<T> {
    let deadline = Instant::now() + within;
    loop {
        let late = Instant::now() >= deadline;
        let found = look();
        if found.is_some() || late {
            return found;
        }
        std::thread::sleep(step);
    }
}

/// Waits for a condition of the outside world that has no event and belongs to no lab: it is looked at
/// again every 20 ms. Returns what the condition returned.
///
/// # Errors
/// It returned `None` until the deadline; says `what`.
pub fn wait_until<T>(
    what: &str,
    within: Duration,
    condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    until(within, LOOK_AGAIN, condition).with_context(|| format!("waited {within:?} for {what}"))
}

/// A look that costs microseconds can be taken this often.
pub(crate) const OFTEN: Duration = Duration::from_millis(2);
