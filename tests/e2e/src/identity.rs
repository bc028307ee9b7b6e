//! Certificates under load: traffic that goes on, a record of which certificate was held when, and
//! the judgement of every connection that failed.

mod held;
mod load;
mod scene;
mod secrets;

pub use held::{Held, Timeline, held, now, roots};
pub use load::{Attempt, Short, Stream};
pub use scene::{NODES, PATHS, Traffic, identity, judge, manifests, unharmed, up};
pub use secrets::appear_nowhere;

use anyhow::{Result, bail};
use lab::Lab;

use crate::access_log::{self, Access};

/// How a daemon says that an identity has no valid certificate.
pub const NO_CERTIFICATE: [&str; 2] = ["certificate_expired", "cert_pending"];

/// A path of the load.
#[derive(Debug, Clone, Copy)]
pub struct Path<'a> {
    /// The node of the client.
    pub node: &'a str,
    /// The client's pod, in namespace `shop`.
    pub source: &'a str,
    /// The server's pod.
    pub destination: &'a str,
}

impl Path<'_> {
    /// Each failure must have been unavoidable: while it lasted there was a time in which source or
    /// destination had no valid certificate; and the client's daemon must have said so. Returns how
    /// many failed.
    ///
    /// # Errors
    /// A failure that was avoidable, or was not explained.
    pub fn judge(&self, lab: &Lab, attempts: &[Attempt], timeline: &Timeline) -> Result<usize> {
        let failed: Vec<&Attempt> = attempts
            .iter()
            .filter(|one| one.failure.is_some())
            .collect();
        if failed.is_empty() {
            return Ok(0);
        }
        let mut lines = access_log::lines(lab, self.node)?;
        lines.retain(|line| {
            line.field("direction") == "outbound"
                && line.field("src.workload") == self.source
                && line.field("dst.workload") == self.destination
                && line.level == "error"
        });
        let mut remapped = Vec::new();
        for attempt in &failed {
            if !self.unavoidable(attempt, timeline) {
                bail!("{self:?}: {attempt:?} failed although both had valid certificates");
            }
            let port = format!(":{}", attempt.port);
            let own = |line: &Access| line.field("src.addr").ends_with(&port);
            match claim(&mut lines, attempt, own) {
                Some(line) => self.explained(lab, attempt, &line)?,
                None => remapped.push(attempt),
            }
        }
        // Two connections of one pod, to two places, may have one port until the redirect gives one of
        // them another: the daemon says the new one.
        for attempt in remapped {
            match claim(&mut lines, attempt, |_| true) {
                Some(line) => self.explained(lab, attempt, &line)?,
                None => bail!("{self:?}: {attempt:?} was not explained"),
            }
        }
        Ok(failed.len())
    }

    /// For some of the time that it took, one of both had no valid certificate.
    fn unavoidable(&self, attempt: &Attempt, timeline: &Timeline) -> bool {
        [self.source, self.destination]
            .iter()
            .flat_map(|pod| timeline.gaps(&identity(pod)))
            .any(|gap| attempt.end >= gap.start && attempt.start <= gap.end)
    }

    /// The daemon of the client says that there is no certificate, or that of the server does if it is
    /// the server that has none.
    fn explained(&self, lab: &Lab, attempt: &Attempt, line: &Access) -> Result<()> {
        let says = |line: &Access| NO_CERTIFICATE.contains(&line.field("reason"));
        if says(line) {
            return Ok(());
        }
        let (address, _) = line.field("src.addr").rsplit_once(':').unwrap_or_default();
        let there = access_log::lines(lab, &self.destination[self.destination.len() - 1..])?;
        let refused = there.iter().any(|there| {
            there.field("direction") == "inbound"
                && there.field("src.addr").starts_with(address)
                && says(there)
                && there
                    .since_midnight()
                    .is_some_and(|at| attempt.ended_apart_from(at).is_some())
        });
        match refused {
            true => Ok(()),
            false => bail!("{attempt:?} is explained otherwise: {}", line.line),
        }
    }
}

/// Takes the line that tells of the failure, the nearest in time, away from the others.
fn claim(
    lines: &mut Vec<Access>,
    attempt: &Attempt,
    is: impl Fn(&Access) -> bool,
) -> Option<Access> {
    let apart = |line: &Access| attempt.ended_apart_from(line.since_midnight()?);
    let near = lines.iter().enumerate().filter(|(_, line)| is(line));
    let near = near.filter_map(|(at, line)| Some((at, apart(line)?)));
    let (found, _) = near.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    Some(lines.swap_remove(found))
}
