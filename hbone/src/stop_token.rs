//! How one connection is stopped from another thread.

use std::fmt;
use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

/// Stops the relay that holds it, with RST to both sides and a reason.
///
/// Clones share one state, and the first reason is kept. A relay checks its token before every other event, so no byte
/// moves after the token is stopped.
#[derive(Clone, Default)]
pub struct StopToken(Arc<Inner>);

#[derive(Default)]
struct Inner {
    reason: OnceLock<&'static str>,
    token: CancellationToken,
}

impl StopToken {
    /// A token that is not stopped.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stops the relay. `reason` is a stable snake_case code, such as `policy_changed`.
    pub fn stop(&self, reason: &'static str) {
        let _first_reason_is_kept = self.0.reason.set(reason);
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

    /// Resolves with the reason when the token is stopped; at once if it is stopped already.
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
    async fn first_reason_is_kept_and_visible_in_every_clone() {
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
    fn stop_token_is_send_and_sync() {
        fn assert_shared<T: Send + Sync + Clone>() {}
        assert_shared::<StopToken>();
    }
}
