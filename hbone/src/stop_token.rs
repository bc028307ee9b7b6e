//! A signal that ends one connection from any thread.

use std::fmt;
use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Ends the relay that holds it, with RST to both sides and a reason.
///
/// Clones are the same signal. The first reason given stays. A relay looks at its stop before anything else, so a
/// connection that was stopped moves not one byte more.
#[derive(Clone, Default)]
pub struct StopToken(Arc<Inner>);

#[derive(Default)]
struct Inner {
    reason: OnceLock<&'static str>,
    token: CancellationToken,
}

impl StopToken {
    /// A stop that nobody has asked for yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the end. `reason` is a stable snake_case code, such as `policy_changed`.
    pub fn stop(&self, reason: &'static str) {
        let _first_reason_wins = self.0.reason.set(reason);
        self.0.token.cancel();
    }

    /// The reason, once stopped.
    pub fn reason(&self) -> Option<&'static str> {
        if self.0.token.is_cancelled() {
            self.0.reason.get().copied()
        } else {
            None
        }
    }

    /// Resolves with the reason when stopped; at once if that has happened already.
    pub async fn stopped(&self) -> &'static str {
        self.0.token.cancelled().await;
        self.0.reason.get().copied().unwrap_or("stopped")
    }
}

impl fmt::Debug for StopToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StopToken").field(&self.reason()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_wins_and_reaches_every_clone() {
        let stop = StopToken::new();
        let clone = stop.clone();
        assert_eq!(clone.reason(), None);
        std::thread::spawn(move || stop.stop("first"))
            .join()
            .unwrap();
        clone.stop("second");
        assert_eq!(clone.stopped().await, "first");
    }

    #[test]
    fn a_stop_crosses_threads() {
        fn shared<T: Send + Sync + Clone>() {}
        shared::<StopToken>();
    }
}
