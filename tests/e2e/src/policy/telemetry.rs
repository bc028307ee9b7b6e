//! What operators see of policies: denials in the access log and metrics, and the configuration dump.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use lab::Lab;
use serde_json::Value;

use crate::access_log::{self, Entry};
use crate::metrics::{self, Sample};

/// How long a denial may take to appear. The daemon logs and counts it at once; the rest is room for
/// a busy machine.
const DEADLINE: Duration = Duration::from_secs(15);

/// The reason code of every denial.
pub const DENIED: &str = "policy_denied";

/// Denials by policy.
pub const DENIALS_TOTAL: &str = "ambit_policy_denials_total";

/// Connections that dry-run policies would have denied.
pub const DRY_RUN_DENIALS_TOTAL: &str = "ambit_policy_dry_run_denials_total";

/// Nodes whose daemons serve the connections.
const NODES: [&str; 2] = ["a", "b"];

/// A denied connection in the access log of the server's daemon: client, server, port and policy,
/// without the fields that differ from run to run.
pub type Denial = (String, String, u16, String);

/// Access log and metrics of the daemons at one time, to distinguish later events from earlier ones.
#[derive(Debug)]
pub struct Baseline {
    lines: BTreeMap<&'static str, usize>,
    samples: BTreeMap<&'static str, Vec<Sample>>,
}

impl Baseline {
    /// Records the present state of nodes `a` and `b`.
    ///
    /// # Errors
    /// A daemon does not respond.
    pub fn take(lab: &Lab) -> Result<Self> {
        let (mut lines, mut samples) = (BTreeMap::new(), BTreeMap::new());
        for node in NODES {
            lines.insert(node, access_log::lines(lab, node)?.len());
            samples.insert(node, metrics::scrape(lab, node)?);
        }
        Ok(Self { lines, samples })
    }

    /// The access-log lines of a node's daemon since the baseline.
    ///
    /// # Errors
    /// The daemon has no log.
    pub fn lines(&self, lab: &Lab, node: &str) -> Result<Vec<Entry>> {
        let before = self.lines.get(node).copied().unwrap_or_default();
        Ok(access_log::lines(lab, node)?
            .into_iter()
            .skip(before)
            .collect())
    }

    /// Inbound connections that were denied since the baseline, from the access log of the servers'
    /// daemons.
    ///
    /// # Errors
    /// There is no log, or a line has no destination.
    pub fn denials(&self, lab: &Lab) -> Result<BTreeMap<Denial, usize>> {
        let mut denials = BTreeMap::new();
        for line in self.denied_lines(lab)? {
            *denials.entry(denial(&line)?).or_insert(0) += 1;
        }
        Ok(denials)
    }

    /// The longest time in seconds that a denied connection stayed open after a change, by the clock
    /// of the servers' daemons; `None` if no connection was denied.
    ///
    /// # Errors
    /// There is no log.
    pub fn longest_open_after(&self, lab: &Lab, change: SystemTime) -> Result<Option<f64>> {
        let mut longest = None;
        for line in self.denied_lines(lab)? {
            let (Some(after), Some(duration)) =
                (line.seconds_after(change), line.duration_seconds())
            else {
                bail!("no time or duration: {}", line.line);
            };
            // A connection that was opened after the change was open for its whole duration only.
            let open = after.min(duration);
            longest = Some(open.max(longest.unwrap_or(0.0)));
        }
        Ok(longest)
    }

    fn denied_lines(&self, lab: &Lab) -> Result<Vec<Entry>> {
        let mut denied = Vec::new();
        for node in NODES {
            let lines = self.lines(lab, node)?.into_iter();
            let fields = [("direction", "inbound"), ("reason", DENIED)];
            denied.extend(lines.filter(|line| line.has(&fields)));
        }
        Ok(denied)
    }

    /// Waits until exactly these connections have been denied since the baseline: in the access log
    /// with reason and policy, and as many in the metric.
    ///
    /// # Errors
    /// They have not after 15 s; the error has the expected and the logged denials.
    pub fn wait_denials(&self, lab: &Lab, expected: &BTreeMap<Denial, usize>) -> Result<()> {
        lab.wait_until("the denials in the access log", DEADLINE, || {
            (self.denials(lab).ok()? == *expected).then_some(())
        })
        .with_context(|| {
            let logged = self.denials(lab).unwrap_or_default();
            format!("expected {expected:#?}\nlogged {logged:#?}")
        })?;
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for ((_, _, _, policy), count) in expected {
            *counts.entry(policy).or_insert(0) += count;
        }
        for (policy, count) in counts {
            self.wait_counter(lab, DENIALS_TOTAL, &[("policy", policy)], count)?;
        }
        Ok(())
    }

    /// Waits until a counter, summed over both daemons, has grown by exactly `count` since the
    /// baseline.
    ///
    /// # Errors
    /// It has not after 15 s.
    pub fn wait_counter(
        &self,
        lab: &Lab,
        name: &str,
        labels: &[(&str, &str)],
        count: usize,
    ) -> Result<()> {
        let mut last = None;
        let what = format!("{name}{labels:?} to grow by {count}");
        let result = lab.wait_until(&what, DEADLINE, || {
            last = self.increase(lab, name, labels).ok();
            (last == Some(count)).then_some(())
        });
        result.with_context(|| format!("it has grown by {last:?}"))
    }

    /// The increase of a counter since the baseline, summed over both daemons.
    fn increase(&self, lab: &Lab, name: &str, labels: &[(&str, &str)]) -> Result<usize> {
        let mut increase = 0.0;
        for (node, before) in &self.samples {
            let now = metrics::scrape(lab, node)?;
            increase += metrics::sum(&now, name, labels) - metrics::sum(before, name, labels);
        }
        // Counters of connections are small whole numbers and never decrease.
        format!("{increase:.0}").parse().context("a count")
    }
}

fn denial(line: &Entry) -> Result<Denial> {
    let pod = |side: &str| {
        let part = |name: &str| line.field(&format!("{side}.{name}")).to_owned();
        format!("{}/{}", part("namespace"), part("workload"))
    };
    // In a tunnel, dst.addr is the tunnel's destination.
    let to = match line.field("dst.hbone_addr") {
        "" => line.field("dst.addr"),
        inner => inner,
    };
    let to: SocketAddr = to
        .parse()
        .with_context(|| format!("no destination: {}", line.line))?;
    ensure!(
        line.level == "error",
        "the level is not error: {}",
        line.line
    );
    ensure!(
        !line.field("error").is_empty(),
        "no error text: {}",
        line.line
    );
    let policy = line.field("policy").to_owned();
    Ok((pod("src"), pod("dst"), to.port(), policy))
}

/// All policies in the dump of a node's daemon.
///
/// # Errors
/// The daemon does not respond, or its dump has no policies.
pub fn policies(lab: &Lab, node: &str) -> Result<Vec<Value>> {
    let dump = lab.config_dump(node)?;
    dump.get("policies")
        .and_then(Value::as_array)
        .cloned()
        .context("no policies in the dump")
}

/// One policy in the dump of a node's daemon.
///
/// # Errors
/// The dump does not have the policy; the error has all policies of the dump.
pub fn policy(lab: &Lab, node: &str, kind: &str, namespace: &str, name: &str) -> Result<Value> {
    let all = policies(lab, node)?;
    let key = [("kind", kind), ("namespace", namespace), ("name", name)];
    let is_wanted = |policy: &&Value| key.iter().all(|(key, value)| text(policy, key) == *value);
    all.iter()
        .find(is_wanted)
        .cloned()
        .with_context(|| format!("no {kind} {namespace}/{name} in {all:#?}"))
}

/// Whether a policy of the dump is enforced as written.
pub fn is_accepted(policy: &Value) -> bool {
    text(policy, "state") == "accepted"
}

/// A string field of an object in the dump; empty if it is absent.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}
