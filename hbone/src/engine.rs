//! The h2 + tokio-rustls engine. Nothing outside of this module names `h2`, `http` or `bytes`.

use std::rc::Rc;

use spiffe::SpiffeId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::connect::ConnectResponse;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Outcome, RelayEnd, RelayOpts};
use crate::server::{Connect, Ended, ServeConfig, ServeEnd};
use crate::tls::ServerTls;

/// One application connection on a tunnel, from this side.
pub struct Stream {
    peer: Rc<SpiffeId>,
}

impl Stream {
    /// Waits for the peer's answer to the CONNECT. Later calls give the same answer.
    pub async fn response(&mut self) -> Result<ConnectResponse, Error> {
        Err(Reason::Draining.into())
    }

    /// The peer's verified identity.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// Moves bytes between `downstream` and the peer until both directions have closed.
    pub async fn relay(self, downstream: TcpStream, opts: RelayOpts) -> RelayEnd {
        drop(downstream);
        RelayEnd::new(&opts.counters, Outcome::Failed(Reason::Draining.into()))
    }

    /// The stream as a byte stream, for what is not a plain relay.
    pub fn into_io(self) -> impl AsyncRead + AsyncWrite + Unpin {
        tokio::io::empty()
    }
}

/// Serves one inbound transport until it ends: TLS, HTTP/2, and for each CONNECT the decision of `connect` and a relay.
///
/// `drain` sends GOAWAY and lets open streams finish; `abort` resets everything now.
pub async fn serve<C: Connect + 'static>(
    transport: TcpStream,
    tls: &ServerTls,
    connect: Rc<C>,
    config: &ServeConfig,
    drain: CancellationToken,
    abort: CancellationToken,
) -> ServeEnd {
    let _ = (transport, tls, connect, config, drain, abort);
    ServeEnd { peer: None, ended: Ended::Aborted, error: None, streams: 0 }
}
