//! A tunnel that we have dialled, as the pool and its streams see it, and the task that drives it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::ops::Deref;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use h2::client::{Connection, SendRequest};
use h2::{Ping, PingPong};
use spiffe::SpiffeId;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::head;
use super::heart::{Beat, Heart};
use super::load::Load;
use super::stream::Stream;
use super::transport::{Cause, Link, Transport};
use crate::connect::ConnectRequest;
use crate::error::Error;
use crate::pool::PoolConfig;
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::tls::Shown;

pub(super) type Wire = Link<TlsStream<Transport>>;

/// What the handshake has shown of the peer.
pub(super) struct Proven {
    pub(super) peer: SpiffeId,
    pub(super) shown: Shown,
}

/// The connection itself, for [`drive`].
pub(crate) struct Driver {
    connection: Connection<Wire, Chunk>,
    ping: Option<PingPong>,
    tunnel: Rc<Tunnel>,
    shown: Shown,
    /// When it takes no more streams, so that the next ones follow a new handshake.
    old_at: Instant,
}

/// An open tunnel, as the pool and its streams see it.
pub(crate) struct Tunnel {
    peer: SpiffeId,
    config: Rc<PoolConfig>,
    cause: Cause,
    /// None once no new streams may be opened. h2 closes the connection when this and all streams are gone.
    send: RefCell<Option<SendRequest<Chunk>>>,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    load: Load,
    doubted: Notify,
}

/// A tunnel whose handshakes are done.
pub(super) fn open(
    proven: Proven,
    config: Rc<PoolConfig>,
    cause: Cause,
    send: SendRequest<Chunk>,
    mut connection: Connection<Wire, Chunk>,
) -> (Rc<Tunnel>, Driver) {
    let ping = connection.ping_pong();
    let Proven { peer, shown } = proven;
    let old_at = Instant::now() + age(config.max_age, fastrand::f64());
    let tunnel = Rc::new(Tunnel {
        peer,
        config,
        cause,
        send: RefCell::new(Some(send)),
        streams: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        load: Load::default(),
        doubted: Notify::new(),
    });
    let driver = Driver {
        connection,
        ping,
        tunnel: Rc::clone(&tunnel),
        shown,
        old_at,
    };
    (tunnel, driver)
}

/// Up to a fifth less than the most, so that tunnels that were opened together do not age together.
fn age(most: Duration, fortune: f64) -> Duration {
    most.mul_f64(1.0 - 0.2 * fortune)
}

impl Tunnel {
    /// Sends a CONNECT. Fails only if the tunnel takes no streams any more; it is not to be chosen again then.
    pub(crate) fn open(self: &Rc<Self>, connect: &ConnectRequest) -> Result<Stream, Error> {
        let request = head::request(connect)?;
        let Some(mut send) = self.send.borrow().clone() else {
            return Err(Reason::GoAway.into());
        };
        match send.send_request(request, false) {
            Ok((response, stream)) => {
                let deadline = Instant::now() + self.config.response_timeout;
                Ok(Stream::new(
                    stream,
                    response,
                    deadline,
                    TunnelLease::new(self),
                ))
            }
            Err(error) => {
                self.retire();
                let _why_it_takes_none = error;
                Err(Error::new(Reason::GoAway).at(self.address()))
            }
        }
    }

    /// Takes no more streams, and closes when those that are open have ended.
    pub(crate) fn retire(&self) {
        self.send.borrow_mut().take();
    }

    /// A CONNECT sent at `since` was not answered in time. If the peer has sent nothing at all since then, it is asked
    /// whether it still lives, and the tunnel takes no more streams unless it says so.
    pub(super) fn unanswered(&self, since: Instant) {
        if self.cause.pulse().last() <= since {
            self.doubted.notify_one();
        }
    }

    /// When it closes for want of streams, if none comes before.
    fn idle_at(&self) -> Option<Instant> {
        let idle = self.streams() == 0 && self.usable();
        idle.then(|| self.idle_since.get() + self.config.idle_timeout)
    }

    /// Whether new streams may be opened.
    pub(crate) fn usable(&self) -> bool {
        self.send.borrow().is_some()
    }

    /// Streams that are open.
    pub(crate) fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Streams that may be open at once: ours and the peer's limit.
    pub(crate) fn limit(&self) -> usize {
        let peers = self
            .send
            .borrow()
            .as_ref()
            .map_or(0, SendRequest::current_max_send_streams);
        peers.min(self.config.streams_per_tunnel)
    }

    /// Whether it moves so many bytes that another stream had better have its own.
    pub(crate) fn busy(&self) -> bool {
        self.load.busy(Instant::now())
    }

    pub(crate) fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.cause.peer()
    }

    pub(super) fn cause(&self) -> &Cause {
        &self.cause
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }
}

/// Counts one stream on its tunnel while it lives.
pub(super) struct TunnelLease(Rc<Tunnel>);

impl TunnelLease {
    fn new(tunnel: &Rc<Tunnel>) -> Self {
        tunnel.streams.set(tunnel.streams.get() + 1);
        Self(Rc::clone(tunnel))
    }
}

impl Deref for TunnelLease {
    type Target = Tunnel;

    fn deref(&self) -> &Tunnel {
        &self.0
    }
}

impl Drop for TunnelLease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        if self.0.streams.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Drives a tunnel until it has closed: by the peer, by [`Tunnel::retire`] and the end of its streams, because it was
/// idle, old or dead, because the peer's certificate was revoked, or at once by `abort`.
pub(crate) async fn drive(driver: Driver, abort: CancellationToken) {
    let Driver {
        mut connection,
        mut ping,
        tunnel,
        shown,
        old_at,
    } = driver;
    let Tunnel { config, cause, .. } = &*tunnel;
    let mut revoked = pin!(shown.revoked());
    let mut heart = Heart::new(
        config.ping_interval,
        config.ping_timeout,
        cause.pulse().clone(),
    );
    loop {
        let old = tunnel.usable().then_some(old_at);
        let due = [old, tunnel.idle_at()]
            .into_iter()
            .flatten()
            .fold(heart.due(), Instant::min);
        tokio::select! {
            biased;
            () = abort.cancelled() => return cause.set(Reason::Stopped.into()),
            ended = &mut connection => {
                cause.set(match ended {
                    Ok(()) => Reason::TunnelClosed.into(),
                    Err(e) => cause.explain(e),
                });
                return tunnel.retire();
            }
            () = &mut revoked => {
                cause.set(Reason::PeerRevoked.into());
                return tunnel.retire();
            }
            () = pong(&mut ping) => heart.pong(Instant::now()),
            () = tunnel.doubted.notified() => {
                if heart.doubt(Instant::now()) {
                    send_ping(&mut ping);
                }
            }
            () = sleep_until(due) => {
                let now = Instant::now();
                // Asked again: a stream may have come while this slept.
                let idle = tunnel.idle_at().is_some_and(|idle_at| now >= idle_at);
                if now >= old_at || idle {
                    tunnel.retire();
                }
                match heart.beat(now) {
                    Beat::Ping => send_ping(&mut ping),
                    Beat::Unproven => tunnel.retire(),
                    Beat::Dead => {
                        cause.set(Reason::PingTimeout.into());
                        return tunnel.retire();
                    }
                    Beat::Nothing => {}
                }
            }
        }
    }
}

/// Resolves when a ping was answered.
pub(super) async fn pong(ping: &mut Option<PingPong>) {
    match ping {
        // An error means that the connection has ended, which it says itself.
        Some(ping) => {
            poll_fn(|cx| match ping.poll_pong(cx) {
                Poll::Ready(Ok(_)) => Poll::Ready(()),
                Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
            })
            .await;
        }
        None => std::future::pending().await,
    }
}

pub(super) fn send_ping(ping: &mut Option<PingPong>) {
    if let Some(ping) = ping {
        // Fails if the connection has ended, which it says itself.
        let _ended = ping.send_ping(Ping::opaque());
    }
}
