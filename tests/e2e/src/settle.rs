//! Knowing that the daemons know.

use std::time::Duration;

use anyhow::Result;
use lab::Lab;

/// A changed file is read within tens of milliseconds; this leaves room for a busy machine.
const DEADLINE: Duration = Duration::from_secs(15);

/// Waits until every daemon has seen all objects that were applied before this call.
///
/// # Errors
/// One has not after 15 s.
pub fn caught_up(lab: &Lab) -> Result<()> {
    lab.wait_read(DEADLINE)
}
