//! Redirection of a pod's TCP to the daemon, inside the pod's own network namespace.
//!
//! One nftables table of both families, applied in one transaction, does all of it; policy routing
//! brings back the answers to connections that the daemon opens in a client's name. What was
//! applied is remembered as the kernel lists it, so that [`Capture::verify`] can tell later whether
//! it still stands: by the ruleset's generation, which costs microseconds, and by the listing only
//! when something in the namespace has changed.
//!
//! Everything here blocks for as long as the kernel or `nft` takes, and runs on the threads made for
//! that ([`crate::netns::NetnsThreads`]).

mod listeners;
mod routing;
mod rules;
mod sysctl;
mod watch;

use std::fs;
use std::io;
use std::sync::Arc;

pub use listeners::{PodListeners, listeners};
pub use rules::{Redirection, Rules};
pub use watch::NetnsWatch;

use crate::contract::{RETURN_MARK, RETURN_TABLE};
use crate::netns::Netns;
use crate::nftables;

/// Name of the pod's table, which is ours alone.
pub const TABLE: &str = "ambit";

/// Which families a namespace has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv6 exists and is not disabled on the loopback device, where redirected connections end.
    pub v6: bool,
}

/// Why capture could not be put in place or taken away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The rules.
    #[error("the redirect rules could not be applied")]
    Rules(#[from] nftables::Error),
    /// The policy routing.
    #[error(
        "the policy route of answers (mark {RETURN_MARK:#x}, table {RETURN_TABLE}) could not be set"
    )]
    Routing(#[source] io::Error),
    /// The namespace.
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

/// What no longer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drift {
    /// The table is gone.
    TableGone,
    /// The table's content differs from what was applied.
    RulesChanged,
    /// The policy rule or its route is gone.
    RoutingGone,
    /// IPv6 came or went.
    FamiliesChanged,
    /// Nobody listens on a port to which the rules redirect.
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

/// Rules that stand in one pod's namespace, and how to tell that they still do.
#[derive(Debug)]
pub struct Capture {
    netns: Arc<Netns>,
    rules: Rules,
    families: Families,
    listing: String,
    generation: u32,
}

impl Capture {
    /// Puts `rules` in place of whatever stood in our table, in one transaction, and sets the
    /// routing and the kernel's options that they need.
    ///
    /// # Errors
    /// Fails if the kernel or `nft` refuses. The rules of before stand then; the routing may be
    /// half set, which harms nothing.
    pub fn apply(netns: Arc<Netns>, rules: Rules) -> Result<Self, Error> {
        let mut outcome = Ok(None);
        netns
            .enter(|| {
                outcome = Self::apply_here(&rules).map(Some);
                Ok(())
            })
            .map_err(Error::Netns)?;
        let (families, listing, generation) =
            outcome?.ok_or(Error::Netns(io::ErrorKind::Other.into()))?;
        Ok(Self {
            netns,
            rules,
            families,
            listing,
            generation,
        })
    }

    fn apply_here(rules: &Rules) -> Result<(Families, String, u32), Error> {
        let families = families().map_err(Error::Netns)?;
        routing::ensure(families).map_err(Error::Routing)?;
        let (generation, listing) = nftables::apply_alone(&rules.script(), TABLE)?;
        sysctl::set();
        Ok((families, listing, generation))
    }

    /// The rules that stand.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Looks whether everything still stands as applied. With `expect_listeners`, this includes
    /// sockets that listen on the three ports.
    ///
    /// # Errors
    /// Fails if the namespace or the kernel cannot be asked, which says nothing about the rules.
    pub fn verify(&mut self, expect_listeners: bool) -> Result<Option<Drift>, Error> {
        let netns = self.netns.clone();
        let mut outcome = Ok(None);
        netns
            .enter(|| {
                outcome = self.verify_here(expect_listeners);
                Ok(())
            })
            .map_err(Error::Netns)?;
        outcome
    }

    fn verify_here(&mut self, expect_listeners: bool) -> Result<Option<Drift>, Error> {
        let generation = nftables::generation()?;
        if generation != self.generation {
            match nftables::list(TABLE) {
                Ok(None) => return Ok(Some(Drift::TableGone)),
                Ok(Some(listing)) if listing == self.listing => self.generation = generation,
                Ok(Some(_)) => return Ok(Some(Drift::RulesChanged)),
                // A pod that fills our table must not thereby keep it from being replaced.
                Err(error) if error.is_of_size() => return Ok(Some(Drift::RulesChanged)),
                Err(error) => return Err(error.into()),
            }
        }
        if families().map_err(Error::Netns)? != self.families {
            return Ok(Some(Drift::FamiliesChanged));
        }
        if !routing::stands(self.families).map_err(Error::Routing)? {
            return Ok(Some(Drift::RoutingGone));
        }
        if expect_listeners && !listeners::stand().map_err(Error::Netns)? {
            return Ok(Some(Drift::ListenersGone));
        }
        Ok(None)
    }

    /// Takes everything away that [`Capture::apply`] put into a namespace; nothing there is no
    /// error.
    ///
    /// # Errors
    /// Fails if the kernel or `nft` refuses.
    pub fn remove(netns: &Netns) -> Result<(), Error> {
        let mut outcome = Ok(());
        netns
            .enter(|| {
                outcome = Self::remove_here();
                Ok(())
            })
            .map_err(Error::Netns)?;
        outcome
    }

    fn remove_here() -> Result<(), Error> {
        nftables::apply(&rules::removal())?;
        routing::remove().map_err(Error::Routing)
    }

    /// Whether our table stands in a namespace, put there by this process or by one before it.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered or `nft` cannot be run.
    pub fn is_present(netns: &Netns) -> Result<bool, Error> {
        let mut outcome = Ok(false);
        netns
            .enter(|| {
                outcome = match nftables::list(TABLE) {
                    Ok(listing) => Ok(listing.is_some()),
                    // Whatever it is that takes so long to list, it is there.
                    Err(error) if error.is_of_size() => Ok(true),
                    Err(error) => Err(error),
                };
                Ok(())
            })
            .map_err(Error::Netns)?;
        Ok(outcome?)
    }
}

/// The families of the namespace that this thread is in.
fn families() -> io::Result<Families> {
    match fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6") {
        Ok(value) => Ok(Families {
            v6: value.trim() == "0",
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Families { v6: false }),
        // Not to know is no reason to change anything.
        Err(error) => Err(error),
    }
}
