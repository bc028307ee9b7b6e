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

mod rules;

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use mesh::Model;

pub use rules::Sets;

use crate::netns::{NetnsThread, ThreadEnded};
use crate::nftables;

/// Name of the node's table, which is ours alone.
pub const TABLE: &str = "ambit-guard";

/// The rules are compared on every verification that finds a new generation; the addresses too, if
/// they are no more than this. To list 100,000 of them takes the kernel and `nft` 0.4 s.
const FEW_ADDRESSES: usize = 2_000;
/// More addresses than those are compared on every this many verifications.
const FULL_LISTING: u32 = 16;

/// Why the guard does not stand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or `nft` refused.
    #[error("the node's guard rules could not be applied")]
    Rules(#[from] nftables::Error),
    /// The thread for slow work has ended.
    #[error(transparent)]
    Thread(#[from] ThreadEnded),
}

/// The guard of one node, as far as this process has put it in place.
#[derive(Debug)]
pub struct Guard {
    thread: NetnsThread,
    applied: Option<Applied>,
    verifications: u32,
}

#[derive(Clone, Debug)]
struct Applied {
    sets: Arc<Sets>,
    generation: u32,
    listing: String,
}

impl Guard {
    /// A guard that has not looked yet. `thread` must live in the node's namespace and is kept busy
    /// by nobody else, so that no pod's slow namespace delays the guard.
    pub fn new(thread: NetnsThread) -> Self {
        Self {
            thread,
            applied: None,
            verifications: 0,
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
        self.applied = Some(self.thread.run(move || replace(sets)).await??);
        Ok(())
    }

    /// Looks whether the guard stands, and puts it back if not. Says whether it had to.
    ///
    /// # Errors
    /// Fails if the kernel cannot be asked or the rules cannot be applied.
    pub async fn verify(&mut self) -> Result<bool, Error> {
        let Some(applied) = self.applied.clone() else {
            return Ok(false);
        };
        self.verifications = self.verifications.wrapping_add(1);
        let few = applied.sets.local.len() + applied.sets.meshed.len() <= FEW_ADDRESSES;
        let with_elements = few || self.verifications.is_multiple_of(FULL_LISTING);
        let sets = applied.sets.clone();
        match self
            .thread
            .run(move || stands(applied, with_elements))
            .await?
        {
            Ok(Some(applied)) => {
                self.applied = Some(applied);
                Ok(false)
            }
            Ok(None) => {
                self.replace(sets).await?;
                Ok(true)
            }
            Err(error) => Err(error.into()),
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

/// Makes the whole table anew, in one transaction.
fn replace(sets: Arc<Sets>) -> Result<Applied, nftables::Error> {
    nftables::apply(&sets.script())?;
    let generation = nftables::generation()?;
    let listing = nftables::list_rules(TABLE)?
        .ok_or_else(|| nftables::Error::Refused("the table vanished".into()))?;
    Ok(Applied {
        sets,
        generation,
        listing,
    })
}

/// Changes elements only; nothing if the table is not what it was, and has to be made anew.
fn change(before: &Applied, sets: Arc<Sets>) -> Option<Applied> {
    nftables::apply(&sets.changes(&before.sets)).ok()?;
    let generation = nftables::generation().ok()?;
    let listing = nftables::list_rules(TABLE).ok()??;
    // If somebody else changed something since, the next verification has to look at everything.
    let ours_alone = generation == before.generation.wrapping_add(1);
    let generation = if ours_alone {
        generation
    } else {
        before.generation
    };
    (listing == before.listing).then_some(Applied {
        sets,
        generation,
        listing,
    })
}

/// What was applied, brought up to date, or nothing if it no longer stands.
fn stands(applied: Applied, with_elements: bool) -> Result<Option<Applied>, nftables::Error> {
    let generation = nftables::generation()?;
    if generation == applied.generation {
        return Ok(Some(applied));
    }
    if nftables::list_rules(TABLE)?.as_deref() != Some(&applied.listing) {
        return Ok(None);
    }
    if with_elements {
        let listing = nftables::list(TABLE)?.unwrap_or_default();
        let words: HashSet<IpAddr> = listing
            .split([' ', ',', '\n', '\t'])
            .filter_map(|word| word.parse().ok())
            .collect();
        let whole = applied
            .sets
            .local
            .iter()
            .chain(&applied.sets.meshed)
            .all(|address| words.contains(address));
        return Ok(whole.then_some(Applied {
            generation,
            ..applied
        }));
    }
    // The generation stays the old one, so that the next verification looks again, up to the one
    // that lists everything.
    Ok(Some(applied))
}
