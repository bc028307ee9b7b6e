//! Deadlines and limits of a pool, each with its reason.

use std::time::Duration;

use crate::server;

/// Deadlines and limits of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// For the TCP connect.
    pub connect_timeout: Duration,
    /// For the whole TLS handshake.
    pub tls_timeout: Duration,
    /// For the peer's HTTP/2 SETTINGS after it.
    pub h2_timeout: Duration,
    /// For the answer to a CONNECT, which includes the peer's own dial to its application.
    pub response_timeout: Duration,
    /// Streams on one tunnel, if the peer does not allow less.
    pub streams_per_tunnel: usize,
    /// Tunnels to one peer that take streams; with all of them full, [`Pool::open`](crate::Pool::open) fails.
    pub tunnels_per_peer: usize,
    /// Tunnels to one peer that take no more streams but carry some still. With as many, no further one is opened.
    pub retired_per_peer: usize,
    /// Tunnels to one peer that are opened ahead of need, because those that exist are busy.
    pub eager_tunnels_per_peer: usize,
    /// From this many streams on the least loaded tunnel, another is opened ahead of need.
    pub busy_streams: usize,
    /// A tunnel without streams is closed after this time.
    pub idle_timeout: Duration,
    /// A tunnel takes no new streams after at most this time, so that both ends prove again who they are. Streams that
    /// are open live on.
    pub max_age: Duration,
    /// Silence of the peer after which it is pinged.
    pub ping_interval: Duration,
    /// Further silence after a ping, at which the tunnel is dead.
    pub ping_timeout: Duration,
    /// Bytes that the peer may send on one stream before the application takes them. The connection's window is this
    /// times `streams_per_tunnel`, so that readers that stall can never use up their neighbours' share.
    pub stream_window: u32,
}

/// SYNs go out at 0, 1, 3 and 7 s; a peer that answers none of them is down or filtered.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A busy node signs in tens of milliseconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Longer than [`CONNECT_TIMEOUT`], so that the peer can tell us that its own dial timed out.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// 6,400 streams to one pod from one thread of one pod.
const TUNNELS_PER_PEER: usize = 64;

/// With tunnels that are old after a day, connections of eight months.
const RETIRED_PER_PEER: usize = 256;

/// A tunnel lives on one core at each end; more tunnels than a large node has cores bring nothing.
const EAGER_TUNNELS_PER_PEER: usize = 8;

/// Measured: from 4 bulk streams on, one tunnel for each beats a shared one.
const BUSY_STREAMS: usize = 4;

/// Istio's. The price of an idle tunnel is some 50 KB and a ping each 10 s, that of a new one a millisecond of CPU.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            connect_timeout: CONNECT_TIMEOUT,
            tls_timeout: HANDSHAKE_TIMEOUT,
            h2_timeout: HANDSHAKE_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            streams_per_tunnel: server::MAX_STREAMS as usize,
            tunnels_per_peer: TUNNELS_PER_PEER,
            retired_per_peer: RETIRED_PER_PEER,
            eager_tunnels_per_peer: EAGER_TUNNELS_PER_PEER,
            busy_streams: BUSY_STREAMS,
            idle_timeout: IDLE_TIMEOUT,
            max_age: server::MAX_AGE,
            ping_interval: server::PING_INTERVAL,
            ping_timeout: server::PING_TIMEOUT,
            stream_window: server::STREAM_WINDOW,
        }
    }
}
