//! Policies that are edited fifty times a second, for half a minute, under load: what is denied
//! throughout never once gets through, what is allowed throughout never fails.

use std::time::Duration;

use ambit_e2e::capture::changed_lines;
use ambit_e2e::input::problems;
use ambit_e2e::policy::churn::{Listener, PolicyChurn, Prober, denied_addresses, requests_from};
use ambit_e2e::policy::connection::Outcome;
use ambit_e2e::policy::fixture::{self, BAR, FOO, PRODUCTPAGE, SERVERS};
use ambit_e2e::policy::guides::connections;
use ambit_e2e::policy::telemetry::{Baseline, DENIED, policies};
use ambit_e2e::policy::transfers::{Transfers, routes};
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
    let lab = fixture::up()?;
    let mut churn = PolicyChurn::begin(&lab, seed)?;
    wait_synced(&lab)?;
    let baseline = Baseline::take(&lab)?;
    let denied = Prober::of(&lab, PRODUCTPAGE)?;
    let unheard = Listener::of(&lab, PRODUCTPAGE)?;
    let allowed = [Prober::of(&lab, FOO)?, Prober::of(&lab, BAR)?];
    // They stay open all the time.
    let open = Transfers::start(&lab, &routes(&[FOO, BAR], &["foo/near", "foo/far"]), 2)?;
    let edits = churn.rage(&lab, PER_SECOND, LASTS)?;
    let told = || format!("seed {seed}, the last edits: {:#?}", churn.last_edits());

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

    verdicts(&lab, &baseline).with_context(told)?;
    let addresses = denied_addresses(&lab)?;
    for (server, _) in SERVERS {
        let through = requests_from(&lab, server, &addresses)?;
        ensure!(
            through.is_empty(),
            "{server} was http_outcome: {through:?}; {}",
            told()
        );
    }
    churn.settle()?;
    wait_synced(&lab)?;
    as_a_fresh_daemon(&lab).with_context(told)
}

/// Each connection that reached a server's daemon was judged as it must be.
fn verdicts(lab: &Lab, baseline: &Baseline) -> Result<()> {
    for (_, node) in SERVERS {
        for line in baseline.lines(lab, node)? {
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
        ensure!(before == after, "{}", changed_lines(&before, &after));
        decides(lab)?;
    }
    Ok(())
}

fn decides(lab: &Lab) -> Result<()> {
    for (from, wanted) in [(PRODUCTPAGE, Outcome::Reset), (FOO, Outcome::Answered)] {
        for connection in connections(from) {
            let seen = connection.open(lab)?;
            ensure!(seen == wanted, "{connection}: {seen:?}");
        }
    }
    Ok(())
}
