//! The tunnels of one pod on one thread.

mod config;
mod peers;

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use spiffe::SpiffeId;
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::connect::ConnectRequest;
use crate::engine::{Dial, Stream, drive};
use crate::error::Error;
use crate::reason::Reason;
use crate::tls::ClientTls;

pub use config::PoolConfig;
use peers::{Choice, Dialling, Joined, Peers};

/// Where a pool's sockets come from: the caller knows the network namespace and the marks.
pub trait SocketFactory {
    /// An unconnected socket of the family of `to`.
    fn new_tcp(&self, to: SocketAddr) -> io::Result<TcpSocket>;
}

/// What streams must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The identity that we present.
    pub source: SpiffeId,
    /// The uid of the workload on the other side: an address that comes back as another pod never meets an old tunnel.
    pub destination: Arc<str>,
    /// The peer's HBONE address.
    pub address: SocketAddr,
}

/// The tunnels of one pod on one thread, by [`PoolKey`]. Lives in a `LocalSet`; dropped, it aborts its tunnels.
pub struct Pool {
    config: Rc<PoolConfig>,
    sockets: Rc<dyn SocketFactory>,
    peers: Rc<Peers>,
    tasks: RefCell<JoinSet<()>>,
    draining: Cell<bool>,
    abort: CancellationToken,
}

impl Pool {
    /// An empty pool. Nothing runs until the first [`Pool::open`].
    pub fn new(config: PoolConfig, sockets: Rc<dyn SocketFactory>) -> Self {
        Self {
            config: Rc::new(config),
            sockets,
            peers: Rc::default(),
            tasks: RefCell::default(),
            draining: Cell::new(false),
            abort: CancellationToken::new(),
        }
    }

    /// Sends a CONNECT on a tunnel to the peer: one that exists, or a new one, which is dialled once for all who wait
    /// for it and whose failure they share. `expect` holds the identities that the peer may have.
    pub async fn open(
        &self,
        key: &PoolKey,
        expect: &[SpiffeId],
        tls: &ClientTls,
        request: ConnectRequest,
    ) -> Result<Stream, Error> {
        if tls.identity() != &key.source {
            let detail = "the certificate is not for the pool key's source";
            return Err(Error::from(Reason::Internal).because(detail));
        }
        // Each round without success has opened a tunnel that others filled first, or retired one, so that the peer's
        // limit on tunnels bounds the rounds as well.
        for _ in 0..self.config.tunnels_per_peer.saturating_mul(2) {
            if self.draining.get() {
                return Err(Reason::Draining.into());
            }
            match self.peers.choose(key, expect, &self.config) {
                Choice::Use { tunnel, another } => {
                    if another {
                        self.dial(key, expect, tls);
                    }
                    match tunnel.open(&request) {
                        Err(e) if e.reason() == Reason::GoAway => {}
                        opened => return opened,
                    }
                }
                Choice::Dial => self.dialled(key, expect, tls).await?,
                Choice::Full => break,
            }
        }
        Err(Error::from(Reason::TooManyStreams).at(key.address))
    }

    /// The workload is gone: its tunnels are no longer chosen. Streams that are open live on as long as the peer does.
    pub fn retire_destination(&self, destination: &str) {
        self.peers.purge(|key| &*key.destination == destination);
    }

    /// Tunnels that may be chosen.
    pub fn usable_tunnels(&self) -> usize {
        self.peers.tunnels()
    }

    /// Takes no more streams, waits for those that are open until `deadline`, then resets the rest. All tasks of the
    /// pool have ended when this returns.
    pub async fn close(&self, deadline: Instant) {
        self.draining.set(true);
        self.peers.purge(|_| true);
        let mut tasks = self.tasks.take();
        let all = async { while tasks.join_next().await.is_some() {} };
        if timeout_at(deadline, all).await.is_err() {
            self.abort.cancel();
            while tasks.join_next().await.is_some() {}
        }
    }

    /// Waits for a dial: the one that is under way, or a new one.
    async fn dialled(
        &self,
        key: &PoolKey,
        expect: &[SpiffeId],
        tls: &ClientTls,
    ) -> Result<(), Error> {
        let (mut outcome, expected) = self.dial(key, expect, tls);
        let failure = match outcome.wait_for(Option::is_some).await {
            Ok(done) => done.as_ref().and_then(|done| done.as_ref().err().cloned()),
            // The dial was dropped unfinished: the pool is closing.
            Err(_) => Some(Reason::Draining.into()),
        };
        match failure {
            // Somebody else's expectation was wrong, and that says nothing about ours.
            Some(e) if e.reason() == Reason::PeerIdentityMismatch && *expected != *expect => Ok(()),
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    /// Joins the dial to this peer, or starts it. It runs to its end even if nobody waits any more: the next one may.
    fn dial(&self, key: &PoolKey, expect: &[SpiffeId], tls: &ClientTls) -> Dialling {
        let (dialling, promise) = match self.peers.join_dial(key, expect) {
            Joined::UnderWay(dialling) => return dialling,
            Joined::New(dialling, promise) => (dialling, promise),
        };
        let dial = Dial {
            config: Rc::clone(&self.config),
            sockets: Rc::clone(&self.sockets),
            address: key.address,
            expect: expect.to_vec(),
            tls: tls.clone(),
        };
        let (peers, abort, key) = (Rc::clone(&self.peers), self.abort.clone(), key.clone());
        let mut tasks = self.tasks.borrow_mut();
        // Those that have ended are let go here, so that their number is bounded by that of live tunnels and dials.
        while tasks.try_join_next().is_some() {}
        tasks.spawn_local(async move {
            // Boxed, so that the long life of a tunnel does not carry the size of its handshake.
            let dialled = tokio::select! {
                biased;
                () = abort.cancelled() => Err(Reason::Draining.into()),
                dialled = Box::pin(dial.run()) => dialled,
            };
            if let Some((tunnel, driver)) = peers.settle(&key, promise, dialled) {
                drive(driver, abort).await;
                peers.remove(&key, &tunnel);
            }
        });
        dialling
    }
}

#[cfg(test)]
mod tests;
