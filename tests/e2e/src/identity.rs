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

use crate::access_log;

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
        let lines = access_log::lines(lab, self.node)?;
        for attempt in &failed {
            let gap = [self.source, self.destination]
                .iter()
                .flat_map(|pod| timeline.gaps(&identity(pod)))
                .find(|gap| attempt.end >= gap.start && attempt.start <= gap.end);
            let suffix = format!(":{}", attempt.port);
            // In three minutes a port is used more than once.
            let line = lines.iter().find(|line| {
                line.field("direction") == "outbound"
                    && line.field("src.addr").ends_with(&suffix)
                    && line.since_midnight().is_some_and(|at| attempt.ended_at(at))
            });
            let said = line.map(|line| line.line.as_str()).unwrap_or_default();
            if gap.is_none() {
                bail!("{self:?}: {attempt:?} failed although both had valid certificates: {said}");
            }
            let reason = line.map(|line| line.field("reason")).unwrap_or_default();
            if !NO_CERTIFICATE.contains(&reason) {
                bail!("{self:?}: {attempt:?} in {gap:?} was not explained: {said}");
            }
        }
        Ok(failed.len())
    }
}
