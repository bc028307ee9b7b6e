//! Which tunnel a stream uses: the tunnels of each peer, and the dial to it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::PoolConfig;
use crate::engine::{Driver, Tunnel};
use crate::error::Error;

/// What streams must have in common to share a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The identity of our certificate.
    pub source: SpiffeId,
    /// The uid of the peer's workload, so that another pod that reuses the address never gets an old tunnel.
    pub destination: Arc<str>,
    /// The peer's HBONE address.
    pub address: SocketAddr,
}

/// All peers of a pool.
#[derive(Default)]
pub(super) struct Peers(RefCell<HashMap<PoolKey, Peer>>);

#[derive(Default)]
struct Peer {
    tunnels: Vec<Rc<Tunnel>>,
    dial: Option<PendingDial>,
    /// No tunnel is dialled in advance before this time. Set when a dial fails.
    preconnect_after: Option<Instant>,
}

/// Where the result of a dial is published. None while it runs.
pub(super) type DialResult = watch::Sender<Option<Result<(), Error>>>;

/// A dial that is running.
#[derive(Clone)]
pub(super) struct PendingDial {
    pub(super) result: watch::Receiver<Option<Result<(), Error>>>,
    /// The identities that the dial accepts.
    pub(super) expected: Rc<[SpiffeId]>,
}

/// The only dial to a peer.
pub(super) enum DialEntry {
    /// It is running already.
    Existing(PendingDial),
    /// The caller has to start it.
    New(PendingDial, DialResult),
}

/// Where the next stream goes.
pub(super) enum Selection {
    /// To this tunnel; with `preconnect` another tunnel is to be dialled in advance.
    Use {
        tunnel: Rc<Tunnel>,
        preconnect: bool,
    },
    /// To a tunnel that must be dialled first.
    Dial,
    /// Nowhere: all tunnels are full.
    Full,
}

/// After a failed dial no tunnel is dialled in advance for this time, while existing tunnels have capacity.
const PRECONNECT_BACKOFF: Duration = Duration::from_secs(5);

impl Peers {
    /// Selects the tunnel of the next stream.
    pub(super) fn select(
        &self,
        key: &PoolKey,
        expected: &[SpiffeId],
        config: &PoolConfig,
    ) -> Selection {
        let peers = self.0.borrow();
        let Some(peer) = peers.get(key) else {
            return Selection::Dial;
        };
        let tunnels: Vec<TunnelView> = peer
            .tunnels
            .iter()
            .map(|tunnel| TunnelView::of(tunnel, expected))
            .collect();
        let is_backing_off = peer
            .preconnect_after
            .is_some_and(|after| Instant::now() < after);
        match choose(&tunnels, config) {
            Choice::Use { index, preconnect } => match peer.tunnels.get(index) {
                Some(tunnel) => Selection::Use {
                    tunnel: Rc::clone(tunnel),
                    preconnect: preconnect && !is_backing_off,
                },
                None => Selection::Full,
            },
            Choice::Dial => Selection::Dial,
            Choice::Full => Selection::Full,
        }
    }

    /// Returns the dial to a peer, or registers a new one.
    pub(super) fn join_dial(&self, key: &PoolKey, expected: &[SpiffeId]) -> DialEntry {
        let mut peers = self.0.borrow_mut();
        let peer = peers.entry(key.clone()).or_default();
        if let Some(pending) = &peer.dial {
            return DialEntry::Existing(pending.clone());
        }
        let (sender, receiver) = watch::channel(None);
        let pending = PendingDial {
            result: receiver,
            expected: expected.into(),
        };
        peer.dial = Some(pending.clone());
        DialEntry::New(pending, sender)
    }

    /// Adds the dialled tunnel and publishes the result.
    ///
    /// If the peer was retired during the dial, the tunnel is retired unused, and the waiting callers select again.
    pub(super) fn complete_dial(
        &self,
        key: &PoolKey,
        sender: DialResult,
        dialled: Result<(Rc<Tunnel>, Driver), Error>,
    ) -> Option<(Rc<Tunnel>, Driver)> {
        let mut peers = self.0.borrow_mut();
        let is_this_dial = |dial: &PendingDial| dial.result.same_channel(&sender.subscribe());
        let peer = peers
            .get_mut(key)
            .filter(|peer| peer.dial.as_ref().is_some_and(is_this_dial));
        let (result, tunnel) = match dialled {
            Ok(dialled) => (Ok(()), Some(dialled)),
            Err(error) => (Err(error), None),
        };
        match (peer, &tunnel) {
            (Some(peer), Some((tunnel, _))) => {
                peer.dial = None;
                peer.tunnels.push(Rc::clone(tunnel));
            }
            (Some(peer), None) => {
                peer.dial = None;
                peer.preconnect_after = Some(Instant::now() + PRECONNECT_BACKOFF);
                if peer.tunnels.is_empty() {
                    peers.remove(key);
                }
            }
            (None, Some((tunnel, _))) => tunnel.retire(),
            (None, None) => {}
        }
        sender.send_replace(Some(result));
        tunnel
    }

    /// Removes a tunnel that has closed.
    pub(super) fn remove(&self, key: &PoolKey, tunnel: &Rc<Tunnel>) {
        let mut peers = self.0.borrow_mut();
        let Some(peer) = peers.get_mut(key) else {
            return;
        };
        peer.tunnels.retain(|other| !Rc::ptr_eq(other, tunnel));
        if peer.tunnels.is_empty() && peer.dial.is_none() {
            peers.remove(key);
        }
    }

    /// Retires the tunnels of all peers that match, and removes the peers.
    pub(super) fn retire_if(&self, is_match: impl Fn(&PoolKey) -> bool) {
        self.0.borrow_mut().retain(|key, peer| {
            let is_match = is_match(key);
            if is_match {
                peer.tunnels.iter().for_each(|tunnel| tunnel.retire());
            }
            !is_match
        });
    }

    /// Number of tunnels that accept streams.
    pub(super) fn usable_tunnels(&self) -> usize {
        let peers = self.0.borrow();
        peers
            .values()
            .flat_map(|peer| &peer.tunnels)
            .filter(|tunnel| tunnel.is_usable())
            .count()
    }
}

/// The properties of a tunnel that the choice depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct TunnelView {
    /// Accepts streams, and its peer has an expected identity.
    pub(super) is_usable: bool,
    /// Accepts no more streams.
    pub(super) is_retired: bool,
    pub(super) streams: usize,
    pub(super) max_streams: usize,
    pub(super) is_busy: bool,
}

impl TunnelView {
    fn of(tunnel: &Tunnel, expected: &[SpiffeId]) -> Self {
        Self {
            is_retired: !tunnel.is_usable(),
            is_usable: tunnel.is_usable() && expected.contains(tunnel.peer()),
            streams: tunnel.streams(),
            max_streams: tunnel.max_streams(),
            is_busy: tunnel.is_busy(),
        }
    }
}

/// Like [`Selection`], by index.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    Use { index: usize, preconnect: bool },
    Dial,
    Full,
}

/// Chooses the least loaded tunnel: not busy before busy, then the fewest streams. If even that one is loaded, another
/// tunnel is dialled in advance for later streams; this stream does not wait for it.
pub(super) fn choose(tunnels: &[TunnelView], config: &PoolConfig) -> Choice {
    let open = tunnels
        .iter()
        .enumerate()
        .filter(|(_, t)| t.is_usable && t.streams < t.max_streams);
    let usable = tunnels.iter().filter(|t| t.is_usable).count();
    let retired = tunnels.iter().filter(|t| t.is_retired).count();
    match open.min_by_key(|(_, t)| (t.is_busy, t.streams)) {
        Some((index, best)) => {
            let is_loaded = best.is_busy || best.streams >= config.preconnect_streams;
            let preconnect = is_loaded && usable < config.max_preconnect_tunnels_per_peer;
            Choice::Use { index, preconnect }
        }
        None if usable < config.max_tunnels_per_peer
            && retired < config.max_retired_tunnels_per_peer =>
        {
            Choice::Dial
        }
        None => Choice::Full,
    }
}
