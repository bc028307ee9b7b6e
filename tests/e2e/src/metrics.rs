//! Reads the daemons' metrics in the Prometheus text format.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Lab;

/// How long the count of an event may take to appear.
const DEADLINE: Duration = Duration::from_secs(15);

/// One sample of a metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The name of the metric.
    pub name: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The value.
    pub value: f64,
}

impl Sample {
    /// Whether the sample belongs to this metric and has all of these labels.
    pub fn matches(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        let has = |(key, value): &(&str, &str)| self.labels.get(*key).is_some_and(|v| v == value);
        self.name == name && labels.iter().all(has)
    }
}

/// Parses a scrape in the Prometheus text format.
pub fn parse(text: &str) -> Vec<Sample> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(parse_sample)
        .collect()
}

fn parse_sample(line: &str) -> Option<Sample> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let value = value.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels: parse_labels(labels.trim_end_matches('}')),
        value,
    })
}

/// Parses `key="value",...`. The daemons write no value with an escaped quote.
fn parse_labels(labels: &str) -> BTreeMap<String, String> {
    let mut parsed = BTreeMap::new();
    let mut rest = labels;
    while let Some((key, quoted)) = rest.split_once("=\"") {
        let (value, after) = quoted.split_once('"').unwrap_or((quoted, ""));
        parsed.insert(key.trim_start_matches(',').to_owned(), value.to_owned());
        rest = after;
    }
    parsed
}

/// Scrapes the daemon of a node.
///
/// # Errors
/// The daemon does not respond.
pub fn scrape(lab: &Lab, node: &str) -> Result<Vec<Sample>> {
    Ok(parse(&lab.metrics(node)?))
}

/// The sum of a metric over all series with these labels.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    samples
        .iter()
        .filter(|sample| sample.matches(name, labels))
        .map(|sample| sample.value)
        .sum()
}

/// Waits until a metric, summed over all series with these labels, is at least `min`. Returns the sum.
///
/// # Errors
/// The sum is less after 15 s; the error has the metric's series.
pub fn wait(lab: &Lab, node: &str, name: &str, labels: &[(&str, &str)], min: f64) -> Result<f64> {
    let what = format!("{name}{labels:?} of node {node} to be at least {min}");
    lab.wait_until(&what, DEADLINE, || {
        let value = sum(&scrape(lab, node).ok()?, name, labels);
        (value >= min).then_some(value)
    })
    .with_context(|| {
        let text = lab.metrics(node).unwrap_or_default();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with(name)).collect();
        format!("the series are\n{}", lines.join("\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_with_and_without_labels_are_parsed() {
        let samples =
            parse("# TYPE a counter\na{x=\"1, 2\",y=\"u\"} 3\na{x=\"9\",y=\"u\"} 4\nb 0.5\n");
        assert!((sum(&samples, "a", &[("y", "u")]) - 7.0).abs() < 1e-9);
        assert!((sum(&samples, "a", &[("x", "1, 2")]) - 3.0).abs() < 1e-9);
        assert!((sum(&samples, "b", &[]) - 0.5).abs() < 1e-9);
    }
}
