//! Which deadlines and limits apply to tunnels, and why each has its default.

use std::time::Duration;

/// Deadlines and limits of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Deadline of the TCP connect.
    pub connect_timeout: Duration,
    /// Deadline of the whole TLS handshake.
    pub tls_timeout: Duration,
    /// Deadline of the peer's HTTP/2 SETTINGS after the TLS handshake.
    pub h2_timeout: Duration,
    /// Deadline of the response to a CONNECT. It includes the peer's own dial to its application.
    pub response_timeout: Duration,
    /// Streams on one tunnel, if the peer does not allow fewer.
    pub max_streams_per_tunnel: usize,
    /// Tunnels to one peer that accept streams. When all of them are full, [`Pool::open`](crate::Pool::open) fails.
    pub max_tunnels_per_peer: usize,
    /// Retired tunnels to one peer that still carry streams. At this number no further tunnel is dialled.
    pub max_retired_tunnels_per_peer: usize,
    /// Up to this many tunnels to one peer are dialled in advance, because the existing ones are busy.
    pub max_preconnect_tunnels_per_peer: usize,
    /// Streams on the least loaded tunnel from which another tunnel is dialled in advance.
    pub preconnect_streams: usize,
    /// A tunnel without streams closes after this time.
    pub idle_timeout: Duration,
    /// A tunnel accepts no new streams after at most this time, so that both ends verify each other again. Open
    /// streams continue.
    pub max_age: Duration,
    /// Silence of the peer after which it is pinged.
    pub ping_interval: Duration,
    /// Further silence after a ping at which the tunnel fails.
    pub ping_timeout: Duration,
    /// Bytes that the peer may send on one stream before the application reads them. The connection's window is this
    /// times `max_streams_per_tunnel`, so stalled readers never use up the window of other streams.
    pub stream_window: u32,
}

/// Limits of an inbound tunnel.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Deadline of the whole TLS handshake.
    pub tls_timeout: Duration,
    /// Deadline of the HTTP/2 preface after the TLS handshake.
    pub h2_timeout: Duration,
    /// Streams that the peer may have open at once, announced in SETTINGS.
    pub max_streams: u32,
    /// Bytes that the peer may send on one stream before the application reads them. The connection's window is this
    /// times `max_streams`, so stalled readers never use up the window of other streams.
    pub stream_window: u32,
    /// Bytes of decoded headers of one request.
    pub max_header_bytes: u32,
    /// After at least this time the peer receives GOAWAY and has to open another tunnel, so that both ends verify each
    /// other again. Open streams continue.
    pub max_age: Duration,
    /// Silence of the peer after which it is pinged.
    pub ping_interval: Duration,
    /// Further silence after a ping at which the tunnel fails.
    pub ping_timeout: Duration,
}

/// SYNs are sent at 0, 1, 3 and 7 s; a peer that answers none of them is down or filtered.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A busy node signs in tens of milliseconds. A slowloris client holds a socket no longer than this.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longer than [`CONNECT_TIMEOUT`], so that the peer can report that its own dial timed out.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// Istio's client opens no more streams on a tunnel either.
const MAX_STREAMS: u32 = 100;

/// 6,400 streams to one pod from one thread of one pod.
const MAX_TUNNELS_PER_PEER: usize = 64;

/// With a maximum age of one day per tunnel: connections that stay open for eight months.
const MAX_RETIRED_TUNNELS_PER_PEER: usize = 256;

/// A tunnel runs on one core at each end; more tunnels than a large node has cores bring no throughput.
const MAX_PRECONNECT_TUNNELS_PER_PEER: usize = 8;

/// Measured: from 4 bulk streams on, one tunnel for each is faster than a shared tunnel.
const PRECONNECT_STREAMS: usize = 4;

/// Istio's value. An idle tunnel costs about 50 KB and a ping every 10 s, a new one a millisecond of CPU.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

/// The default lifetime of a certificate: each peer is verified again at least that often.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// Istio's values: a vanished peer is detected in half a minute, and an idle tunnel costs 6 small frames per minute.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// One stream fills 8 Gbit/s at 2 ms of round-trip time with this window, and 100 stalled readers hold 200 MiB.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;

/// An HBONE request carries four headers of less than 1 KiB in total; Istio has the same limit.
const MAX_HEADER_BYTES: u32 = 64 * 1024;

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            connect_timeout: CONNECT_TIMEOUT,
            tls_timeout: HANDSHAKE_TIMEOUT,
            h2_timeout: HANDSHAKE_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            max_streams_per_tunnel: MAX_STREAMS as usize,
            max_tunnels_per_peer: MAX_TUNNELS_PER_PEER,
            max_retired_tunnels_per_peer: MAX_RETIRED_TUNNELS_PER_PEER,
            max_preconnect_tunnels_per_peer: MAX_PRECONNECT_TUNNELS_PER_PEER,
            preconnect_streams: PRECONNECT_STREAMS,
            idle_timeout: IDLE_TIMEOUT,
            max_age: MAX_AGE,
            ping_interval: PING_INTERVAL,
            ping_timeout: PING_TIMEOUT,
            stream_window: STREAM_WINDOW,
        }
    }
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            tls_timeout: HANDSHAKE_TIMEOUT,
            h2_timeout: HANDSHAKE_TIMEOUT,
            max_streams: MAX_STREAMS,
            stream_window: STREAM_WINDOW,
            max_header_bytes: MAX_HEADER_BYTES,
            max_age: MAX_AGE,
            ping_interval: PING_INTERVAL,
            ping_timeout: PING_TIMEOUT,
        }
    }
}
