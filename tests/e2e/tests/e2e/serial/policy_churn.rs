//! Policies under continuous edits and load: 50 edits a second for 30 s. A client that is denied
//! throughout is never served, and a client that is allowed throughout never fails.

use std::time::Duration;

use ambit_e2e::capture::changed_lines;
use ambit_e2e::input::problems;
use ambit_e2e::policy::churn::{
    GreetingReader, PolicyChurn, Prober, denied_addresses, requests_from,
};
use ambit_e2e::policy::connection::check_connections;
use ambit_e2e::policy::fixture::{self, BAR, FOO, PRODUCTPAGE, SERVERS};
use ambit_e2e::policy::telemetry::{Baseline, DENIED, policies};
use ambit_e2e::policy::transfers::{Transfers, routes};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::Lab;
use serde_json::Value;

const DURATION: Duration = Duration::from_secs(30);
const EDITS_PER_SECOND: u32 = 50;

/// curl's exit codes for a reset: on connecting, sending and receiving.
const RESET_EXIT_CODES: [u8; 3] = [7, 55, 56];

#[test]
fn continuous_edits_never_admit_a_denied_client_or_deny_an_allowed_one() -> Result<()> {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let lab = fixture::up()?;
    let mut churn = PolicyChurn::start(&lab, seed)?;
    wait_synced(&lab)?;
    let baseline = Baseline::take(&lab)?;
    let denied_http = Prober::start_all(&lab, PRODUCTPAGE)?;
    let denied_tcp = GreetingReader::start_all(&lab, PRODUCTPAGE)?;
    let allowed = [Prober::start_all(&lab, FOO)?, Prober::start_all(&lab, BAR)?];
    // These stay open for the whole test.
    let open = Transfers::start(&lab, &routes(&[FOO, BAR], &["foo/near", "foo/far"]), 2)?;
    let edits = churn.run(&lab, EDITS_PER_SECOND, DURATION)?;
    let last_edits = || format!("seed {seed}, the last edits: {:#?}", churn.last_edits());

    let mut denied = 0;
    for prober in denied_http {
        denied += prober.finish(&RESET_EXIT_CODES).with_context(last_edits)?;
    }
    for reader in denied_tcp {
        denied += reader.finish().with_context(last_edits)?;
    }
    let mut served = 0;
    for prober in allowed.into_iter().flatten() {
        served += prober.finish(&[0]).with_context(last_edits)?;
    }
    open.wait_all_complete(&lab).with_context(last_edits)?;
    println!("{edits} edits, {denied} connections denied, {served} served");
    // Lower bounds far below the usual counts: without them a stalled client would pass.
    ensure!(edits > 1000 && denied > 1000 && served > 2000);

    check_verdicts(&lab, &baseline).with_context(last_edits)?;
    let addresses = denied_addresses(&lab)?;
    for (server, _) in SERVERS {
        let requests = requests_from(&lab, server, &addresses)?;
        ensure!(
            requests.is_empty(),
            "{server} received requests of the denied client: {requests:?}; {}",
            last_edits()
        );
    }
    churn.restore()?;
    wait_synced(&lab)?;
    check_state_equals_fresh_daemon(&lab).with_context(last_edits)
}

/// In the access log of the servers' daemons, exactly the connections of the denied client are
/// denied.
fn check_verdicts(lab: &Lab, baseline: &Baseline) -> Result<()> {
    for (_, node) in SERVERS {
        for line in baseline.lines(lab, node)? {
            if line.field("direction") != "inbound" {
                continue;
            }
            let must_be_denied = line.field("src.workload") == "productpage";
            let is_denied = line.field("reason") == DENIED;
            ensure!(is_denied == must_be_denied, "{}", line.line);
        }
    }
    Ok(())
}

/// The edits leave no state behind: a restarted daemon, which reads the same files for the first
/// time, reports and decides the same.
fn check_state_equals_fresh_daemon(lab: &Lab) -> Result<()> {
    for (_, node) in SERVERS {
        let before = policy_state(lab, node)?;
        check_decisions(lab)?;
        lab.stop_daemon(node)?;
        lab.start_daemon(node)?;
        wait_synced(lab)?;
        let after = policy_state(lab, node)?;
        ensure!(before == after, "{}", changed_lines(&before, &after));
        check_decisions(lab)?;
    }
    Ok(())
}

/// The policies and problems that a node's daemon reports.
fn policy_state(lab: &Lab, node: &str) -> Result<String> {
    // The lab's sync markers are services without endpoints, which are reported as problems.
    let of_policies = problems(lab, node)?
        .into_iter()
        .filter(|problem| !problem.to_string().contains("marker-"));
    let state: Value = [Value::from(policies(lab, node)?), of_policies.collect()]
        .into_iter()
        .collect();
    Ok(format!("{state:#}"))
}

fn check_decisions(lab: &Lab) -> Result<()> {
    check_connections(lab, &[PRODUCTPAGE, FOO], |client, _| client == FOO)
}
