//! How an accepted tunnel is served: its handshakes, a task for each request, and its end.

mod request;

use std::future::Future;
use std::pin::pin;
use std::rc::Rc;

use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::Request;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::accept::{AcceptedTunnel, accept};
use super::failure::TunnelStatus;
use super::keepalive::{Action, Keepalive, Pinger};
use super::lifetime::accepted_max_age;
use super::transport::ServerIo;
use crate::config::ServeConfig;
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::server::{Peer, ServeOutcome, ServeSummary, TunnelService};
use crate::tls::{PeerCertSerials, ServerTls};
use request::serve_request;

/// Serves one inbound TCP connection until the tunnel and its streams have ended: TLS, HTTP/2, and for each CONNECT the
/// decision of `service` and a relay.
///
/// `drain` sends GOAWAY and lets open streams finish; `abort` resets all streams at once.
pub async fn serve<S: TunnelService + 'static>(
    tcp: TcpStream,
    tls: &ServerTls,
    service: Rc<S>,
    config: &ServeConfig,
    drain: CancellationToken,
    abort: CancellationToken,
) -> ServeSummary {
    let (mut peer, mut streams) = (None, 0);
    // Boxed, so that the memory of the handshake is freed when it is done.
    let accepted = Box::pin(accept(tcp, tls, config, &mut peer));
    let accepted = tokio::select! {
        biased;
        () = abort.cancelled() => {
            return ServeSummary { peer: None, outcome: ServeOutcome::Aborted, error: None, streams };
        }
        accepted = accepted => accepted,
    };
    let (outcome, error) = match (accepted, peer.clone()) {
        (
            Ok(AcceptedTunnel {
                connection,
                status,
                peer_serials,
            }),
            Some(peer),
        ) if service.accept_tunnel(&peer) => {
            let server = Server {
                service,
                peer: Rc::new(peer),
                status,
                peer_serials,
                abort: abort.clone(),
                max_header_bytes: config.max_header_bytes,
            };
            let outcome = Box::pin(server.run(connection, config, drain, &mut streams)).await;
            let error = server.status.error();
            (outcome, error.filter(|_| outcome == ServeOutcome::Failed))
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

/// The server end of one tunnel.
struct Server<S> {
    service: Rc<S>,
    peer: Rc<Peer>,
    status: TunnelStatus,
    peer_serials: PeerCertSerials,
    abort: CancellationToken,
    max_header_bytes: u32,
}

impl<S: TunnelService + 'static> Server<S> {
    /// Accepts requests until the tunnel ends. The rules for its end are listed in [`super::lifetime`].
    async fn run(
        &self,
        mut connection: Box<Connection<ServerIo, Chunk>>,
        config: &ServeConfig,
        drain: CancellationToken,
        streams: &mut u64,
    ) -> ServeOutcome {
        let mut pinger = Pinger::new(connection.ping_pong());
        let mut tasks = JoinSet::new();
        // HTTP/2 no longer counts a stream that is closed or reset, but its bytes may still be queued for an application
        // that reads slowly. Together with the window this bounds the memory that a peer can occupy.
        let max_tasks = config.max_streams.saturating_mul(2) as usize;
        let mut is_draining = false;
        let goaway_at = Instant::now() + accepted_max_age(config.max_age, fastrand::f64());
        let outcome = {
            let mut revoked = pin!(self.peer_serials.revoked());
            let last_received = self.status.last_received().clone();
            let mut keepalive =
                Keepalive::new(config.ping_interval, config.ping_timeout, last_received);
            loop {
                tokio::select! {
                    biased;
                    () = self.abort.cancelled() => break ServeOutcome::Aborted,
                    () = drain.cancelled(), if !is_draining => {
                        is_draining = true;
                        connection.graceful_shutdown();
                    }
                    () = sleep_until(goaway_at), if !is_draining => {
                        is_draining = true;
                        connection.graceful_shutdown();
                    }
                    () = &mut revoked => {
                        self.status.set_error(Reason::PeerRevoked.into());
                        break ServeOutcome::Failed;
                    }
                    () = pinger.pong() => keepalive.on_pong(Instant::now()),
                    () = sleep_until(keepalive.next_deadline()) => {
                        match keepalive.on_deadline(Instant::now()) {
                            Action::SendPing => pinger.send_ping(),
                            Action::Fail => {
                                self.status.set_error(Reason::PingTimeout.into());
                                break ServeOutcome::Failed;
                            }
                            // A server sends no requests, so it suspects no peer.
                            Action::Avoid | Action::None => {}
                        }
                    }
                    Some(_) = tasks.join_next() => {}
                    request = connection.accept() => match request {
                        Some(Ok((_, mut respond))) if tasks.len() >= max_tasks => {
                            self.service.on_refused_stream(&self.peer);
                            respond.send_reset(h2::Reason::REFUSED_STREAM);
                        }
                        Some(Ok((request, respond))) => {
                            *streams += 1;
                            tasks.spawn_local(self.serve_request(request, respond));
                        }
                        Some(Err(e)) => break self.on_connection_error(e, &mut tasks, is_draining),
                        None => break closed(is_draining),
                    },
                }
            }
        };
        self.finish(outcome, connection, tasks).await
    }

    fn on_connection_error(
        &self,
        error: h2::Error,
        tasks: &mut JoinSet<()>,
        is_draining: bool,
    ) -> ServeOutcome {
        while tasks.try_join_next().is_some() {}
        // A peer without open streams may close the connection without GOAWAY.
        let is_closed = error.is_io() && tasks.is_empty();
        self.status.set_error(self.status.convert_error(error));
        if is_closed {
            closed(is_draining)
        } else {
            ServeOutcome::Failed
        }
    }

    fn serve_request(
        &self,
        request: Request<RecvStream>,
        respond: SendResponse<Chunk>,
    ) -> impl Future<Output = ()> + use<S> {
        serve_request(
            Rc::clone(&self.service),
            Rc::clone(&self.peer),
            self.status.clone(),
            self.max_header_bytes,
            request,
            respond,
        )
    }

    /// Waits for the streams after the connection has ended. Streams that ended before it may still hold bytes that
    /// their applications have not read; all others fail with the connection.
    async fn finish(
        &self,
        outcome: ServeOutcome,
        connection: Box<Connection<ServerIo, Chunk>>,
        mut tasks: JoinSet<()>,
    ) -> ServeOutcome {
        if outcome == ServeOutcome::Aborted {
            self.status.set_error(Reason::Stopped.into());
        }
        drop(connection);
        let all = async { while tasks.join_next().await.is_some() {} };
        tokio::select! {
            biased;
            () = self.abort.cancelled() => {}
            () = all => return outcome,
        }
        tasks.shutdown().await;
        ServeOutcome::Aborted
    }
}

fn closed(is_draining: bool) -> ServeOutcome {
    if is_draining {
        ServeOutcome::Drained
    } else {
        ServeOutcome::ClosedByPeer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::ConnectRequest;
    use crate::server::{Accepted, Rejected};

    struct PendingService;

    impl TunnelService for PendingService {
        async fn connect(&self, _: &Peer, _: ConnectRequest) -> Result<Accepted, Rejected> {
            std::future::pending().await
        }
    }

    /// Each inbound tunnel costs at least this; its handshake and its connection are boxed.
    #[test]
    fn serve_future_is_at_most_1_kib() {
        fn size<'a, F: Future>(
            _: impl FnOnce(
                TcpStream,
                &'a ServerTls,
                Rc<PendingService>,
                &'a ServeConfig,
                CancellationToken,
                CancellationToken,
            ) -> F,
        ) -> usize {
            size_of::<F>()
        }
        let size = size(serve::<PendingService>);
        assert!(size <= 1024, "{size} bytes");
    }
}
