//! Waits until the daemons have read what a test has changed.

use std::time::Duration;

use anyhow::Result;
use lab::Lab;

/// A changed file is read within tens of milliseconds; this leaves room for a busy machine.
const DEADLINE: Duration = Duration::from_secs(15);

/// Waits until every daemon has read all objects that were applied before this call.
///
/// # Errors
/// A daemon has not read them after 15 s.
pub fn wait_synced(lab: &Lab) -> Result<()> {
    lab.wait_applied(DEADLINE)
}
