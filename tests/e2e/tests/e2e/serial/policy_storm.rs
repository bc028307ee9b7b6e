//! Policies that are edited fifty times a second, for half a minute, under load: what is denied
//! throughout never once gets through, what is allowed throughout never fails.

use std::time::Duration;

use ambit_e2e::capture::difference;
use ambit_e2e::input::problems;
use ambit_e2e::policy::attempt::Seen;
use ambit_e2e::policy::evidence::{DENIED, Mark, policies};
use ambit_e2e::policy::guides::attempts;
use ambit_e2e::policy::storm::{Listener, Prober, Storm, denied_addresses, requests_from};
use ambit_e2e::policy::town::{self, BAR, FOO, PRODUCTPAGE, SERVERS};
use ambit_e2e::policy::transfers::{Transfers, paths};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::Lab;
use serde_json::Value;

const LASTS: Duration = Duration::from_secs(30);
const PER_SECOND: u32 = 50;

/// curl's ways to say that the connection was reset: at once, as it sent, as it received.
const RESET: [u8; 3] = [7, 55, 56];

#[test]
fn a_storm_of_edits_opens_no_window_and_closes_none() -> Result<()> {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let lab = town::up()?;
    let mut storm = Storm::begin(&lab, seed)?;
    wait_synced(&lab)?;
    let mark = Mark::now(&lab)?;
    let denied = Prober::of(&lab, PRODUCTPAGE)?;
    let unheard = Listener::of(&lab, PRODUCTPAGE)?;
    let allowed = [Prober::of(&lab, FOO)?, Prober::of(&lab, BAR)?];
    // They stay open all the time.
    let open = Transfers::start(&lab, &paths(&[FOO, BAR], &["foo/near", "foo/far"]), 2)?;
    let edits = storm.rage(&lab, PER_SECOND, LASTS)?;
    let told = || format!("seed {seed}, the last edits: {:#?}", storm.last_edits());

    let mut refused = 0;
    for prober in denied {
        refused += prober.finish(&RESET).with_context(told)?;
    }
    for listener in unheard {
        refused += listener.finish().with_context(told)?;
    }
    let mut served = 0;
    for prober in allowed.into_iter().flatten() {
        served += prober.finish(&[0]).with_context(told)?;
    }
    open.all_intact(&lab).with_context(told)?;
    println!("{edits} edits, {refused} connections refused, {served} served");
    // A second's worth of each, so that something was tested at all.
    ensure!(edits > 1000 && refused > 1000 && served > 2000);

    verdicts(&lab, &mark).with_context(told)?;
    let addresses = denied_addresses(&lab)?;
    for (server, _) in SERVERS {
        let through = requests_from(&lab, server, &addresses)?;
        ensure!(
            through.is_empty(),
            "{server} was asked: {through:?}; {}",
            told()
        );
    }
    storm.settle()?;
    wait_synced(&lab)?;
    as_a_fresh_daemon(&lab).with_context(told)
}

/// Each connection that reached a server's daemon was judged as it must be.
fn verdicts(lab: &Lab, mark: &Mark) -> Result<()> {
    for (_, node) in SERVERS {
        for line in mark.lines(lab, node)? {
            if line.field("direction") != "inbound" {
                continue;
            }
            let denied = line.field("src.workload") == "productpage";
            let was_denied = line.field("reason") == DENIED;
            ensure!(denied == was_denied, "{}", line.line);
        }
    }
    Ok(())
}

/// All that was edited left nothing behind: a daemon that reads the same files for the first time
/// says the same of them, and decides the same.
fn as_a_fresh_daemon(lab: &Lab) -> Result<()> {
    for (_, node) in SERVERS {
        let state = || -> Result<String> {
            let problems = problems(lab, node)?;
            // Each marker is a service without endpoints.
            let of_policies = problems
                .into_iter()
                .filter(|problem| !problem.to_string().contains("marker-"));
            let state: Value = [Value::from(policies(lab, node)?), of_policies.collect()]
                .into_iter()
                .collect();
            Ok(format!("{state:#}"))
        };
        let before = state()?;
        decides(lab)?;
        lab.stop_daemon(node)?;
        lab.start_daemon(node)?;
        wait_synced(lab)?;
        let after = state()?;
        ensure!(before == after, "{}", difference(&before, &after));
        decides(lab)?;
    }
    Ok(())
}

fn decides(lab: &Lab) -> Result<()> {
    for (from, wanted) in [(PRODUCTPAGE, Seen::Reset), (FOO, Seen::Answered)] {
        for attempt in attempts(from) {
            let seen = attempt.make(lab)?;
            ensure!(seen == wanted, "{attempt}: {seen:?}");
        }
    }
    Ok(())
}
