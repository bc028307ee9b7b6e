//! Checks that a connection failed only while one of its ends had no valid certificate, and that the access log has the reason.

use anyhow::{Result, bail};
use lab::Lab;

use super::{CertTimeline, ConnectionRecord, identity};
use crate::access_log::{self, Entry};

/// The reasons with which a daemon reports that an identity has no valid certificate.
pub const NO_CERTIFICATE_REASONS: [&str; 2] = ["certificate_expired", "cert_pending"];

/// Client and server of a load.
#[derive(Debug, Clone, Copy)]
pub struct LoadPath<'a> {
    /// The client's node.
    pub node: &'a str,
    /// The client's pod, in namespace `shop`.
    pub source: &'a str,
    /// The server's pod. Its name ends in its node's name.
    pub destination: &'a str,
}

impl LoadPath<'_> {
    /// Checks each failed connection: while it lasted, source or destination had no valid certificate, and the access
    /// log has a line with that reason. Returns how many connections failed.
    ///
    /// # Errors
    /// A connection failed although both ends had certificates, or has no such line.
    pub fn check_failures(
        &self,
        lab: &Lab,
        records: &[ConnectionRecord],
        timeline: &CertTimeline,
    ) -> Result<usize> {
        let failed: Vec<&ConnectionRecord> = records
            .iter()
            .filter(|record| record.failure.is_some())
            .collect();
        if failed.is_empty() {
            return Ok(0);
        }
        let mut lines = self.failure_lines(lab)?;
        let mut remapped = Vec::new();
        for record in &failed {
            if !self.overlaps_gap(record, timeline) {
                bail!("{self:?}: {record:?} failed although both ends had valid certificates");
            }
            let port = format!(":{}", record.port);
            let has_port = |line: &Entry| line.field("src.addr").ends_with(&port);
            match take_closest(&mut lines, record, has_port) {
                Some(line) => self.check_reason(lab, record, &line)?,
                None => remapped.push(record),
            }
        }
        // Two connections of one pod to two destinations may share a source port. The redirect then gives one of them
        // another port, and the daemon logs that one.
        for record in remapped {
            match take_closest(&mut lines, record, |_| true) {
                Some(line) => self.check_reason(lab, record, &line)?,
                None => bail!("{self:?}: no access log line for {record:?}"),
            }
        }
        Ok(failed.len())
    }

    /// The lines of failed connections of this path in the log of the client's node.
    fn failure_lines(&self, lab: &Lab) -> Result<Vec<Entry>> {
        let mut lines = access_log::lines(lab, self.node)?;
        lines.retain(|line| {
            line.field("direction") == "outbound"
                && line.field("src.workload") == self.source
                && line.field("dst.workload") == self.destination
                && line.level == "error"
        });
        Ok(lines)
    }

    /// Whether source or destination had no valid certificate during a part of the connection.
    fn overlaps_gap(&self, record: &ConnectionRecord, timeline: &CertTimeline) -> bool {
        [self.source, self.destination]
            .iter()
            .flat_map(|pod| timeline.gaps(&identity(pod)))
            .any(|gap| record.end >= gap.start && record.start <= gap.end)
    }

    /// Checks that the client's daemon reports a missing certificate, or the server's daemon does for the same
    /// connection.
    fn check_reason(&self, lab: &Lab, record: &ConnectionRecord, line: &Entry) -> Result<()> {
        let has_reason = |line: &Entry| NO_CERTIFICATE_REASONS.contains(&line.field("reason"));
        if has_reason(line) {
            return Ok(());
        }
        let (address, _) = line.field("src.addr").rsplit_once(':').unwrap_or_default();
        let server_node = &self.destination[self.destination.len() - 1..];
        let is_explained = access_log::lines(lab, server_node)?.iter().any(|inbound| {
            inbound.field("direction") == "inbound"
                && inbound.field("src.addr").starts_with(address)
                && has_reason(inbound)
                && inbound
                    .seconds_since_midnight()
                    .is_some_and(|at| record.seconds_from_end(at).is_some())
        });
        match is_explained {
            true => Ok(()),
            false => bail!("{record:?} failed for another reason: {}", line.line),
        }
    }
}

/// Removes and returns the matching line whose time is closest to the end of the connection.
fn take_closest(
    lines: &mut Vec<Entry>,
    record: &ConnectionRecord,
    matches: impl Fn(&Entry) -> bool,
) -> Option<Entry> {
    let distance = |line: &Entry| record.seconds_from_end(line.seconds_since_midnight()?);
    let matching = lines.iter().enumerate().filter(|(_, line)| matches(line));
    let near = matching.filter_map(|(index, line)| Some((index, distance(line)?)));
    let (index, _) = near.min_by(|(_, a), (_, b)| a.total_cmp(b))?;
    Some(lines.swap_remove(index))
}
