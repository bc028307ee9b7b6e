//! Rules in the node's namespace that drop plaintext between meshed pods which capture has missed.
//!
//! Capture is in the pod's own namespace, where a privileged container can flush it and where no
//! rules exist yet while the pod is new. The guard is on the node's forward path. It drops and
//! counts TCP from a meshed pod of this node to any meshed pod, except HBONE and connections that
//! were established before. It is applied before the first pod is enrolled, and remains after the
//! daemon exits or is killed.
//!
//! The guard sees packets that the node forwards. A CNI that switches packets between pods of one
//! node on a bridge must pass them to netfilter (`br_netfilter`), which Kubernetes requires as
//! well.

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

/// Name of the table in the node's namespace. Only the daemon uses it.
pub const TABLE: &str = "ambit-guard";

/// Limits the time spent on listing the whole table to one part in this many. The table is listed
/// only after the node's ruleset has changed, but on some nodes it changes all the time, and
/// listing 100,000 addresses takes `nft` 0.4 s.
const LISTING_TIME_SHARE: u32 = 50;

/// How often the counter of dropped packets is read, which takes 3 ms: more often than usual scrape
/// intervals.
const COUNT_INTERVAL: Duration = Duration::from_secs(10);

/// Why the guard could not be applied or verified.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel or `nft` refused the rules.
    #[error("the node's guard rules could not be applied")]
    Rules(#[from] nftables::Error),
    /// The guard's thread did not complete a job.
    #[error(transparent)]
    Thread(#[from] JobFailed),
}

/// The guard of one node, as applied by this process.
#[derive(Debug)]
pub struct Guard {
    thread: NetnsThreads,
    applied: Option<Applied>,
    /// The kernel's listing of the rules without elements, once known.
    rules: Option<Arc<str>>,
    next_listing: Option<Instant>,
    next_count: Option<Instant>,
    /// The last value of the counter.
    last_count: u64,
}

#[derive(Clone, Debug)]
struct Applied {
    sets: Arc<Sets>,
    generation: u32,
    rules: Arc<str>,
}

impl Guard {
    /// A guard that has not been applied. `thread` must be in the node's namespace and must run
    /// nothing else, so that slow work in a pod's namespace does not delay the guard.
    pub fn new(thread: NetnsThreads) -> Self {
        Self {
            thread,
            applied: None,
            rules: None,
            next_listing: None,
            next_count: None,
            last_count: 0,
        }
    }

    /// Applies `sets`. The table of an earlier process is replaced without a gap.
    ///
    /// # Errors
    /// Fails if the rules cannot be applied. The previous rules are still in force then.
    pub async fn apply(&mut self, sets: Sets) -> Result<(), Error> {
        let sets = Arc::new(sets);
        if let Some(before) = self.applied.take() {
            if before.sets == sets {
                self.applied = Some(before);
                return Ok(());
            }
            let target = sets.clone();
            let change = move || change_elements(&before, target);
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
        let replace = move || replace_table(sets, rules);
        let applied = self.thread.run(replace).await??;
        self.rules = Some(applied.rules.clone());
        self.applied = Some(applied);
        Ok(())
    }

    /// Packets dropped since the previous call. Returns 0 if [`COUNT_INTERVAL`] has not passed
    /// since the counter was read. Packets between the last read and a replacement of the table are
    /// not counted.
    ///
    /// # Errors
    /// Fails if `nft` fails.
    pub async fn dropped(&mut self) -> Result<u64, Error> {
        let now = Instant::now();
        if self.next_count.is_some_and(|at| at > now) {
            return Ok(0);
        }
        self.next_count = Some(now + COUNT_INTERVAL);
        let count = || nftables::counter_packets(TABLE, rules::COUNTER);
        let packets = self.thread.run(count).await??.unwrap_or_default();
        let before = std::mem::replace(&mut self.last_count, packets);
        // The counter starts at zero in a table that was replaced.
        Ok(packets.checked_sub(before).unwrap_or(packets))
    }

    /// Compares the table with what was applied, and replaces it if it differs. Returns whether it
    /// was replaced.
    ///
    /// # Errors
    /// Fails if the kernel cannot be queried or the rules cannot be applied.
    pub async fn verify(&mut self) -> Result<bool, Error> {
        let Some(applied) = self.applied.clone() else {
            return Ok(false);
        };
        let may_list = self.next_listing.is_none_or(|at| at <= Instant::now());
        let sets = applied.sets.clone();
        let verify = move || {
            let start = Instant::now();
            (verify(&applied, may_list), start.elapsed())
        };
        let (verdict, took) = self.thread.run(verify).await?;
        match verdict? {
            Verdict::Unchanged => Ok(false),
            Verdict::Intact { generation } => {
                self.next_listing = Some(Instant::now() + took * LISTING_TIME_SHARE);
                self.applied
                    .iter_mut()
                    .for_each(|applied| applied.generation = generation);
                Ok(false)
            }
            Verdict::Damaged => {
                self.replace(sets).await?;
                Ok(true)
            }
        }
    }
}

/// The addresses of meshed pods in a model: those on `node`, and all.
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

/// Replaces the whole table in one transaction. `rules` is the kernel's listing of the rules. It is
/// never taken from the node's own table: a concurrent change by another program would be taken for
/// the daemon's from then on, and on a busy node there may be no moment without changes.
fn replace_table(sets: Arc<Sets>, rules: Option<Arc<str>>) -> Result<Applied, nftables::Error> {
    let rules = match rules {
        Some(rules) => rules,
        None => {
            let listing = nftables::list_in_scratch_netns(&Sets::default().script(), TABLE)?;
            Listing::parse(&listing).rules.into()
        }
    };
    let before = nftables::generation()?;
    nftables::apply(&sets.script())?;
    let generation = nftables::generation()?;
    // After a concurrent change by another program, the next verification must list the table.
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

/// Changes the elements. Returns `None` if that fails, because the table is not the applied one and
/// must be replaced.
fn change_elements(before: &Applied, sets: Arc<Sets>) -> Option<Applied> {
    nftables::apply(&sets.changes(&before.sets)).ok()?;
    // After a change by another program, the next verification must list the table.
    let expected = before.generation.wrapping_add(1);
    let generation = if nftables::generation().ok()? == expected {
        expected
    } else {
        before.generation
    };
    Some(Applied {
        sets,
        generation,
        rules: before.rules.clone(),
    })
}

/// Result of a verification.
enum Verdict {
    /// The ruleset has not changed, or it is too early to list it again.
    Unchanged,
    /// The ruleset has changed, but not the guard's table.
    Intact { generation: u32 },
    /// The table differs from what was applied.
    Damaged,
}

fn verify(applied: &Applied, may_list: bool) -> Result<Verdict, nftables::Error> {
    let generation = nftables::generation()?;
    if generation == applied.generation || !may_list {
        return Ok(Verdict::Unchanged);
    }
    let listing = match nftables::list(TABLE) {
        Ok(Some(listing)) => listing,
        Ok(None) => return Ok(Verdict::Damaged),
        Err(error) if error.is_oversized_listing() => return Ok(Verdict::Damaged),
        Err(error) => return Err(error),
    };
    let listing = Listing::parse(&listing);
    let is_intact = *listing.rules == *applied.rules && listing.elements == applied.sets.by_name();
    Ok(if is_intact {
        Verdict::Intact { generation }
    } else {
        Verdict::Damaged
    })
}
