//! Does the source respond at all, and how often is it tried while it does not?

use std::time::Duration;

use tokio::time::Instant;

/// This many consecutive requests without a response, for any identities, open the circuit. It
/// equals the default number of concurrent requests.
const FAILURE_THRESHOLD: u32 = 8;
/// While the circuit is open, one request starts per interval, for all identities together. That
/// detects the end of an outage early and does not overload a source that restarts.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);

/// Limits requests to a source that does not respond. The first response of any kind, also a
/// refusal, closes the circuit.
#[derive(Debug, Default)]
pub(super) struct CircuitBreaker {
    consecutive_failures: u32,
    last_start: Option<Instant>,
}

impl CircuitBreaker {
    fn is_open(&self) -> bool {
        self.consecutive_failures >= FAILURE_THRESHOLD
    }

    /// Whether a request may start now.
    pub(super) fn allows(&self, now: Instant) -> bool {
        self.earliest_start(now) <= now
    }

    /// The first time, from `due` on, at which a request may start.
    pub(super) fn earliest_start(&self, due: Instant) -> Instant {
        match self.last_start {
            Some(last) if self.is_open() => due.max(last + PROBE_INTERVAL),
            _ => due,
        }
    }

    pub(super) fn record_start(&mut self, now: Instant) {
        self.last_start = Some(now);
    }

    /// Records whether a request got a response. Returns true if this closes the circuit.
    pub(super) fn record_result(&mut self, has_responded: bool) -> bool {
        let closes = has_responded && self.is_open();
        self.consecutive_failures = if has_responded {
            0
        } else {
            self.consecutive_failures.saturating_add(1)
        };
        closes
    }
}
