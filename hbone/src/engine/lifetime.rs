//! When a tunnel accepts no more streams, and when it closes.
//!
//! A retired tunnel accepts no more streams, and closes when its last stream ends. A failed tunnel closes at once and
//! resets its streams.
//!
//! Rules of a dialled tunnel. [`Driver::run`] applies all of them, except where another function is named:
//!
//! | condition | limit | effect |
//! |---|---|---|
//! | it has no streams | `PoolConfig::idle_timeout` | retired, so it closes |
//! | its age | `PoolConfig::max_age`, less jitter of up to 20 % | retired |
//! | a request has no response, and the peer is silent after a ping | `keepalive::SUSPECT_TIMEOUT` | retired |
//! | the peer sent GOAWAY, seen when a request fails | [`Tunnel::send_request`] | retired |
//! | its workload is gone, or the pool closes | `Pool::retire_destination`, `Pool::close` | retired |
//! | the peer is silent, also after a ping | `PoolConfig::ping_interval`, `PoolConfig::ping_timeout` | failed |
//! | a certificate of the peer is revoked | at once | failed |
//! | the pool is dropped, or its deadline to close has passed | at once | failed |
//! | the connection breaks | at once | failed |
//!
//! Rules of an accepted tunnel, applied by [`mod@super::serve`]: its age (`ServeConfig::max_age`, plus jitter of up to 10 %)
//! and `drain` send GOAWAY, which asks the peer to retire it; silence, revocation and `abort` fail it as above. It has no
//! idle timeout, because its client has one.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use h2::client::Connection;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::keepalive::{Action, Keepalive, Pinger};
use super::transport::ClientIo;
use super::tunnel::Tunnel;
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::tls::PeerCertSerials;

/// The connection of a dialled tunnel, and the time at which it is retired.
pub(crate) struct Driver {
    connection: Connection<ClientIo, Chunk>,
    pinger: Pinger,
    tunnel: Rc<Tunnel>,
    peer_serials: PeerCertSerials,
    retire_at: Instant,
}

impl Driver {
    pub(super) fn new(
        mut connection: Connection<ClientIo, Chunk>,
        tunnel: Rc<Tunnel>,
        peer_serials: PeerCertSerials,
    ) -> Self {
        let max_age = dialled_max_age(tunnel.config().max_age, fastrand::f64());
        Self {
            pinger: Pinger::new(connection.ping_pong()),
            connection,
            tunnel,
            peer_serials,
            retire_at: Instant::now() + max_age,
        }
    }

    /// Drives the tunnel until it has closed.
    pub(crate) async fn run(self, abort: CancellationToken) {
        let Self {
            mut connection,
            mut pinger,
            tunnel,
            peer_serials,
            retire_at,
        } = self;
        let (config, status) = (tunnel.config(), tunnel.status());
        let mut revoked = pin!(peer_serials.revoked());
        let mut keepalive = Keepalive::new(
            config.ping_interval,
            config.ping_timeout,
            status.last_received().clone(),
        );
        loop {
            let max_age_deadline = tunnel.is_usable().then_some(retire_at);
            let deadline = [max_age_deadline, tunnel.idle_deadline()]
                .into_iter()
                .flatten()
                .fold(keepalive.next_deadline(), Instant::min);
            tokio::select! {
                biased;
                () = abort.cancelled() => return status.set_error(Reason::Stopped.into()),
                closed = &mut connection => {
                    status.set_error(match closed {
                        Ok(()) => Reason::TunnelClosed.into(),
                        Err(e) => status.convert_error(e),
                    });
                    return tunnel.retire();
                }
                () = &mut revoked => {
                    status.set_error(Reason::PeerRevoked.into());
                    return tunnel.retire();
                }
                () = pinger.pong() => keepalive.on_pong(Instant::now()),
                () = tunnel.suspected() => {
                    if keepalive.suspect(Instant::now()) {
                        pinger.send_ping();
                    }
                }
                () = sleep_until(deadline) => {
                    let now = Instant::now();
                    // Checked again, because a stream may have been opened during the sleep.
                    let is_idle = tunnel.idle_deadline().is_some_and(|deadline| now >= deadline);
                    if now >= retire_at || is_idle {
                        tunnel.retire();
                    }
                    match keepalive.on_deadline(now) {
                        Action::SendPing => pinger.send_ping(),
                        Action::Avoid => tunnel.retire(),
                        Action::Fail => {
                            status.set_error(Reason::PingTimeout.into());
                            return tunnel.retire();
                        }
                        Action::None => {}
                    }
                }
            }
        }
    }
}

/// Up to 20 % less than the maximum, so that tunnels that were opened together do not expire together.
fn dialled_max_age(max: Duration, jitter: f64) -> Duration {
    max.mul_f64(1.0 - 0.2 * jitter)
}

/// Up to 10 % more than the configured time, so that a client with the same limit retires the tunnel before it receives
/// GOAWAY.
pub(super) fn accepted_max_age(min: Duration, jitter: f64) -> Duration {
    min.mul_f64(1.0 + 0.1 * jitter)
}
