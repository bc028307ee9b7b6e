//! A stream that we have opened: its request, the peer's response, and its relay.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::SendStream;
use h2::client::ResponseFuture;
use spiffe::SpiffeId;
use tokio::net::TcpStream;
use tokio::time::{Instant, Timeout, timeout, timeout_at};

use super::head;
use super::recv_buffer::RecvBuffer;
use super::relay::{self, RelayContext, RelayError};
use super::tunnel::{StreamLease, Tunnel};
use crate::connect::{ConnectRequest, ConnectResponse};
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, RelayOpts, RelaySummary, Side};

/// One application connection on a tunnel. Dropping it resets the stream.
pub struct Stream {
    pub(super) send: SendStream<Chunk>,
    pub(super) response: ResponseState,
    /// Counts the stream on its tunnel. The last field, so that the stream has ended before the count changes.
    pub(super) tunnel: StreamLease,
}

/// The peer's response to a CONNECT.
pub(super) enum ResponseState {
    /// Not received yet.
    Pending {
        response: Pin<Box<Timeout<ResponseFuture>>>,
        sent_at: Instant,
    },
    /// The peer accepted the request.
    Accepted(ConnectResponse, Box<RecvBuffer>),
    /// The peer rejected the request, or did not respond in time.
    Failed(Error),
}

impl Stream {
    /// Sends a CONNECT. Fails with [`Reason::GoAway`] if the tunnel accepts no more streams.
    pub(crate) fn open(tunnel: &Rc<Tunnel>, request: &ConnectRequest) -> Result<Self, Error> {
        let (response, send, lease) = tunnel.send_request(head::encode_request(request)?)?;
        let sent_at = Instant::now();
        let deadline = sent_at + tunnel.config().response_timeout;
        Ok(Self {
            send,
            response: ResponseState::Pending {
                response: Box::pin(timeout_at(deadline, response)),
                sent_at,
            },
            tunnel: lease,
        })
    }

    /// Waits for the peer's response to the CONNECT, until the pool's deadline for it. Later calls return the same
    /// result.
    pub async fn response(&mut self) -> Result<ConnectResponse, Error> {
        self.response.wait(&self.tunnel).await;
        match &self.response {
            ResponseState::Accepted(response, _) => Ok(response.clone()),
            ResponseState::Failed(error) => Err(error.clone()),
            // Unreachable after `wait`.
            ResponseState::Pending { .. } => Err(Reason::Internal.into()),
        }
    }

    /// Like [`Stream::response`], with a shorter deadline, for callers that can retry on another endpoint.
    pub async fn response_within(&mut self, limit: Duration) -> Result<ConnectResponse, Error> {
        let is_late = timeout(limit, self.response.wait(&self.tunnel))
            .await
            .is_err();
        if is_late {
            self.response.time_out(&self.tunnel);
        }
        self.response().await
    }

    /// The peer's verified identity.
    pub fn peer(&self) -> &SpiffeId {
        self.tunnel.peer()
    }

    /// Moves bytes between `downstream` and the peer until both directions have closed.
    ///
    /// Without [`RelayOpts::optimistic`] the downstream is not read before the peer has responded.
    pub async fn relay(self, downstream: TcpStream, opts: RelayOpts) -> RelaySummary {
        let Self {
            send,
            mut response,
            tunnel,
        } = self;
        let RelayOpts {
            counters,
            stop,
            optimistic,
            prefix,
        } = opts;
        let context = RelayContext {
            app_side: Side::Downstream,
            counters: &counters,
            stop: &stop,
            status: tunnel.status(),
            load: Some(tunnel.load()),
        };
        if !optimistic {
            tokio::select! {
                biased;
                _ = stop.stopped() => {}
                () = response.wait(&tunnel) => {}
            }
        }
        let received = async {
            poll_fn(|cx| response.poll_ready(cx, &tunnel)).await;
            match response {
                ResponseState::Accepted(_, received) => Ok(*received),
                ResponseState::Failed(error) => Err(RelayError::Tunnel(error)),
                ResponseState::Pending { .. } => Err(RelayError::Tunnel(Reason::Internal.into())),
            }
        };
        let outcome = relay::run(&context, downstream, prefix, send, received).await;
        RelaySummary::new(&counters, outcome)
    }
}

impl ResponseState {
    /// Waits until the response has arrived or failed.
    async fn wait(&mut self, tunnel: &Tunnel) {
        poll_fn(|cx| self.poll_ready(cx, tunnel)).await;
    }

    pub(super) fn poll_ready(&mut self, cx: &mut Context<'_>, tunnel: &Tunnel) -> Poll<()> {
        let Self::Pending { response, .. } = self else {
            return Poll::Ready(());
        };
        let failed = |error: Error| Self::Failed(error.with_peer(tunnel.address()));
        *self = match ready!(response.as_mut().poll(cx)) {
            Ok(Ok(response)) => match head::decode_response(&response) {
                Ok(head) => Self::Accepted(head, Box::new(RecvBuffer::new(response.into_body()))),
                Err(reason) => failed(reason.into()),
            },
            Ok(Err(error)) => failed(tunnel.status().convert_error(error)),
            Err(_) => {
                self.time_out(tunnel);
                return Poll::Ready(());
            }
        };
        Poll::Ready(())
    }

    /// Fails the request, because the response has not arrived in time.
    fn time_out(&mut self, tunnel: &Tunnel) {
        if let Self::Pending { sent_at, .. } = self {
            tunnel.suspect_if_silent_since(*sent_at);
            let error = Error::new(Reason::ConnectResponseTimeout);
            *self = Self::Failed(error.with_peer(tunnel.address()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each open connection costs at least its relay's future.
    #[test]
    fn relay_future_is_at_most_2560_bytes() {
        fn size<F: Future>(_: impl FnOnce(Stream, TcpStream, RelayOpts) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(Stream::relay);
        assert!(size <= 2560, "{size} bytes");
    }
}
