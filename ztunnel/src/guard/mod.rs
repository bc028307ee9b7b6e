//! The second line: rules in the node's namespace that drop what capture should have caught.
//!
//! Capture lives in the pod's own namespace, where a privileged container can flush it, and where
//! nothing stands yet while the pod is new. The guard stands where the pod's packets leave it: TCP
//! from an opted-in pod of this node to any pod of the mesh, outside of HBONE and of connections
//! that were there before, is dropped and counted. It is put in place before the first pod is
//! enrolled and stays when the daemon ends, however it ends.
//!
//! It sees what the node forwards. A CNI that switches packets between the pods of one node on a
//! bridge must hand them to netfilter (`br_netfilter`), as Kubernetes asks of it anyway.

mod listing;
mod rules;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh::Model;
use tokio::time::Instant;

pub use rules::Sets;

use crate::netns::{JobFailed, NetnsThreads};
use crate::nftables;
use listing::Listing;

/// Name of the node's table, which is ours alone.
pub const TABLE: &str = "ambit-guard";

/// The share of the time that may be spent on looking at the whole table, which is done only when
/// something in the node's rules has changed: to list 100,000 addresses takes `nft` 0.4 s, and there are
/// nodes on which somebody changes rules all the time.
const LOOKING: u32 = 50;

/// How often what it dropped is counted: shorter than scrapes are apart. It costs 3 ms.
const COUNT: Duration = Duration::from_secs(10);

/// Why the guard does not stand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or `nft` refused.
    #[error("the node's guard rules could not be applied")]
    Rules(#[from] nftables::Error),
    /// The thread for slow work has ended.
    #[error(transparent)]
    Thread(#[from] JobFailed),
}

/// The guard of one node, as far as this process has put it in place.
#[derive(Debug)]
pub struct Guard {
    thread: NetnsThreads,
    applied: Option<Applied>,
    /// The rules as the kernel lists them, once known.
    rules: Option<Arc<str>>,
    next_look: Option<Instant>,
    next_count: Option<Instant>,
    /// What the counter said last.
    counted: u64,
}

#[derive(Clone, Debug)]
struct Applied {
    sets: Arc<Sets>,
    generation: u32,
    rules: Arc<str>,
}

impl Guard {
    /// A guard that has not looked yet. `thread` must live in the node's namespace and is kept busy
    /// by nobody else, so that no pod's slow namespace delays the guard.
    pub fn new(thread: NetnsThreads) -> Self {
        Self {
            thread,
            applied: None,
            rules: None,
            next_look: None,
            next_count: None,
            counted: 0,
        }
    }

    /// Makes the guard know `sets`. Whatever an earlier process left is replaced without a gap.
    ///
    /// # Errors
    /// Fails if the rules cannot be applied; those of before stand then.
    pub async fn apply(&mut self, sets: Sets) -> Result<(), Error> {
        let sets = Arc::new(sets);
        if let Some(before) = self.applied.take() {
            if before.sets == sets {
                self.applied = Some(before);
                return Ok(());
            }
            let whole = sets.clone();
            let change = move || change(&before, whole);
            self.applied = self.thread.run(change).await?;
        }
        match self.applied {
            Some(_) => Ok(()),
            None => self.replace(sets).await,
        }
    }

    async fn replace(&mut self, sets: Arc<Sets>) -> Result<(), Error> {
        self.applied = None;
        let rules = self.rules.clone();
        let applied = self.thread.run(move || replace(sets, rules)).await??;
        self.rules = Some(applied.rules.clone());
        self.applied = Some(applied);
        Ok(())
    }

    /// How many packets it has dropped since this was last asked; asked more often than every
    /// [`COUNT`], it says none. What was dropped just before the table was made anew is lost.
    ///
    /// # Errors
    /// Fails if `nft` does.
    pub async fn dropped(&mut self) -> Result<u64, Error> {
        let now = Instant::now();
        if self.next_count.is_some_and(|at| at > now) {
            return Ok(0);
        }
        self.next_count = Some(now + COUNT);
        let count = || nftables::packets(TABLE, rules::COUNTER);
        let packets = self.thread.run(count).await??.unwrap_or_default();
        let before = std::mem::replace(&mut self.counted, packets);
        // The counter begins at zero in a table that was made anew.
        Ok(packets.checked_sub(before).unwrap_or(packets))
    }

    /// Looks whether the guard stands, and puts it back if not. Says whether it had to.
    ///
    /// # Errors
    /// Fails if the kernel cannot be asked or the rules cannot be applied.
    pub async fn verify(&mut self) -> Result<bool, Error> {
        let Some(applied) = self.applied.clone() else {
            return Ok(false);
        };
        let may_look = self.next_look.is_none_or(|at| at <= Instant::now());
        let sets = applied.sets.clone();
        let look = move || {
            let began = Instant::now();
            (verify(&applied, may_look), began.elapsed())
        };
        let (found, took) = self.thread.run(look).await?;
        match found? {
            Found::Unchanged => Ok(false),
            Found::Stands { generation } => {
                self.next_look = Some(Instant::now() + took * LOOKING);
                self.applied
                    .iter_mut()
                    .for_each(|applied| applied.generation = generation);
                Ok(false)
            }
            Found::Broken => {
                self.replace(sets).await?;
                Ok(true)
            }
        }
    }
}

/// What the guard must know of a model: the addresses of pods of the mesh, here and everywhere.
pub fn sets(model: &Model, node: &str) -> Sets {
    let mut sets = Sets::default();
    for workload in model.workloads().filter(|workload| workload.is_meshed()) {
        let addresses = workload.ips.iter().map(IpAddr::to_canonical);
        if &*workload.node == node {
            sets.local.extend(addresses.clone());
        }
        sets.meshed.extend(addresses);
    }
    sets
}

/// Makes the whole table anew, in one transaction. `rules` is how the kernel lists them, which is
/// never learnt from the node's own listing: what somebody changed a moment after us would pass for
/// ours from then on, and on a busy node there may be no moment without changes.
fn replace(sets: Arc<Sets>, rules: Option<Arc<str>>) -> Result<Applied, nftables::Error> {
    let rules = match rules {
        Some(rules) => rules,
        None => {
            let listing = nftables::listing_of(&Sets::default().script(), TABLE)?;
            Listing::parse(&listing).rules.into()
        }
    };
    let before = nftables::generation()?;
    nftables::apply(&sets.script())?;
    let generation = nftables::generation()?;
    // If somebody else changed something meanwhile, the next verification has to look.
    let generation = if generation == before.wrapping_add(1) {
        generation
    } else {
        before
    };
    Ok(Applied {
        sets,
        generation,
        rules,
    })
}

/// Changes elements only; nothing if the table is not what it was, and has to be made anew.
fn change(before: &Applied, sets: Arc<Sets>) -> Option<Applied> {
    nftables::apply(&sets.changes(&before.sets)).ok()?;
    // If somebody else changed something since, the next verification has to look at everything.
    let ours = before.generation.wrapping_add(1);
    let generation = if nftables::generation().ok()? == ours {
        ours
    } else {
        before.generation
    };
    Some(Applied {
        sets,
        generation,
        rules: before.rules.clone(),
    })
}

/// What a verification found.
enum Found {
    /// Nothing has changed, or it is too early to look at what has.
    Unchanged,
    /// Something has changed, and it was not the guard.
    Stands { generation: u32 },
    /// The guard is not what was applied.
    Broken,
}

fn verify(applied: &Applied, may_look: bool) -> Result<Found, nftables::Error> {
    let generation = nftables::generation()?;
    if generation == applied.generation || !may_look {
        return Ok(Found::Unchanged);
    }
    let listing = match nftables::list(TABLE) {
        Ok(Some(listing)) => listing,
        Ok(None) => return Ok(Found::Broken),
        Err(error) if error.is_of_size() => return Ok(Found::Broken),
        Err(error) => return Err(error),
    };
    let listing = Listing::parse(&listing);
    let stands = *listing.rules == *applied.rules && listing.elements == applied.sets.by_name();
    Ok(if stands {
        Found::Stands { generation }
    } else {
        Found::Broken
    })
}
