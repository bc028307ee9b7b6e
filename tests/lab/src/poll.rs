//! Waiting for what has no event to wait for: the end of a foreign process, a file that another
//! program writes.

use std::time::{Duration, Instant};

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

/// A look that costs microseconds can be taken this often.
pub(crate) const OFTEN: Duration = Duration::from_millis(2);
