//! The inbound side of the interface: who asks, what the caller answers, and how a tunnel ended.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::net::TcpStream;

use crate::connect::{ConnectRequest, ConnectResponse};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{RelayOpts, RelaySummary};

/// The verified other end of an inbound tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The SPIFFE id of its certificate, which chains to our trust bundle.
    pub identity: SpiffeId,
    /// Where its TCP connection comes from.
    pub address: SocketAddr,
}

/// The caller's decision about each CONNECT of a tunnel.
pub trait TunnelService {
    /// Authorizes the request and dials the application. The future is dropped when the server is aborted, and when the
    /// peer gives up or the tunnel breaks: at once if the peer has sent nothing, two seconds later if it has.
    fn connect(
        &self,
        peer: &Peer,
        request: ConnectRequest,
    ) -> impl Future<Output = Result<Accepted, Rejected>>;

    /// A request that was answered without asking [`TunnelService::connect`], because it is no well-formed CONNECT. For logs
    /// and metrics; `detail` is printable ASCII of bounded length.
    fn on_bad_request(&self, peer: &Peer, reason: Reason, detail: &str) {
        let _ = (peer, reason, detail);
    }

    /// The peer has proven who it is, and both handshakes are done: whether its tunnel is served. If not, it is closed
    /// and ends as [`ServeOutcome::Aborted`].
    fn accept_tunnel(&self, peer: &Peer) -> bool {
        let _ = peer;
        true
    }

    /// A stream was refused before anybody looked at it, because the tunnel's earlier ones still hold all that they
    /// may. A peer can bring this about as often as it sends requests.
    fn on_refused_stream(&self, peer: &Peer) {
        let _ = peer;
    }
}

/// Yes: the dialled application, and how to relay to it.
pub struct Accepted {
    /// The connected socket of the application.
    pub upstream: TcpStream,
    /// Headers of the 200.
    pub response: ConnectResponse,
    /// Counters, stop and prefix of the relay.
    pub opts: RelayOpts,
    /// Called once with the relay's end, also if it was aborted.
    pub on_end: Box<dyn FnOnce(RelaySummary)>,
}

impl fmt::Debug for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted")
            .field("upstream", &self.upstream)
            .field("response", &self.response)
            .finish_non_exhaustive()
    }
}

/// No: the HTTP status for the peer, and the reason for our own records. The peer learns the status only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejected {
    /// 400 malformed or not for this pod, 401 denied by policy, 503 no such workload or connect failed.
    pub status: u16,
    /// Stable snake_case code.
    pub reason: &'static str,
}

/// Limits of an inbound tunnel.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// For the whole TLS handshake.
    pub tls_timeout: Duration,
    /// For the HTTP/2 preface after it.
    pub h2_timeout: Duration,
    /// Streams that the peer may have open at once; it learns this limit in SETTINGS.
    pub max_streams: u32,
    /// Bytes that the peer may send on one stream before the application takes them. The connection's window is this
    /// times `max_streams`, so that readers that stall can never use up their neighbours' share.
    pub stream_window: u32,
    /// Bytes of decoded headers of one request.
    pub max_header_bytes: u32,
    /// The peer is asked to open another tunnel after at least this time, so that both ends prove again who they are.
    /// Streams that are open live on.
    pub max_age: Duration,
    /// Silence of the peer after which it is pinged.
    pub ping_interval: Duration,
    /// Further silence after a ping, at which the tunnel is dead.
    pub ping_timeout: Duration,
}

/// Longest wait for a handshake step: a busy node signs in tens of milliseconds, and a slowloris holds a socket no
/// longer than this.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most that a server's peer may open at once. Istio's client opens no more than this either.
pub(crate) const MAX_STREAMS: u32 = 100;

/// One stream fills 8 Gbit/s at 2 ms of round-trip time with this window, and 100 stalled readers hold 200 MiB.
pub(crate) const STREAM_WINDOW: u32 = 2 * 1024 * 1024;

/// An HBONE request carries four headers of together under 1 KiB; Istio allows as much as this.
const MAX_HEADER_BYTES: u32 = 64 * 1024;

/// As long as a certificate lives unless configured otherwise: what was proven is proven again at least that often.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// As Istio's: a vanished peer is noticed in half a minute, an idle tunnel costs 6 small frames per minute.
pub(crate) const PING_INTERVAL: Duration = Duration::from_secs(10);

/// See [`PING_INTERVAL`].
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(20);

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

/// How an inbound tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeOutcome {
    /// The peer closed it in good order.
    ClosedByPeer,
    /// Drained: GOAWAY was sent, and all streams have finished.
    Drained,
    /// Aborted from this side.
    Aborted,
    /// It broke, see [`ServeSummary::error`].
    Failed,
}

/// The end of an inbound tunnel.
#[derive(Debug)]
pub struct ServeSummary {
    /// The peer, if the TLS handshake got as far as to know it.
    pub peer: Option<Peer>,
    /// How it ended.
    pub outcome: ServeOutcome,
    /// Why, for [`ServeOutcome::Failed`].
    pub error: Option<Error>,
    /// CONNECT requests that it carried.
    pub streams: u64,
}
