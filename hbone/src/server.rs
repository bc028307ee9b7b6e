//! What a server implements to decide about inbound tunnels and requests, and what it learns about their end.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;

use spiffe::SpiffeId;
use tokio::net::TcpStream;

use crate::connect::{ConnectRequest, ConnectResponse};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{RelayOpts, RelaySummary};

/// The verified client of an inbound tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The SPIFFE id of its certificate, which chains to our trust bundle.
    pub identity: SpiffeId,
    /// The source address of its TCP connection.
    pub address: SocketAddr,
}

/// Decides about one inbound tunnel and its CONNECT requests.
pub trait TunnelService {
    /// Authorizes the request and dials the application.
    ///
    /// The future is dropped when the server is aborted, and when the peer cancels the request or the tunnel breaks:
    /// at once if the peer has sent no bytes on the stream, two seconds later if it has.
    fn connect(
        &self,
        peer: &Peer,
        request: ConnectRequest,
    ) -> impl Future<Output = Result<Accepted, Rejected>>;

    /// Whether the tunnel of this peer is served. Called once, after both handshakes.
    ///
    /// A tunnel that is not accepted is closed and ends as [`ServeOutcome::Aborted`].
    fn accept_tunnel(&self, peer: &Peer) -> bool {
        let _ = peer;
        true
    }

    /// Reports a request that was rejected without a call of [`TunnelService::connect`], because it is not a
    /// well-formed CONNECT. For logs and metrics; `detail` is printable ASCII of bounded length.
    fn on_bad_request(&self, peer: &Peer, reason: Reason, detail: &str) {
        let _ = (peer, reason, detail);
    }

    /// Reports a stream that was reset with REFUSED_STREAM, because the earlier streams of the tunnel hold the maximum
    /// of tasks and buffers. A peer can cause this call as often as it sends requests.
    fn on_refused_stream(&self, peer: &Peer) {
        let _ = peer;
    }
}

/// An accepted request: the dialled application, and how to relay to it.
pub struct Accepted {
    /// The connected socket of the application.
    pub upstream: TcpStream,
    /// Headers of the 200.
    pub response: ConnectResponse,
    /// Counters, stop token and prefix of the relay.
    pub opts: RelayOpts,
    /// Called once when the relay ends, also if it is aborted.
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

/// A rejected request. Only the status is sent to the peer; the reason is for our own records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejected {
    /// HTTP status: 400 malformed or not for this pod, 401 denied by policy, 503 no such workload or connect failed.
    pub status: u16,
    /// Stable snake_case code.
    pub reason: &'static str,
}

/// How an inbound tunnel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeOutcome {
    /// The peer closed it without an error.
    ClosedByPeer,
    /// Drained: GOAWAY was sent, and all streams have finished.
    Drained,
    /// Aborted from this side.
    Aborted,
    /// It failed, see [`ServeSummary::error`].
    Failed,
}

/// Totals and outcome of an inbound tunnel.
#[derive(Debug)]
pub struct ServeSummary {
    /// The peer, if the TLS handshake verified it.
    pub peer: Option<Peer>,
    /// How the tunnel ended.
    pub outcome: ServeOutcome,
    /// Why, for [`ServeOutcome::Failed`].
    pub error: Option<Error>,
    /// CONNECT requests that the tunnel carried.
    pub streams: u64,
}
