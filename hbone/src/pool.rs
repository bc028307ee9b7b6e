//! The tunnels of one pod on one thread: how streams are opened, and how tunnels are dialled and closed.

mod choose_tunnel;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use spiffe::SpiffeId;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::config::PoolConfig;
use crate::connect::ConnectRequest;
use crate::engine::{Dial, SocketFactory, Stream};
use crate::error::Error;
use crate::reason::Reason;
use crate::tls::ClientTls;
pub use choose_tunnel::PoolKey;
use choose_tunnel::{DialEntry, Peers, PendingDial, Selection};

/// The tunnels of one pod on one thread, by [`PoolKey`]. Runs in a `LocalSet`; dropping it aborts its tunnels.
pub struct Pool {
    config: Rc<PoolConfig>,
    sockets: Rc<dyn SocketFactory>,
    peers: Rc<Peers>,
    tasks: RefCell<JoinSet<()>>,
    is_closing: Cell<bool>,
    abort: CancellationToken,
}

impl Pool {
    /// An empty pool. No task runs before the first [`Pool::open`].
    pub fn new(config: PoolConfig, sockets: Rc<dyn SocketFactory>) -> Self {
        Self {
            config: Rc::new(config),
            sockets,
            peers: Rc::default(),
            tasks: RefCell::default(),
            is_closing: Cell::new(false),
            abort: CancellationToken::new(),
        }
    }

    /// Sends a CONNECT on an existing tunnel to the peer, or on a new one. Concurrent calls share one dial and its
    /// failure. `expected` contains the identities that the peer may have.
    pub async fn open(
        &self,
        key: &PoolKey,
        expected: &[SpiffeId],
        tls: &ClientTls,
        request: ConnectRequest,
    ) -> Result<Stream, Error> {
        if tls.identity() != &key.source {
            let detail = "the certificate does not have the pool key's source identity";
            return Err(Error::from(Reason::Internal).with_detail(detail));
        }
        // Each iteration without success has dialled a tunnel that other callers filled first, or retired one. So the
        // limit on tunnels per peer also bounds the iterations.
        for _ in 0..self.config.max_tunnels_per_peer.saturating_mul(2) {
            if self.is_closing.get() {
                return Err(Reason::Draining.into());
            }
            match self.peers.select(key, expected, &self.config) {
                Selection::Use { tunnel, preconnect } => {
                    if preconnect {
                        self.dial(key, expected, tls);
                    }
                    match Stream::open(&tunnel, &request) {
                        Err(e) if e.reason() == Reason::GoAway => {}
                        opened => return opened,
                    }
                }
                Selection::Dial => self.wait_for_dial(key, expected, tls).await?,
                Selection::Full => break,
            }
        }
        Err(Error::from(Reason::TooManyStreams).with_peer(key.address))
    }

    /// Retires the tunnels to a workload that is gone. Open streams continue as long as the peer does.
    pub fn retire_destination(&self, destination: &str) {
        self.peers.retire_if(|key| &*key.destination == destination);
    }

    /// Number of tunnels that accept streams.
    pub fn usable_tunnels(&self) -> usize {
        self.peers.usable_tunnels()
    }

    /// Accepts no more streams, waits for open streams until `deadline`, and then resets them. All tasks of the pool
    /// have ended when this returns.
    pub async fn close(&self, deadline: Instant) {
        self.is_closing.set(true);
        self.peers.retire_if(|_| true);
        let mut tasks = self.tasks.take();
        let all = async { while tasks.join_next().await.is_some() {} };
        if timeout_at(deadline, all).await.is_err() {
            self.abort.cancel();
            while tasks.join_next().await.is_some() {}
        }
    }

    /// Joins or starts the dial to this peer, and waits for it.
    async fn wait_for_dial(
        &self,
        key: &PoolKey,
        expected: &[SpiffeId],
        tls: &ClientTls,
    ) -> Result<(), Error> {
        let mut dial = self.dial(key, expected, tls);
        let failure = match dial.result.wait_for(Option::is_some).await {
            Ok(result) => result
                .as_ref()
                .and_then(|result| result.as_ref().err().cloned()),
            // The dial was dropped before it was done: the pool is closing.
            Err(_) => Some(Reason::Draining.into()),
        };
        match failure {
            // The dial was started with other expected identities, so its mismatch does not apply to this caller.
            Some(e)
                if e.reason() == Reason::PeerIdentityMismatch && *dial.expected != *expected =>
            {
                Ok(())
            }
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    /// Joins or starts the dial to this peer. The dial continues even if no caller waits any more, for the next one.
    fn dial(&self, key: &PoolKey, expected: &[SpiffeId], tls: &ClientTls) -> PendingDial {
        let (pending, result) = match self.peers.join_dial(key, expected) {
            DialEntry::Existing(pending) => return pending,
            DialEntry::New(pending, result) => (pending, result),
        };
        let dial = Dial {
            config: Rc::clone(&self.config),
            sockets: Rc::clone(&self.sockets),
            address: key.address,
            expected: expected.to_vec(),
            tls: tls.clone(),
        };
        let (peers, abort, key) = (Rc::clone(&self.peers), self.abort.clone(), key.clone());
        let mut tasks = self.tasks.borrow_mut();
        // Finished tasks are removed here, so the set never exceeds the live tunnels and dials.
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(async move {
            // Boxed, so that the memory of the handshake is freed when it is done.
            let dialled = tokio::select! {
                biased;
                () = abort.cancelled() => Err(Reason::Draining.into()),
                dialled = Box::pin(dial.run()) => dialled,
            };
            if let Some((tunnel, driver)) = peers.complete_dial(&key, result, dialled) {
                driver.run(abort).await;
                peers.remove(&key, &tunnel);
            }
        });
        pending
    }
}

#[cfg(test)]
mod tests;
