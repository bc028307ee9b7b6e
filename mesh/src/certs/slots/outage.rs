//! Whether the source answers at all.

use std::time::Duration;

use tokio::time::Instant;

use crate::certs::IssueError;

/// So many unanswered attempts in a row, of whatever identities, are the source's failure and not
/// theirs. As many as are made at a time by default.
const THRESHOLD: u32 = 8;
/// In an outage only one attempt is made in so much time, for all identities together: enough to
/// notice its end at once, and no storm on a source that is coming back.
const PROBE: Duration = Duration::from_millis(500);

/// A source that does not answer is asked seldom, and for one identity at a time. The first answer
/// of any kind ends that.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    unanswered: u32,
    probed: Option<Instant>,
}

impl CircuitBreaker {
    /// Whether an error says that nobody answered.
    pub(super) fn is(error: &IssueError) -> bool {
        error.is_unavailable()
    }

    fn lasts(&self) -> bool {
        self.unanswered >= THRESHOLD
    }

    /// Whether an attempt may start.
    pub(super) fn admits(&self, now: Instant) -> bool {
        self.defer(now) <= now
    }

    /// The first moment, from `due` on, at which an attempt may start.
    pub(super) fn defer(&self, due: Instant) -> Instant {
        match self.probed {
            Some(probed) if self.lasts() => due.max(probed + PROBE),
            _ => due,
        }
    }

    pub(super) fn started(&mut self, now: Instant) {
        self.probed = Some(now);
    }

    /// Takes an outcome; true if it ends an outage.
    pub(super) fn outcome(&mut self, answered: bool) -> bool {
        let ends = answered && self.lasts();
        self.unanswered = if answered {
            0
        } else {
            self.unanswered.saturating_add(1)
        };
        ends
    }
}
