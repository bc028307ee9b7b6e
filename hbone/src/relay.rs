//! What a relay takes and returns, for relays of both kinds: TCP to tunnel stream, and TCP to TCP.

mod buffer;
mod socket;
mod tcp;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use buffer::{Chunk, PendingWrites, READ_BUFFER_BYTES};
pub(crate) use socket::{
    READS_PER_YIELD, ResetOnDrop, read_available, shutdown_write, wait_for_reset,
};
pub use tcp::relay_tcp;

use crate::error::Error;
use crate::stop_token::StopToken;

/// Bytes of one connection, updated while they move.
///
/// A byte is counted when the other side's kernel or tunnel has accepted it.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the downstream to the upstream.
    pub sent: AtomicU64,
    /// From the upstream to the downstream.
    pub received: AtomicU64,
}

/// Options of a relay.
#[derive(Debug, Default)]
pub struct RelayOpts {
    /// Counts the relayed bytes.
    pub counters: Arc<Counters>,
    /// Stops the relay from outside.
    pub stop: StopToken,
    /// Outbound only: send the downstream's bytes before the peer has answered the CONNECT. Saves a round trip; the
    /// connection can then not be retried on another endpoint.
    pub optimistic: bool,
    /// Bytes that are sent to the upstream before those of the downstream, such as bytes that were read to detect a
    /// protocol. Not counted.
    pub prefix: Vec<u8>,
}

/// One of the two sides of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The side that connected.
    Downstream,
    /// The side that was connected to.
    Upstream,
}

impl Side {
    /// The other side.
    pub(crate) fn opposite(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Downstream => "downstream",
            Self::Upstream => "upstream",
        })
    }
}

/// How a relay ended.
#[derive(Debug)]
pub enum RelayOutcome {
    /// Both directions ended with FIN.
    Closed,
    /// One side reset the connection, and the relay reset the other side.
    Reset {
        /// The side that reset first.
        by: Side,
    },
    /// A [`StopToken`] ended it, with RST to both sides.
    Stopped {
        /// The reason given to [`StopToken::stop`].
        reason: &'static str,
    },
    /// The tunnel failed, or the peer rejected the CONNECT. The application received RST.
    Failed(Error),
}

/// Totals and outcome of a relay.
#[derive(Debug)]
pub struct RelaySummary {
    /// Bytes from downstream to upstream, as in [`Counters::sent`].
    pub sent: u64,
    /// Bytes from upstream to downstream, as in [`Counters::received`].
    pub received: u64,
    /// How the relay ended, and by which side.
    pub outcome: RelayOutcome,
}

impl RelaySummary {
    pub(crate) fn new(counters: &Counters, outcome: RelayOutcome) -> Self {
        Self {
            sent: counters.sent.load(Ordering::Relaxed),
            received: counters.received.load(Ordering::Relaxed),
            outcome,
        }
    }
}
