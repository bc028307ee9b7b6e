//! What the pool, the driver and the streams of a dialled tunnel share: its state, stream count and load.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::ops::Deref;
use std::rc::Rc;
use std::time::Duration;

use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use http::Request;
use spiffe::SpiffeId;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::failure::TunnelStatus;
use crate::config::PoolConfig;
use crate::error::Error;
use crate::reason::Reason;
use crate::relay::Chunk;

/// A dialled tunnel. [`super::lifetime`] defines when it is retired and when it closes.
pub(crate) struct Tunnel {
    peer: SpiffeId,
    config: Rc<PoolConfig>,
    status: TunnelStatus,
    /// None once the tunnel is retired. h2 closes the connection when this and all streams are dropped.
    send: RefCell<Option<SendRequest<Chunk>>>,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    load: Load,
    suspected: Notify,
}

impl Tunnel {
    /// A tunnel whose handshakes are done.
    pub(super) fn new(
        peer: SpiffeId,
        config: Rc<PoolConfig>,
        status: TunnelStatus,
        send: SendRequest<Chunk>,
    ) -> Rc<Self> {
        Rc::new(Self {
            peer,
            config,
            status,
            send: RefCell::new(Some(send)),
            streams: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            load: Load::default(),
            suspected: Notify::new(),
        })
    }

    /// Sends a request on a new stream. Fails with [`Reason::GoAway`] if the tunnel accepts no more streams.
    pub(super) fn send_request(
        self: &Rc<Self>,
        request: Request<()>,
    ) -> Result<(ResponseFuture, SendStream<Chunk>, StreamLease), Error> {
        let Some(mut send) = self.send.borrow().clone() else {
            return Err(Reason::GoAway.into());
        };
        match send.send_request(request, false) {
            Ok((response, stream)) => Ok((response, stream, StreamLease::new(self))),
            // The error is that of a connection which is closing, or has used up its stream ids.
            Err(_) => {
                self.retire();
                Err(Error::new(Reason::GoAway).with_peer(self.address()))
            }
        }
    }

    /// Stops accepting streams. The tunnel closes when its open streams have ended.
    pub(crate) fn retire(&self) {
        self.send.borrow_mut().take();
    }

    /// Reports that a request sent at `sent_at` got no response in time. If the peer has sent nothing at all since then,
    /// it is pinged, and the tunnel is retired unless it answers.
    pub(super) fn suspect_if_silent_since(&self, sent_at: Instant) {
        if self.status.last_received().at() <= sent_at {
            self.suspected.notify_one();
        }
    }

    /// Resolves when the peer is suspected to be dead.
    pub(super) async fn suspected(&self) {
        self.suspected.notified().await;
    }

    /// When the tunnel is retired for lack of streams, if none is opened before. None while streams are open.
    pub(super) fn idle_deadline(&self) -> Option<Instant> {
        let is_idle = self.streams() == 0 && self.is_usable();
        is_idle.then(|| self.idle_since.get() + self.config.idle_timeout)
    }

    /// Whether it accepts new streams.
    pub(crate) fn is_usable(&self) -> bool {
        self.send.borrow().is_some()
    }

    /// Open streams.
    pub(crate) fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Streams that may be open at once: the lower of our limit and the peer's.
    pub(crate) fn max_streams(&self) -> usize {
        let peer_limit = self
            .send
            .borrow()
            .as_ref()
            .map_or(0, SendRequest::current_max_send_streams);
        peer_limit.min(self.config.max_streams_per_tunnel)
    }

    /// Whether it moves so many bytes that a new stream should use another tunnel.
    pub(crate) fn is_busy(&self) -> bool {
        self.load.is_busy(Instant::now())
    }

    /// The verified identity of the peer.
    pub(crate) fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.status.peer()
    }

    pub(super) fn config(&self) -> &PoolConfig {
        &self.config
    }

    pub(super) fn status(&self) -> &TunnelStatus {
        &self.status
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }
}

/// Counts one stream on its tunnel until it is dropped.
pub(super) struct StreamLease(Rc<Tunnel>);

impl StreamLease {
    fn new(tunnel: &Rc<Tunnel>) -> Self {
        tunnel.streams.set(tunnel.streams.get() + 1);
        Self(Rc::clone(tunnel))
    }
}

impl Deref for StreamLease {
    type Target = Tunnel;

    fn deref(&self) -> &Tunnel {
        &self.0
    }
}

impl Drop for StreamLease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        if self.0.streams.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Bytes that a tunnel has moved recently, in windows of [`LOAD_WINDOW`].
#[derive(Default)]
pub(super) struct Load {
    window_start: Cell<Option<Instant>>,
    current_bytes: Cell<usize>,
    previous_bytes: Cell<usize>,
}

const LOAD_WINDOW: Duration = Duration::from_millis(100);

/// 160 Mbit/s. One core drives a tunnel at about 3 Gbit/s, so this is 5 % of it.
const BUSY_BYTES_PER_WINDOW: usize = 2 * 1024 * 1024;

impl Load {
    pub(super) fn add(&self, bytes: usize) {
        self.rotate(Instant::now());
        self.current_bytes.set(self.current_bytes.get() + bytes);
    }

    fn is_busy(&self, now: Instant) -> bool {
        self.rotate(now);
        self.current_bytes.get().max(self.previous_bytes.get()) >= BUSY_BYTES_PER_WINDOW
    }

    fn rotate(&self, now: Instant) {
        let age = now - self.window_start.get().unwrap_or(now);
        if self.window_start.get().is_none() || age >= LOAD_WINDOW {
            let previous = if age < LOAD_WINDOW * 2 {
                self.current_bytes.get()
            } else {
                0
            };
            self.previous_bytes.set(previous);
            self.current_bytes.set(0);
            self.window_start.set(Some(now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnel_is_busy_until_the_end_of_the_next_window() {
        let (load, start) = (Load::default(), Instant::now());
        assert!(!load.is_busy(start));
        load.current_bytes.set(BUSY_BYTES_PER_WINDOW);
        assert!(load.is_busy(start));
        assert!(load.is_busy(start + LOAD_WINDOW));
        assert!(!load.is_busy(start + LOAD_WINDOW * 2));
        load.current_bytes.set(BUSY_BYTES_PER_WINDOW);
        assert!(!load.is_busy(start + LOAD_WINDOW * 20));
    }
}
