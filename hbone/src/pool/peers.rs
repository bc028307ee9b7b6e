//! Which tunnel a stream goes to: the tunnels of each peer, and the dial that is under way.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{PoolConfig, PoolKey};
use crate::engine::{Driver, Tunnel};
use crate::error::Error;

/// What became of a dial, for all who wait for it.
pub(super) type Promise = watch::Sender<Option<Result<(), Error>>>;

/// A dial that is under way, and the identities that it accepts.
pub(super) type Dialling = (watch::Receiver<Option<Result<(), Error>>>, Rc<[SpiffeId]>);

/// All peers of a pool.
#[derive(Default)]
pub(super) struct Peers(RefCell<HashMap<PoolKey, Peer>>);

#[derive(Default)]
struct Peer {
    tunnels: Vec<Rc<Tunnel>>,
    dialling: Option<Dialling>,
    /// After a dial has failed: nothing is dialled ahead of need before this.
    eager_after: Option<Instant>,
}

/// A peer that refuses a further tunnel is asked again after this time, as long as the tunnels that it has suffice.
const EAGER_PAUSE: Duration = Duration::from_secs(5);

/// Where the next stream goes.
pub(super) enum Choice {
    /// To this tunnel; `another` should be dialled ahead of need.
    Use { tunnel: Rc<Tunnel>, another: bool },
    /// To a tunnel that must be dialled first.
    Dial,
    /// Nowhere.
    Full,
}

/// The one dial to a peer.
pub(super) enum Joined {
    /// Somebody has started it.
    UnderWay(Dialling),
    /// To be started now.
    New(Dialling, Promise),
}

impl Peers {
    pub(super) fn choose(&self, key: &PoolKey, expect: &[SpiffeId], config: &PoolConfig) -> Choice {
        let peers = self.0.borrow();
        let Some(peer) = peers.get(key) else {
            return Choice::Dial;
        };
        let views: Vec<View> = peer
            .tunnels
            .iter()
            .map(|tunnel| View::of(tunnel, expect))
            .collect();
        let patient = peer.eager_after.is_some_and(|after| Instant::now() < after);
        match decide(&views, config) {
            Decision::Use { index, another } => match peer.tunnels.get(index) {
                Some(tunnel) => Choice::Use {
                    tunnel: Rc::clone(tunnel),
                    another: another && !patient,
                },
                None => Choice::Full,
            },
            Decision::Dial => Choice::Dial,
            Decision::Full => Choice::Full,
        }
    }

    pub(super) fn join_dial(&self, key: &PoolKey, expect: &[SpiffeId]) -> Joined {
        let mut peers = self.0.borrow_mut();
        let peer = peers.entry(key.clone()).or_default();
        if let Some(dialling) = &peer.dialling {
            return Joined::UnderWay(dialling.clone());
        }
        let (promise, outcome) = watch::channel(None);
        let dialling: Dialling = (outcome, expect.into());
        peer.dialling = Some(dialling.clone());
        Joined::New(dialling, promise)
    }

    /// Enters the tunnel that was dialled, and tells those who wait. A peer that was purged meanwhile gets none: its
    /// tunnel is closed unused, and those who wait look again.
    pub(super) fn settle(
        &self,
        key: &PoolKey,
        promise: Promise,
        dialled: Result<(Rc<Tunnel>, Driver), Error>,
    ) -> Option<(Rc<Tunnel>, Driver)> {
        let mut peers = self.0.borrow_mut();
        let ours = |dialling: &Dialling| dialling.0.same_channel(&promise.subscribe());
        let peer = peers
            .get_mut(key)
            .filter(|peer| peer.dialling.as_ref().is_some_and(ours));
        let (outcome, tunnel) = match dialled {
            Ok(dialled) => (Ok(()), Some(dialled)),
            Err(error) => (Err(error), None),
        };
        match (peer, &tunnel) {
            (Some(peer), Some((tunnel, _))) => {
                peer.dialling = None;
                peer.tunnels.push(Rc::clone(tunnel));
            }
            (Some(peer), None) => {
                peer.dialling = None;
                peer.eager_after = Some(Instant::now() + EAGER_PAUSE);
                if peer.tunnels.is_empty() {
                    peers.remove(key);
                }
            }
            (None, Some((tunnel, _))) => tunnel.retire(),
            (None, None) => {}
        }
        promise.send_replace(Some(outcome));
        tunnel
    }

    /// Forgets a tunnel that has closed.
    pub(super) fn remove(&self, key: &PoolKey, tunnel: &Rc<Tunnel>) {
        let mut peers = self.0.borrow_mut();
        let Some(peer) = peers.get_mut(key) else {
            return;
        };
        peer.tunnels.retain(|other| !Rc::ptr_eq(other, tunnel));
        if peer.tunnels.is_empty() && peer.dialling.is_none() {
            peers.remove(key);
        }
    }

    pub(super) fn purge(&self, gone: impl Fn(&PoolKey) -> bool) {
        self.0.borrow_mut().retain(|key, peer| {
            let gone = gone(key);
            if gone {
                peer.tunnels.iter().for_each(|tunnel| tunnel.retire());
            }
            !gone
        });
    }

    pub(super) fn tunnels(&self) -> usize {
        let peers = self.0.borrow();
        peers
            .values()
            .flat_map(|peer| &peer.tunnels)
            .filter(|tunnel| tunnel.usable())
            .count()
    }
}

/// What the choice depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    /// Takes streams, and has an identity that is expected.
    pub(super) usable: bool,
    /// Takes no streams from anybody.
    pub(super) retired: bool,
    pub(super) streams: usize,
    pub(super) limit: usize,
    pub(super) busy: bool,
}

impl View {
    fn of(tunnel: &Tunnel, expect: &[SpiffeId]) -> Self {
        Self {
            retired: !tunnel.usable(),
            usable: tunnel.usable() && expect.contains(tunnel.peer()),
            streams: tunnel.streams(),
            limit: tunnel.limit(),
            busy: tunnel.busy(),
        }
    }
}

/// The choice among tunnels, by index.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Use { index: usize, another: bool },
    Dial,
    Full,
}

/// The least loaded tunnel: idle before busy, few streams before many. If even that one is loaded, another is opened
/// beside it for those who come next; nobody waits for it.
pub(super) fn decide(tunnels: &[View], config: &PoolConfig) -> Decision {
    let open = tunnels
        .iter()
        .enumerate()
        .filter(|(_, t)| t.usable && t.streams < t.limit);
    let usable = tunnels.iter().filter(|t| t.usable).count();
    let retired = tunnels.iter().filter(|t| t.retired).count();
    match open.min_by_key(|(_, t)| (t.busy, t.streams)) {
        Some((index, best)) => {
            let loaded = best.busy || best.streams >= config.busy_streams;
            let another = loaded && usable < config.eager_tunnels_per_peer;
            Decision::Use { index, another }
        }
        None if usable < config.tunnels_per_peer && retired < config.retired_per_peer => {
            Decision::Dial
        }
        None => Decision::Full,
    }
}
