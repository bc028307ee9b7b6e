//! What policies denied: one series per policy that denies, with a bound on how many there can be.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, LabelPair, Metric, MetricFamily};
use rustc_hash::FxHashMap;

use super::traffic::family;

/// Policies that can have a series at a time. Those that deny something are a few; past it denials
/// count under [`OTHERS`], so that policies that come and go by the thousand under ever new names
/// cannot fill the memory of the daemon and of whoever scrapes it.
const SERIES: usize = 1000;

/// The label of what has no series of its own. No policy is called so: a policy's label names its
/// kind first.
const OTHERS: &str = "others";

/// One counter with the label `policy`. Clones share it.
///
/// Counting takes a lock, because a denial is rare and ends a connection; what is allowed never
/// comes here.
#[derive(Clone)]
pub(super) struct Denials {
    name: &'static str,
    help: &'static str,
    desc: Desc,
    counts: Arc<Mutex<FxHashMap<Arc<str>, Held>>>,
}

/// A count, and for how many sweeps in a row nothing was added to it.
struct Held {
    count: u64,
    idle: u32,
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
        let policy = if counts.len() < SERIES || counts.contains_key(policy) {
            policy.clone()
        } else {
            OTHERS.into()
        };
        let held = counts.entry(policy).or_insert(Held { count: 0, idle: 0 });
        held.count += 1;
        held.idle = 0;
    }

    /// Drops the series of policies that have denied nothing for `sweeps` calls in a row, which is
    /// what a policy does that no longer exists.
    pub(super) fn sweep(&self, sweeps: u32) {
        self.lock().retain(|_, held| {
            held.idle += 1;
            held.idle <= sweeps
        });
    }

    fn lock(&self) -> MutexGuard<'_, FxHashMap<Arc<str>, Held>> {
        // The map is whole between any two statements, so a panic elsewhere has not broken it.
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
        let metrics = counts.iter().map(|(policy, held)| metric(policy, held));
        vec![family(self.name, self.help, metrics.collect())]
    }
}

fn metric(policy: &str, held: &Held) -> Metric {
    let mut label = LabelPair::default();
    label.set_name("policy".into());
    label.set_value(policy.into());
    let mut metric = Metric::from_label(vec![label]);
    let mut counter = Counter::default();
    // A Prometheus sample is a float; counts stay exact up to 2^53.
    #[allow(clippy::cast_precision_loss)]
    counter.set_value(held.count as f64);
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
    fn each_policy_counts_what_it_denied() {
        let denials = denials();
        assert!(denials.collect().is_empty());
        denials.count(&"AuthorizationPolicy shop/a".into());
        denials.count(&"AuthorizationPolicy shop/a".into());
        denials.count(&"AuthorizationPolicy shop/b".into());
        assert_eq!(value(&denials, "AuthorizationPolicy shop/a"), Some(2.0));
        assert_eq!(value(&denials, "AuthorizationPolicy shop/b"), Some(1.0));
    }

    #[test]
    fn a_policy_that_denies_no_more_leaves_the_scrape_and_one_that_does_stays() {
        let denials = denials();
        let (gone, here) = ("gone".into(), "here".into());
        denials.count(&gone);
        denials.count(&here);
        for _ in 0..3 {
            denials.sweep(2);
            denials.count(&here);
        }
        assert_eq!(value(&denials, "gone"), None);
        assert_eq!(value(&denials, "here"), Some(4.0));
    }

    #[test]
    fn policies_under_ever_new_names_share_one_series() {
        let denials = denials();
        for number in 0..SERIES + 5 {
            denials.count(&format!("policy {number}").into());
        }
        denials.count(&"policy 0".into());
        assert_eq!(value(&denials, OTHERS), Some(5.0));
        assert_eq!(value(&denials, "policy 0"), Some(2.0));
        assert_eq!(denials.lock().len(), SERIES + 1);
    }
}
