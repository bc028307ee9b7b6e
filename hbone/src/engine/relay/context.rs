//! What both directions of a relay share.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::engine::failure::TunnelStatus;
use crate::engine::tunnel::Load;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Counters, RelayOutcome, Side};
use crate::stop_token::StopToken;

/// How long bytes that were sent before a reset may take to be passed on; later they are lost, like unsent bytes of a
/// sender that resets. They have window already, and wait only for their turn on the wire and for the application.
pub(in crate::engine) const RESET_GRACE: Duration = Duration::from_secs(2);

/// Why a relay failed.
pub(in crate::engine) enum RelayError {
    /// The application's socket was reset.
    App,
    /// The stream or its tunnel failed.
    Tunnel(Error),
}

/// The parameters of a relay.
pub(in crate::engine) struct RelayContext<'a> {
    /// The side of the application: downstream at the client end of a tunnel, upstream at the server end.
    pub(in crate::engine) app_side: Side,
    pub(in crate::engine) counters: &'a Counters,
    pub(in crate::engine) stop: &'a StopToken,
    pub(in crate::engine) status: &'a TunnelStatus,
    pub(in crate::engine) load: Option<&'a Load>,
}

impl RelayContext<'_> {
    /// Counts bytes from the application to the stream.
    pub(super) fn count_upload(&self, n: usize) {
        self.count(n, self.app_side);
    }

    /// Counts bytes from the stream to the application.
    pub(super) fn count_download(&self, n: usize) {
        self.count(n, self.app_side.opposite());
    }

    fn count(&self, n: usize, source: Side) {
        let counter: &AtomicU64 = match source {
            Side::Downstream => &self.counters.sent,
            Side::Upstream => &self.counters.received,
        };
        counter.fetch_add(n as u64, Ordering::Relaxed);
        if let Some(load) = self.load {
            load.add(n);
        }
    }

    pub(super) fn outcome(&self, error: RelayError) -> RelayOutcome {
        match error {
            RelayError::App => RelayOutcome::Reset { by: self.app_side },
            RelayError::Tunnel(error) if error.reason() == Reason::StreamReset => {
                RelayOutcome::Reset {
                    by: self.app_side.opposite(),
                }
            }
            RelayError::Tunnel(error) => RelayOutcome::Failed(error),
        }
    }
}

/// Progress of each direction that the other one depends on.
#[derive(Default)]
pub(super) struct Progress {
    /// The peer has answered the CONNECT.
    pub(super) is_answered: Cell<bool>,
    /// The upload has sent END_STREAM.
    pub(super) has_sent_end: Cell<bool>,
    /// The download has received END_STREAM.
    pub(super) has_received_end: Cell<bool>,
}
