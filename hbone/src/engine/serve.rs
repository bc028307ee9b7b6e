//! A tunnel that comes in: TLS, HTTP/2, and a task for each CONNECT.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::Request;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::accept::{Opened, Wire, accept};
use super::head;
use super::heart::{Beat, Heart};
use super::inbox::Inbox;
use super::relay::{LAST_WORDS, Relay};
use super::transport::Cause;
use super::tunnel::{pong, send_ping};
use crate::connect::ConnectRequest;
use crate::reason::Reason;
use crate::relay::{Chunk, Counters, RelayOpts, RelayOutcome, RelaySummary, Side};
use crate::server::{
    Accepted, Peer, Rejected, ServeConfig, ServeOutcome, ServeSummary, TunnelService,
};
use crate::tls::{ServerTls, Shown};

/// Serves one inbound transport until it and its streams have ended: TLS, HTTP/2, and for each CONNECT the decision of
/// `connect` and a relay.
///
/// `drain` sends GOAWAY and lets open streams finish; `abort` resets everything now.
pub async fn serve<C: TunnelService + 'static>(
    transport: TcpStream,
    tls: &ServerTls,
    connect: Rc<C>,
    config: &ServeConfig,
    drain: CancellationToken,
    abort: CancellationToken,
) -> ServeSummary {
    let (mut peer, mut streams) = (None, 0);
    // Boxed, so that the long life of a tunnel does not carry the size of its handshake.
    let accepted = Box::pin(accept(transport, tls, config, &mut peer));
    let accepted = tokio::select! {
        biased;
        () = abort.cancelled() => {
            return ServeSummary { peer: None, outcome: ServeOutcome::Aborted, error: None, streams };
        }
        accepted = accepted => accepted,
    };
    let (outcome, error) = match (accepted, peer.clone()) {
        (
            Ok(Opened {
                connection,
                cause,
                shown,
            }),
            Some(peer),
        ) if connect.accept_tunnel(&peer) => {
            let server = Server {
                connect,
                peer: Rc::new(peer),
                cause,
                shown,
                abort: abort.clone(),
                max_header_bytes: config.max_header_bytes,
            };
            let outcome = Box::pin(server.run(connection, config, drain, &mut streams)).await;
            (
                outcome,
                server
                    .cause
                    .error()
                    .filter(|_| outcome == ServeOutcome::Failed),
            )
        }
        (Ok(_), Some(_)) => (ServeOutcome::Aborted, None),
        (Ok(_), None) => (ServeOutcome::Failed, Some(Reason::Internal.into())),
        (Err(error), _) => (ServeOutcome::Failed, Some(error)),
    };
    ServeSummary {
        peer,
        outcome,
        error,
        streams,
    }
}

/// An accepted tunnel.
struct Server<C> {
    connect: Rc<C>,
    peer: Rc<Peer>,
    cause: Cause,
    shown: Shown,
    abort: CancellationToken,
    max_header_bytes: u32,
}

impl<C: TunnelService + 'static> Server<C> {
    async fn run(
        &self,
        mut connection: Box<Connection<Wire, Chunk>>,
        config: &ServeConfig,
        drain: CancellationToken,
        streams: &mut u64,
    ) -> ServeOutcome {
        let mut ping = connection.ping_pong();
        let mut tasks = JoinSet::new();
        // HTTP/2 counts a stream no more when it is closed or reset, but its bytes may still be on their way to an
        // application that reads slowly. Together with the window this bounds what a peer can make us hold.
        let most_tasks = config.max_streams.saturating_mul(2) as usize;
        let mut draining = false;
        let old_at = Instant::now() + age(config.max_age, fastrand::f64());
        let ended = {
            let mut revoked = pin!(self.shown.revoked());
            let pulse = self.cause.pulse().clone();
            let mut heart = Heart::new(config.ping_interval, config.ping_timeout, pulse);
            loop {
                tokio::select! {
                    biased;
                    () = self.abort.cancelled() => break ServeOutcome::Aborted,
                    () = drain.cancelled(), if !draining => {
                        draining = true;
                        connection.graceful_shutdown();
                    }
                    () = sleep_until(old_at), if !draining => {
                        draining = true;
                        connection.graceful_shutdown();
                    }
                    () = &mut revoked => {
                        self.cause.set(Reason::PeerRevoked.into());
                        break ServeOutcome::Failed;
                    }
                    () = pong(&mut ping) => heart.pong(Instant::now()),
                    () = sleep_until(heart.due()) => match heart.beat(Instant::now()) {
                        Beat::Ping => send_ping(&mut ping),
                        Beat::Dead => {
                            self.cause.set(Reason::PingTimeout.into());
                            break ServeOutcome::Failed;
                        }
                        // Nobody waits here for a peer, and so none is doubted.
                        Beat::Unproven | Beat::Nothing => {}
                    },
                    Some(_) = tasks.join_next() => {}
                    request = connection.accept() => match request {
                        Some(Ok((_, mut respond))) if tasks.len() >= most_tasks => {
                            self.connect.on_refused_stream(&self.peer);
                            respond.send_reset(h2::Reason::REFUSED_STREAM);
                        }
                        Some(Ok((request, respond))) => {
                            *streams += 1;
                            tasks.spawn_local(self.stream(request, respond));
                        }
                        Some(Err(e)) => {
                            while tasks.try_join_next().is_some() {}
                            // A peer that has no streams left may close without further ado.
                            let broken = !(e.is_io() && tasks.is_empty());
                            self.cause.set(self.cause.explain(e));
                            break if broken { ServeOutcome::Failed } else { finished(draining) };
                        }
                        None => break finished(draining),
                    },
                }
            }
        };
        self.finish(ended, connection, tasks).await
    }

    /// The connection has ended. Streams that had ended before may still hold bytes that their applications have not
    /// taken; all others see its end.
    async fn finish(
        &self,
        ended: ServeOutcome,
        connection: Box<Connection<Wire, Chunk>>,
        mut tasks: JoinSet<()>,
    ) -> ServeOutcome {
        if ended == ServeOutcome::Aborted {
            self.cause.set(Reason::Stopped.into());
        }
        drop(connection);
        let all = async { while tasks.join_next().await.is_some() {} };
        tokio::select! {
            biased;
            () = self.abort.cancelled() => {}
            () = all => return ended,
        }
        tasks.shutdown().await;
        ServeOutcome::Aborted
    }

    /// One CONNECT. The future owns what it needs: it outlives the borrow of the server.
    fn stream(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Chunk>,
    ) -> impl Future<Output = ()> + use<C> {
        let (connect, peer) = (Rc::clone(&self.connect), Rc::clone(&self.peer));
        let (cause, max_header_bytes) = (self.cause.clone(), self.max_header_bytes);
        async move {
            let (head, body) = request.into_parts();
            let request = match head::parse(&head, max_header_bytes) {
                Ok(request) => request,
                Err(malformed) => {
                    let detail = malformed.to_string();
                    connect.on_bad_request(&peer, Reason::ConnectMalformed, &detail);
                    return reject(
                        &mut respond,
                        if malformed.header == "headers" {
                            431
                        } else {
                            400
                        },
                    );
                }
            };
            let mut inbox = Inbox::new(body);
            let decision = decide(&*connect, &peer, request, &mut inbox, &mut respond).await;
            match decision {
                Some(Ok(accepted)) => relay(accepted, inbox, &mut respond, &cause).await,
                Some(Err(Rejected { status, .. })) => reject(&mut respond, status),
                None => {}
            }
        }
    }
}

/// Up to a tenth more than the least: a peer whose own limit is the same replaces the tunnel before it is asked to.
fn age(least: Duration, fortune: f64) -> Duration {
    least.mul_f64(1.0 + 0.1 * fortune)
}

fn finished(draining: bool) -> ServeOutcome {
    if draining {
        ServeOutcome::Drained
    } else {
        ServeOutcome::ClosedByPeer
    }
}

fn reject(respond: &mut SendResponse<Chunk>, status: u16) {
    // Fails if the peer has given up, and then nobody waits for it.
    let _gone = respond.send_response(head::rejected(status), true);
}

/// The caller's decision; none if the peer has given up before.
///
/// What the peer sends meanwhile is taken in, within the stream's window. If a reset follows those bytes at once, they
/// still reach the application if the decision is made soon, as they would without a tunnel.
async fn decide<C: TunnelService>(
    connect: &C,
    peer: &Peer,
    request: ConnectRequest,
    inbox: &mut Inbox,
    respond: &mut SendResponse<Chunk>,
) -> Option<Result<Accepted, Rejected>> {
    let given_up = poll_fn(|cx| {
        let broken = matches!(inbox.poll_fill(cx), Poll::Ready(Err(_)));
        let reset = respond.poll_reset(cx).is_ready();
        if broken || reset {
            Poll::Ready(inbox.is_empty())
        } else {
            Poll::Pending
        }
    });
    let given_up = async {
        let nothing_to_deliver = given_up.await;
        if !nothing_to_deliver {
            sleep(LAST_WORDS).await;
        }
    };
    tokio::select! {
        biased;
        () = given_up => None,
        decision = connect.connect(peer, request) => Some(decision),
    }
}

async fn relay(
    accepted: Accepted,
    mut inbox: Inbox,
    respond: &mut SendResponse<Chunk>,
    cause: &Cause,
) {
    let Accepted {
        upstream,
        response,
        opts,
        on_end,
    } = accepted;
    let RelayOpts {
        counters,
        stop,
        prefix,
        ..
    } = opts;
    let mut end = OnEnd {
        report: Some(on_end),
        counters: &counters,
    };
    let relay = Relay {
        app: Side::Upstream,
        counters: &counters,
        stop: &stop,
        cause,
        load: None,
    };
    inbox.put_first(prefix);
    let outcome = match respond.send_response(head::accepted(&response), false) {
        Ok(send) => {
            let inbox = std::future::ready(Ok(inbox));
            relay.run(upstream, Vec::new(), send, inbox).await
        }
        Err(e) => relay.deliver_only(upstream, inbox, e).await,
    };
    end.report(outcome);
}

/// Reports the end of a relay, whatever happens.
struct OnEnd<'a> {
    report: Option<Box<dyn FnOnce(RelaySummary)>>,
    counters: &'a Counters,
}

impl OnEnd<'_> {
    fn report(&mut self, outcome: RelayOutcome) {
        if let Some(report) = self.report.take() {
            report(RelaySummary::new(self.counters, outcome));
        }
    }
}

impl Drop for OnEnd<'_> {
    fn drop(&mut self) {
        self.report(RelayOutcome::Failed(Reason::Stopped.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Never;

    impl TunnelService for Never {
        async fn connect(&self, _: &Peer, _: ConnectRequest) -> Result<Accepted, Rejected> {
            std::future::pending().await
        }
    }

    /// Each inbound tunnel costs at least this; its handshake and its connection are boxed.
    #[test]
    fn a_served_tunnel_is_a_small_future() {
        fn size<'a, F: Future>(
            _: impl FnOnce(
                TcpStream,
                &'a ServerTls,
                Rc<Never>,
                &'a ServeConfig,
                CancellationToken,
                CancellationToken,
            ) -> F,
        ) -> usize {
            size_of::<F>()
        }
        let size = size(serve::<Never>);
        assert!(size <= 1024, "{size} bytes");
    }
}
