//! A stream that we have opened.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::SendStream;
use h2::client::ResponseFuture;
use spiffe::SpiffeId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, Timeout, timeout, timeout_at};

use super::head;
use super::inbox::Inbox;
use super::io::Io;
use super::relay::{Broken, Relay};
use super::tunnel::{Tunnel, TunnelLease};
use crate::connect::ConnectResponse;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::{Chunk, RelayOpts, RelaySummary, Side};

/// One application connection on a tunnel. Dropped, it resets its stream.
pub struct Stream {
    pub(super) send: SendStream<Chunk>,
    pub(super) answer: Answer,
    /// Counts the stream on its tunnel; last, so that the stream has ended when it is counted out.
    pub(super) tunnel: TunnelLease,
}

/// The peer's answer to a CONNECT.
pub(super) enum Answer {
    /// Not here yet, within its deadline; and when it was asked for.
    Awaited(Pin<Box<Timeout<ResponseFuture>>>, Instant),
    /// Yes.
    Accepted(ConnectResponse, Box<Inbox>),
    /// No, or never.
    Failed(Error),
}

impl Stream {
    pub(super) fn new(
        send: SendStream<Chunk>,
        response: ResponseFuture,
        deadline: Instant,
        tunnel: TunnelLease,
    ) -> Self {
        Self {
            send,
            answer: Answer::Awaited(Box::pin(timeout_at(deadline, response)), Instant::now()),
            tunnel,
        }
    }

    /// Waits for the peer's answer to the CONNECT, until the pool's deadline for it. Later calls give the same answer.
    pub async fn response(&mut self) -> Result<ConnectResponse, Error> {
        self.answer.wait(&self.tunnel).await;
        match &self.answer {
            Answer::Accepted(response, _) => Ok(response.clone()),
            Answer::Failed(error) => Err(error.clone()),
            // `wait` never leaves this behind.
            Answer::Awaited(..) => Err(Reason::Internal.into()),
        }
    }

    /// Like [`Stream::response`], with less patience than the pool: for one who can go elsewhere.
    pub async fn response_within(&mut self, limit: Duration) -> Result<ConnectResponse, Error> {
        let late = timeout(limit, self.answer.wait(&self.tunnel))
            .await
            .is_err();
        if late {
            self.answer.late(&self.tunnel);
        }
        self.response().await
    }

    /// The peer's verified identity.
    pub fn peer(&self) -> &SpiffeId {
        self.tunnel.peer()
    }

    /// Moves bytes between `downstream` and the peer until both directions have closed.
    ///
    /// Without [`RelayOpts::optimistic`] nothing is read from the downstream before the peer has answered.
    pub async fn relay(self, downstream: TcpStream, opts: RelayOpts) -> RelaySummary {
        let Self {
            send,
            mut answer,
            tunnel,
        } = self;
        let RelayOpts {
            counters,
            stop,
            optimistic,
            prefix,
        } = opts;
        let relay = Relay {
            app: Side::Downstream,
            counters: &counters,
            stop: &stop,
            cause: tunnel.cause(),
            load: Some(tunnel.load()),
        };
        if !optimistic {
            tokio::select! {
                biased;
                _ = stop.stopped() => {}
                () = answer.wait(&tunnel) => {}
            }
        }
        let inbox = async {
            poll_fn(|cx| answer.poll_wait(cx, &tunnel)).await;
            match answer {
                Answer::Accepted(_, inbox) => Ok(*inbox),
                Answer::Failed(error) => Err(Broken::Tunnel(error)),
                Answer::Awaited(..) => Err(Broken::Tunnel(Reason::Internal.into())),
            }
        };
        let outcome = relay.run(downstream, prefix, send, inbox).await;
        RelaySummary::new(&counters, outcome)
    }

    /// The stream as a byte stream, for what is not a plain relay: a tunnel within the tunnel, or HTTP.
    ///
    /// Much slower than [`Stream::relay`]. Reading waits for the peer's answer first. Shutting down sends END_STREAM;
    /// dropping before that, or before the end was read, resets the stream.
    pub fn into_io(self) -> impl AsyncRead + AsyncWrite + Unpin {
        Io::new(self)
    }
}

impl Answer {
    /// Until the answer is here or will not come.
    pub(super) async fn wait(&mut self, tunnel: &Tunnel) {
        poll_fn(|cx| self.poll_wait(cx, tunnel)).await;
    }

    pub(super) fn poll_wait(&mut self, cx: &mut Context<'_>, tunnel: &Tunnel) -> Poll<()> {
        let Self::Awaited(response, _) = self else {
            return Poll::Ready(());
        };
        let failed = |error: Error| Self::Failed(error.at(tunnel.address()));
        *self = match ready!(response.as_mut().poll(cx)) {
            Ok(Ok(response)) => match head::answer(&response) {
                Ok(head) => Self::Accepted(head, Box::new(Inbox::new(response.into_body()))),
                Err(reason) => failed(reason.into()),
            },
            Ok(Err(error)) => failed(tunnel.cause().explain(error)),
            Err(_) => {
                self.late(tunnel);
                return Poll::Ready(());
            }
        };
        Poll::Ready(())
    }

    /// It has not come in time.
    fn late(&mut self, tunnel: &Tunnel) {
        if let Self::Awaited(_, since) = self {
            tunnel.unanswered(*since);
            *self = Self::Failed(Error::new(Reason::ConnectResponseTimeout).at(tunnel.address()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each open connection costs at least its relay's future.
    #[test]
    fn a_relay_is_a_small_future() {
        fn size<F: Future>(_: impl FnOnce(Stream, TcpStream, RelayOpts) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(Stream::relay);
        assert!(size <= 2560, "{size} bytes");
    }
}
