//! How h2 and the TLS buffers are configured at both ends, and why.

use std::time::Duration;

use h2::{client, server};

use super::transport::READ_BUDGET_BYTES;
use crate::config::{PoolConfig, ServeConfig};
use crate::relay::READ_BUFFER_BYTES;

/// Encrypted bytes that wait for the tunnel's socket. rustls' default of 64 KiB splits one large frame into four system
/// calls.
pub(super) const TLS_BUFFER_BYTES: usize = READ_BUFFER_BYTES + 64 * 1024;

/// Largest frame that we receive. h2 passes a frame on only when it is complete; a peer sends no more in one frame than
/// it read from its application at once, which is 256 KiB for Istio's proxy and for ours.
const MAX_FRAME_BYTES: u32 = 1024 * 1024;

/// Bytes of a stream that wait inside h2 for the tunnel's socket.
const SEND_BUFFER_BYTES: usize = 1024 * 1024;

/// h2 charges each frame of less than 256 bytes with the difference, until the relay has taken it, and closes the
/// connection at this total. The driver yields to the relays after each [`READ_BUDGET_BYTES`], which contain at most
/// 100,000 one-byte frames of 10 bytes each: this is twice their charge.
const SMALL_FRAME_BUDGET_BYTES: usize = 2 * 255 * (READ_BUDGET_BYTES / 10);

/// Streams that we have reset and whose late frames are ignored. Without it each late frame counts as an error of the
/// peer, and h2 closes a connection after 1024 of those.
const MAX_RESET_STREAMS: usize = 1024;

/// How long late frames are ignored.
const RESET_STREAM_DURATION: Duration = Duration::from_secs(30);

/// Streams that the peer may have opened and reset before we accept them. Beyond it h2 closes the tunnel with all its
/// streams. A single application can cause that many if its proxy, like Istio's, resets without waiting for our
/// response: 5,000 connections a second times a stall of 200 ms. Memory is bounded by the window.
const MAX_UNACCEPTED_RESETS: usize = 1024;

/// h2 itself answers 431 above `max_header_bytes` times this; below it the request reaches us, and we reject and report
/// it.
const HEADER_LIST_FACTOR: u32 = 4;

/// A response has fewer headers than a request, and the limit does not need to be configurable.
const MAX_RESPONSE_HEADER_BYTES: u32 = 16 * 1024;

/// The client end of tunnels.
pub(super) fn client_builder(config: &PoolConfig) -> client::Builder {
    let streams = u32::try_from(config.max_streams_per_tunnel).unwrap_or(u32::MAX);
    let mut builder = client::Builder::new();
    builder
        .enable_push(false)
        // No stream before the peer's SETTINGS have arrived, see `Dial::h2_handshake`.
        .initial_max_send_streams(0)
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(connection_window(config.stream_window, streams))
        .data_frame_budget(SMALL_FRAME_BUDGET_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_header_list_size(MAX_RESPONSE_HEADER_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_concurrent_reset_streams(MAX_RESET_STREAMS)
        .reset_stream_duration(RESET_STREAM_DURATION);
    builder
}

/// The server end of tunnels.
pub(super) fn server_builder(config: &ServeConfig) -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .max_concurrent_streams(config.max_streams)
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(connection_window(config.stream_window, config.max_streams))
        .data_frame_budget(SMALL_FRAME_BUDGET_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_header_list_size(config.max_header_bytes.saturating_mul(HEADER_LIST_FACTOR))
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_concurrent_reset_streams(MAX_RESET_STREAMS)
        .max_pending_accept_reset_streams(MAX_UNACCEPTED_RESETS)
        .reset_stream_duration(RESET_STREAM_DURATION);
    builder
}

/// The connection window for `streams` streams of `window` bytes each, within the limit of RFC 9113, section 6.9.1.
fn connection_window(window: u32, streams: u32) -> u32 {
    const MAX_WINDOW: u32 = (1 << 31) - 1;
    window.saturating_mul(streams.max(1)).min(MAX_WINDOW)
}
