//! The daemon's metrics, read as Prometheus reads them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Lab;

/// How long after an event its count may take to appear.
const DEADLINE: Duration = Duration::from_secs(15);

/// One sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

impl Sample {
    /// Whether it is of this metric and has all of these labels with these values.
    pub fn is(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        let has = |(key, value): &(&str, &str)| self.labels.get(*key).is_some_and(|v| v == value);
        self.name == name && labels.iter().all(has)
    }
}

/// The samples of a scrape in Prometheus' text form.
pub fn parse(text: &str) -> Vec<Sample> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(sample)
        .collect()
}

fn sample(line: &str) -> Option<Sample> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let value = value.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels: pairs(labels.trim_end_matches('}')),
        value,
    })
}

/// `key="value",...`; no value that the daemon writes has an escaped quote in it.
fn pairs(labels: &str) -> BTreeMap<String, String> {
    let mut pairs = BTreeMap::new();
    let mut rest = labels;
    while let Some((key, quoted)) = rest.split_once("=\"") {
        let (value, after) = quoted.split_once('"').unwrap_or((quoted, ""));
        pairs.insert(key.trim_start_matches(',').to_owned(), value.to_owned());
        rest = after;
    }
    pairs
}

/// A scrape of one node's daemon.
///
/// # Errors
/// It does not answer.
pub fn scrape(lab: &Lab, node: &str) -> Result<Vec<Sample>> {
    Ok(parse(&lab.metrics(node)?))
}

/// The sum of a metric over all series with these labels.
pub fn sum(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    samples
        .iter()
        .filter(|sample| sample.is(name, labels))
        .map(|sample| sample.value)
        .sum()
}

/// Waits until a metric, summed over all series with these labels, is at min `min`; returns it.
///
/// # Errors
/// It is not after 15 s; the error shows the metric's series.
pub fn wait(lab: &Lab, node: &str, name: &str, labels: &[(&str, &str)], min: f64) -> Result<f64> {
    let what = format!("{name}{labels:?} of node {node} to be {min}");
    lab.wait_until(&what, DEADLINE, || {
        let value = sum(&scrape(lab, node).ok()?, name, labels);
        (value >= min).then_some(value)
    })
    .with_context(|| {
        let text = lab.metrics(node).unwrap_or_default();
        let lines: Vec<_> = text.lines().filter(|line| line.starts_with(name)).collect();
        format!("its series are\n{}", lines.join("\n"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_and_without_labels() {
        let all = parse("# TYPE a counter\na{x=\"1, 2\",y=\"u\"} 3\na{x=\"9\",y=\"u\"} 4\nb 0.5\n");
        assert!((sum(&all, "a", &[("y", "u")]) - 7.0).abs() < 1e-9);
        assert!((sum(&all, "a", &[("x", "1, 2")]) - 3.0).abs() < 1e-9);
        assert!((sum(&all, "b", &[]) - 0.5).abs() < 1e-9);
    }
}
