//! What an operator reads of a policy: denials in access log and metric, and what became of it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use lab::Lab;
use serde_json::Value;

use crate::access_log::{self, Entry};
use crate::metrics::{self, Sample};

/// A denial is told when it happens, but on a busy machine.
const TOLD: Duration = Duration::from_secs(15);

/// The reason of every denial.
pub const DENIED: &str = "policy_denied";

/// Denials by the policy that denied.
pub const DENIALS_TOTAL: &str = "ambit_policy_denials_total";

/// What dry-run policies would have denied.
pub const DRY_RUN_DENIALS_TOTAL: &str = "ambit_policy_dry_run_denials_total";

/// A denied connection as the server's daemon tells it: `client server port policy`, without what
/// differs from run to run.
pub type Denial = (String, String, u16, String);

/// A point in the life of a lab's daemons: what was logged and counted before does not matter.
#[derive(Debug)]
pub struct Baseline {
    lines: BTreeMap<&'static str, usize>,
    counts: BTreeMap<&'static str, Vec<Sample>>,
}

impl Baseline {
    /// Now, on nodes `a` and `b`.
    ///
    /// # Errors
    /// A daemon does not answer.
    pub fn take(lab: &Lab) -> Result<Self> {
        let (mut lines, mut counts) = (BTreeMap::new(), BTreeMap::new());
        for node in ["a", "b"] {
            lines.insert(node, access_log::lines(lab, node)?.len());
            counts.insert(node, metrics::scrape(lab, node)?);
        }
        Ok(Self { lines, counts })
    }

    /// The access-log lines of a node's daemon since then.
    ///
    /// # Errors
    /// It has no log.
    pub fn lines(&self, lab: &Lab, node: &str) -> Result<Vec<Entry>> {
        let before = self.lines.get(node).copied().unwrap_or_default();
        Ok(access_log::lines(lab, node)?
            .into_iter()
            .skip(before)
            .collect())
    }

    /// Inbound connections that were denied since then, as the access log of the servers' daemons
    /// has it.
    ///
    /// # Errors
    /// There is no log, or a line without a destination.
    pub fn denials(&self, lab: &Lab) -> Result<BTreeMap<Denial, usize>> {
        let mut denials = BTreeMap::new();
        for node in ["a", "b"] {
            let lines = self.lines(lab, node)?;
            let inbound = [("direction", "inbound"), ("reason", DENIED)];
            for line in lines.iter().filter(|line| line.has(&inbound)) {
                *denials.entry(denial(line)?).or_insert(0) += 1;
            }
        }
        Ok(denials)
    }

    /// How many seconds the longest-lived of the connections that were denied was open after a change, by
    /// the clock of the servers' daemons; `None` if none was denied.
    ///
    /// # Errors
    /// There is no log.
    pub fn longest_open_after(&self, lab: &Lab, change: SystemTime) -> Result<Option<f64>> {
        let mut longest = None;
        for node in ["a", "b"] {
            let lines = self.lines(lab, node)?;
            let inbound = [("direction", "inbound"), ("reason", DENIED)];
            for line in lines.iter().filter(|line| line.has(&inbound)) {
                let (Some(after), Some(duration_seconds)) =
                    (line.seconds_after(change), line.duration_seconds())
                else {
                    bail!("no time or duration: {}", line.line);
                };
                // One that was opened after the change has had less time.
                let open = after.min(duration_seconds);
                longest = Some(open.max(longest.unwrap_or(0.0)));
            }
        }
        Ok(longest)
    }

    /// Waits until exactly these connections have been denied since then, in the access log with
    /// their reason and policy, and as many in the metric.
    ///
    /// # Errors
    /// It is not so after 15 s; the error has both.
    pub fn wait_denials(&self, lab: &Lab, expected: &BTreeMap<Denial, usize>) -> Result<()> {
        lab.wait_until("the access log to tell of the denials", TOLD, || {
            (self.denials(lab).ok()? == *expected).then_some(())
        })
        .with_context(|| {
            let told = self.denials(lab).unwrap_or_default();
            format!("expected {expected:#?}\ntold {told:#?}")
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

    /// Waits until a metric has increase by exactly this much since then, over both daemons.
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
        let counted = lab.wait_until(
            &format!("{name}{labels:?} to grow by {count}"),
            TOLD,
            || {
                last = self.increase(lab, name, labels).ok();
                (last == Some(count)).then_some(())
            },
        );
        counted.with_context(|| format!("it has increase by {last:?}"))
    }

    /// By how much a metric has increase since then, over both daemons.
    ///
    /// # Errors
    /// A daemon does not answer.
    pub fn increase(&self, lab: &Lab, name: &str, labels: &[(&str, &str)]) -> Result<usize> {
        let mut increase = 0.0;
        for (node, before) in &self.counts {
            let now = metrics::scrape(lab, node)?;
            increase += metrics::sum(&now, name, labels) - metrics::sum(before, name, labels);
        }
        // Counters of connections are whole, small, and do not shrink.
        format!("{increase:.0}").parse().context("a count")
    }
}

fn denial(line: &Entry) -> Result<Denial> {
    let pod = |side: &str| {
        let part = |what: &str| line.field(&format!("{side}.{what}")).to_owned();
        format!("{}/{}", part("namespace"), part("workload"))
    };
    // With a tunnel dst.addr is the tunnel's.
    let to = match line.field("dst.hbone_addr") {
        "" => line.field("dst.addr"),
        inner => inner,
    };
    let to: std::net::SocketAddr = to
        .parse()
        .with_context(|| format!("no destination: {}", line.line))?;
    ensure!(line.level == "error", "not an error: {}", line.line);
    ensure!(
        !line.field("error").is_empty(),
        "nothing is said: {}",
        line.line
    );
    let policy = line.field("policy").to_owned();
    Ok((pod("src"), pod("dst"), to.port(), policy))
}

/// What a node's daemon says of each policy.
///
/// # Errors
/// It does not answer, or says nothing of policies.
pub fn policies(lab: &Lab, node: &str) -> Result<Vec<Value>> {
    let dump = lab.config_dump(node)?;
    dump.get("policies")
        .and_then(Value::as_array)
        .cloned()
        .context("no policies in the dump")
}

/// A text in an object of the dump; empty if it is not there.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// What a node's daemon says of one policy.
///
/// # Errors
/// It says nothing; the error has what it says of others.
pub fn policy(lab: &Lab, node: &str, kind: &str, namespace: &str, name: &str) -> Result<Value> {
    let all = policies(lab, node)?;
    let wanted = [("kind", kind), ("namespace", namespace), ("name", name)];
    all.iter()
        .find(|policy| {
            wanted
                .iter()
                .all(|(key, value)| text(policy, key) == *value)
        })
        .cloned()
        .with_context(|| format!("no {kind} {namespace}/{name} in {all:#?}"))
}

/// Runs the same question in several pods at once: each thread asks for one client.
///
/// # Errors
/// The first of them.
pub fn in_parallel<T: Send, R: Send>(
    of: impl IntoIterator<Item = T>,
    ask: impl Fn(T) -> Result<Vec<R>> + Sync,
) -> Result<Vec<R>> {
    let ask = &ask;
    std::thread::scope(|scope| {
        let threads: Vec<_> = of
            .into_iter()
            .map(|one| scope.spawn(move || ask(one)))
            .collect();
        let mut all = Vec::new();
        for thread in threads {
            let answers = thread
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            all.extend(answers?);
        }
        Ok(all)
    })
}

/// Whether a policy of the dump is in force as it is written.
pub fn is_accepted(policy: &Value) -> bool {
    text(policy, "state") == "accepted"
}
