//! Counts denials by policy, with a bound on the number of series.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, LabelPair, Metric, MetricFamily};
use rustc_hash::FxHashMap;

use super::traffic::counter_family;

/// Policies that can have a series at a time. Few policies deny anything. Above the limit denials
/// count under [`OTHERS`], so that thousands of short-lived policies cannot exhaust the memory of
/// the daemon and of its scraper.
const MAX_SERIES: usize = 1000;

/// The label of policies without a series of their own. No policy has this label: a policy's label
/// starts with its kind.
const OTHERS: &str = "others";

/// One counter with the label `policy`. Clones share it.
///
/// Counting takes a lock, which is cheap enough: a denial is rare and ends a connection, and
/// allowed connections are not counted here.
#[derive(Clone)]
pub(super) struct Denials {
    name: &'static str,
    help: &'static str,
    desc: Desc,
    counts: Arc<Mutex<FxHashMap<Arc<str>, Entry>>>,
}

struct Entry {
    count: u64,
    /// Consecutive sweeps since the last denial.
    idle_sweeps: u32,
}

impl Denials {
    pub(super) fn new(name: &'static str, help: &'static str) -> prometheus::Result<Self> {
        let labels = vec!["policy".to_owned()];
        Ok(Self {
            name,
            help,
            desc: Desc::new(name.into(), help.into(), labels, HashMap::new())?,
            counts: Arc::default(),
        })
    }

    /// Counts one denial by this policy.
    pub(super) fn count(&self, policy: &Arc<str>) {
        let mut counts = self.lock();
        let policy = if counts.len() < MAX_SERIES || counts.contains_key(policy) {
            policy.clone()
        } else {
            OTHERS.into()
        };
        let entry = counts.entry(policy).or_insert(Entry {
            count: 0,
            idle_sweeps: 0,
        });
        entry.count += 1;
        entry.idle_sweeps = 0;
    }

    /// Drops the series of policies that denied nothing for `max_idle` consecutive calls, such as
    /// deleted ones.
    pub(super) fn sweep(&self, max_idle: u32) {
        self.lock().retain(|_, entry| {
            entry.idle_sweeps += 1;
            entry.idle_sweeps <= max_idle
        });
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<Arc<str>, Entry>> {
        // No statement leaves the map half changed, so a poisoned lock is safe to use.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Denials {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let counts = self.lock();
        if counts.is_empty() {
            return Vec::new();
        }
        let metrics = counts.iter().map(|(policy, entry)| metric(policy, entry));
        vec![counter_family(self.name, self.help, metrics.collect())]
    }
}

fn metric(policy: &str, entry: &Entry) -> Metric {
    let mut label = LabelPair::default();
    label.set_name("policy".into());
    label.set_value(policy.into());
    let mut metric = Metric::from_label(vec![label]);
    let mut counter = Counter::default();
    // A Prometheus sample is a float; counts stay exact up to 2^53.
    #[allow(clippy::cast_precision_loss)]
    counter.set_value(entry.count as f64);
    metric.set_counter(counter);
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    fn denials() -> Denials {
        Denials::new("denials_total", "Denials").unwrap()
    }

    fn value(denials: &Denials, policy: &str) -> Option<f64> {
        let families = denials.collect();
        let metrics = families.first()?.get_metric();
        let of_policy = metrics
            .iter()
            .find(|metric| metric.get_label()[0].value() == policy)?;
        Some(of_policy.get_counter().get_value())
    }

    #[test]
    fn each_policy_counts_its_own_denials() {
        let denials = denials();
        assert!(denials.collect().is_empty());
        denials.count(&"AuthorizationPolicy shop/a".into());
        denials.count(&"AuthorizationPolicy shop/a".into());
        denials.count(&"AuthorizationPolicy shop/b".into());
        assert_eq!(value(&denials, "AuthorizationPolicy shop/a"), Some(2.0));
        assert_eq!(value(&denials, "AuthorizationPolicy shop/b"), Some(1.0));
    }

    #[test]
    fn idle_policy_leaves_the_scrape_and_active_policy_stays() {
        let denials = denials();
        let (idle, active) = ("idle".into(), "active".into());
        denials.count(&idle);
        denials.count(&active);
        for _ in 0..3 {
            denials.sweep(2);
            denials.count(&active);
        }
        assert_eq!(value(&denials, "idle"), None);
        assert_eq!(value(&denials, "active"), Some(4.0));
    }

    #[test]
    fn policies_above_the_series_limit_share_one_series() {
        let denials = denials();
        for number in 0..MAX_SERIES + 5 {
            denials.count(&format!("policy {number}").into());
        }
        denials.count(&"policy 0".into());
        assert_eq!(value(&denials, OTHERS), Some(5.0));
        assert_eq!(value(&denials, "policy 0"), Some(2.0));
        assert_eq!(denials.lock().len(), MAX_SERIES + 1);
    }
}
