//! Knowing that the daemons know.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Lab;

use crate::manifest::Service;

/// A changed file is read within tens of milliseconds; this leaves room for a busy machine.
const DEADLINE: Duration = Duration::from_secs(15);

/// Waits until every daemon has seen all objects that were applied before this call: one more is
/// applied, and the daemons read changes in their order.
///
/// # Errors
/// A daemon does not show the last object after 15 s.
pub fn caught_up(lab: &Lab) -> Result<()> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("fence-{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let fence = Service::new("default", &name, 80, 80).without_selector();
    lab.apply(String::from(fence)).context("the fence")?;
    for node in lab.status()?.nodes {
        let what = format!("the daemon of node {} to know service {name}", node.name);
        lab.wait_until(&what, DEADLINE, || {
            lab.config_dump(&node.name)
                .ok()?
                .to_string()
                .contains(&name)
                .then_some(())
        })?;
    }
    Ok(())
}
