//! Redirection of a pod's TCP to the daemon, inside the pod's own network namespace.
//!
//! One nftables table, applied in one transaction, redirects connections of both IP families.
//! Policy routing delivers the replies to connections that the daemon opens from a client's
//! address. [`Capture`] keeps the kernel's listing of what was applied, so that [`Capture::verify`]
//! can compare: by the ruleset's generation, which costs microseconds, and by the listing only
//! after something in the namespace has changed.
//!
//! Calls block as long as the kernel or `nft` takes. Run them on [`crate::netns::NetnsThreads`].

mod listeners;
mod routing;
mod rules;
mod sysctl;
mod watch;

use std::io;
use std::sync::Arc;

pub use listeners::{PodListeners, listeners};
pub use rules::{Redirection, Rules};
pub use watch::NetnsWatch;

use crate::netns::Netns;
use crate::nftables;
use crate::ports_and_marks::{RETURN_MARK, RETURN_TABLE};
use sysctl::Families;

/// Name of the table in a pod's namespace. Only the daemon uses it.
pub const TABLE: &str = "ambit";

/// Why capture could not be applied, verified or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules could not be applied or listed.
    #[error("the redirect rules could not be applied")]
    Rules(#[from] nftables::Error),
    /// The policy routing could not be set or read.
    #[error(
        "the policy route of replies (mark {RETURN_MARK:#x}, table {RETURN_TABLE}) could not be set"
    )]
    Routing(#[source] io::Error),
    /// The namespace could not be entered or inspected.
    #[error("the pod's network namespace could not be entered")]
    Netns(#[source] io::Error),
}

impl Error {
    /// Stable reason code.
    pub const fn code(&self) -> &'static str {
        match self {
            Error::Rules(_) => "capture_rules",
            Error::Routing(_) => "capture_routing",
            Error::Netns(_) => "netns_unusable",
        }
    }
}

/// How a pod's namespace differs from what was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drift {
    /// The table is gone.
    TableGone,
    /// The table's content differs from what was applied.
    RulesChanged,
    /// The policy rule or its route is gone.
    RoutingGone,
    /// IPv6 was enabled or disabled.
    FamiliesChanged,
    /// A port to which the rules redirect has no listener.
    ListenersGone,
}

impl Drift {
    /// Stable reason code.
    pub const fn code(self) -> &'static str {
        match self {
            Drift::TableGone => "table_gone",
            Drift::RulesChanged => "rules_changed",
            Drift::RoutingGone => "routing_gone",
            Drift::FamiliesChanged => "families_changed",
            Drift::ListenersGone => "listeners_gone",
        }
    }
}

/// The rules that were applied in one pod's namespace, with what is needed to verify them.
#[derive(Debug)]
pub struct Capture {
    netns: Arc<Netns>,
    rules: Rules,
    families: Families,
    /// The kernel's listing of the table.
    listing: String,
    /// Generation of the namespace's ruleset at which the table equalled `listing`.
    generation: u32,
}

impl Capture {
    /// Replaces the content of the table by `rules` in one transaction, and sets the routing and
    /// the kernel options that they need.
    ///
    /// # Errors
    /// Fails if the kernel or `nft` refuses. The previous rules are still in force then. The
    /// routing may be set in part, which has no effect without the rules.
    pub fn apply(netns: Arc<Netns>, rules: Rules) -> Result<Self, Error> {
        let (families, listing, generation) = inside(&netns, || Self::apply_here(&rules))?;
        Ok(Self {
            netns,
            rules,
            families,
            listing,
            generation,
        })
    }

    fn apply_here(rules: &Rules) -> Result<(Families, String, u32), Error> {
        let families = sysctl::families().map_err(Error::Netns)?;
        routing::ensure(families).map_err(Error::Routing)?;
        let (generation, listing) = nftables::apply_and_list(&rules.script(), TABLE)?;
        sysctl::set_options();
        Ok((families, listing, generation))
    }

    /// The rules that were applied.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Compares the namespace with what was applied. With `expect_listeners`, this includes
    /// listening sockets on the three ports.
    ///
    /// # Errors
    /// Fails if the namespace or the kernel cannot be queried. The state of the rules is unknown
    /// then.
    pub fn verify(&mut self, expect_listeners: bool) -> Result<Option<Drift>, Error> {
        let netns = self.netns.clone();
        inside(&netns, || self.verify_here(expect_listeners))
    }

    fn verify_here(&mut self, expect_listeners: bool) -> Result<Option<Drift>, Error> {
        let generation = nftables::generation()?;
        if generation != self.generation {
            match nftables::list(TABLE) {
                Ok(None) => return Ok(Some(Drift::TableGone)),
                Ok(Some(listing)) if listing == self.listing => self.generation = generation,
                Ok(Some(_)) => return Ok(Some(Drift::RulesChanged)),
                // A pod that fills the table must not prevent its replacement.
                Err(error) if error.is_oversized_listing() => {
                    return Ok(Some(Drift::RulesChanged));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if sysctl::families().map_err(Error::Netns)? != self.families {
            return Ok(Some(Drift::FamiliesChanged));
        }
        if !routing::is_present(self.families).map_err(Error::Routing)? {
            return Ok(Some(Drift::RoutingGone));
        }
        if expect_listeners && !listeners::are_open().map_err(Error::Netns)? {
            return Ok(Some(Drift::ListenersGone));
        }
        Ok(None)
    }

    /// Removes from a namespace everything that [`Capture::apply`] adds. It is no error if nothing
    /// is there.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered, or the kernel or `nft` refuses.
    pub fn remove(netns: &Netns) -> Result<(), Error> {
        inside(netns, || {
            nftables::apply(&rules::removal())?;
            routing::remove().map_err(Error::Routing)
        })
    }

    /// Whether a namespace has the daemon's table, applied by this process or by an earlier one.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered or `nft` cannot be run.
    pub fn is_present(netns: &Netns) -> Result<bool, Error> {
        inside(netns, || match nftables::list(TABLE) {
            Ok(listing) => Ok(listing.is_some()),
            // A table that is too large to list exists.
            Err(error) if error.is_oversized_listing() => Ok(true),
            Err(error) => Err(error.into()),
        })
    }
}

/// Runs `f` on this thread inside the namespace.
fn inside<T>(netns: &Netns, f: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    netns.enter(|| Ok(f())).map_err(Error::Netns)?
}
