//! Certificates under load: traffic that goes on, a record of which certificate was held when, and
//! the judgement of every connection that failed.

mod held;
mod load;

pub use held::{Held, Timeline, held, roots};
pub use load::{Attempt, Short, Stream};

use anyhow::{Result, bail};
use lab::Lab;

use crate::access_log;

/// How a daemon says that an identity has no valid certificate.
pub const NO_CERTIFICATE: [&str; 2] = ["certificate_expired", "cert_pending"];

/// A path of the load: a client pod and its daemon's node, a server's identity.
#[derive(Debug, Clone, Copy)]
pub struct Path<'a> {
    /// The node of the client.
    pub node: &'a str,
    /// The identity of the client.
    pub source: &'a str,
    /// The identity of the server.
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
                .flat_map(|identity| timeline.gaps(identity))
                .find(|gap| attempt.end >= gap.start && attempt.start <= gap.end);
            let suffix = format!(":{}", attempt.port);
            let line = lines.iter().rfind(|line| {
                line.field("direction") == "outbound" && line.field("src.addr").ends_with(&suffix)
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
