//! The h2 + tokio-rustls engine. Nothing outside of this module names `h2` or `http`.
//!
//! One task drives each tunnel: it alone reads and writes the tunnel's socket ([`tunnel`] for those that we dial,
//! [`mod@serve`] for those that come in). One relay per stream ([`relay`]) moves bytes between that task and an
//! application's socket. All of them live on one thread.
//!
//! # Windows, and why a slow reader harms nobody
//!
//! - The connection's receive window is the stream window times the number of streams, so streams whose readers stall
//!   can never use up what their neighbours need.
//! - A relay takes what arrives on its stream at once, whether or not the application reads, and holds it in an
//!   [`inbox`], where small frames are joined. It gives the window back only when the application has taken the bytes.
//!   So the window bounds the inbox, a million one-byte frames cost a megabyte and not a million allocations, and h2's
//!   budget for small frames, which is one for the whole connection and closes it when it is spent, is replenished
//!   before a slow reader can spend it.

mod accept;
mod dial;
mod head;
mod heart;
mod inbox;
mod io;
mod load;
mod relay;
mod serve;
mod stream;
mod transport;
mod tunnel;
mod upload;

use std::time::Duration;

use crate::relay::LARGE;

pub(crate) use dial::Dial;
pub use serve::serve;
pub use stream::Stream;
pub(crate) use tunnel::{Driver, Tunnel, drive};

/// Largest frame that we receive. h2 hands a frame on only when all of it is there; a peer sends no more in one frame
/// than it read from its application at once, which is 256 KiB for Istio's and for ours.
const MAX_FRAME: u32 = 1024 * 1024;

/// Bytes of a stream that wait inside h2 for the tunnel's socket.
const SEND_BUFFER: usize = 1024 * 1024;

/// h2 charges each frame of less than 256 bytes what it falls short of them, until the relay has taken it, and closes
/// the connection at this much. The driver lets relays run after each [`transport::TURN`] bytes, which hold at most
/// 100,000 one-byte frames of 10 bytes each: this is twice their charge.
const SMALL_FRAME_BUDGET: usize = 2 * 255 * (transport::TURN / 10);

/// Streams that we have reset, of which late frames are ignored. Without it each late frame counts as an error of the
/// peer, and h2 closes a connection after 1024 of those.
const RESETS_REMEMBERED: usize = 1024;

/// How long they are ignored.
const RESET_MEMORY: Duration = Duration::from_secs(30);

/// Encrypted bytes that wait for the tunnel's socket. rustls' own 64 KiB make four system calls of one large frame.
const TLS_BUFFER: usize = LARGE + 64 * 1024;

/// The connection window for `streams` streams of `window` bytes each, within what HTTP/2 allows.
fn connection_window(window: u32, streams: u32) -> u32 {
    const MAX_WINDOW: u32 = (1 << 31) - 1;
    window.saturating_mul(streams.max(1)).min(MAX_WINDOW)
}
