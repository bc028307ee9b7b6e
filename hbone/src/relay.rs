//! Moving bytes between two sides until both have closed: what the caller gives, and what it is told.

mod buffer;
mod tcp;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) use buffer::{Chunk, Flight, LARGE};
pub use tcp::relay_tcp;
pub(crate) use tcp::{READS_PER_TURN, ResetOnDrop, broken, finish_writing, read_now};

use crate::error::Error;
use crate::stop_token::StopToken;

/// Bytes of one connection, live while they move.
///
/// A byte counts when the other side's kernel or tunnel has taken it.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the downstream (who connected) to the upstream (who was connected to).
    pub sent: AtomicU64,
    /// From the upstream to the downstream.
    pub received: AtomicU64,
}

/// What a relay is given beside its sockets.
#[derive(Debug, Default)]
pub struct RelayOpts {
    /// Where bytes are counted.
    pub counters: Arc<Counters>,
    /// Ends the relay from outside.
    pub stop: StopToken,
    /// Outbound only: send the downstream's bytes before the peer has answered the CONNECT. Saves a round trip; the
    /// connection can then no longer be tried elsewhere.
    pub optimistic: bool,
    /// Bytes for the upstream before any of the downstream's, such as what was read to sniff a protocol. Not counted.
    pub prefix: Vec<u8>,
}

/// One of the two sides of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// Who connected.
    Downstream,
    /// Who was connected to.
    Upstream,
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
    /// Both sides finished with FIN.
    Closed,
    /// One side reset the connection; the reset was passed on to the other.
    Reset {
        /// The side that reset first.
        by: Side,
    },
    /// A [`StopToken`] ended it, with RST to both sides.
    Stopped {
        /// The reason given to [`StopToken::stop`].
        reason: &'static str,
    },
    /// The tunnel failed, or the peer rejected the CONNECT. The application saw RST.
    Failed(Error),
}

/// The end of a relay.
#[derive(Debug)]
pub struct RelaySummary {
    /// Bytes from downstream to upstream, as in [`Counters::sent`].
    pub sent: u64,
    /// Bytes from upstream to downstream, as in [`Counters::received`].
    pub received: u64,
    /// Who ended it, and how.
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
