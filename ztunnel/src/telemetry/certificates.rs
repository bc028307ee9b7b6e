//! The certificates' metrics: what an alert on them needs, and an explanation when it fires.

use std::time::SystemTime;

use mesh::certs::{Counters, TrustBundle};
use prometheus::{Gauge, GaugeVec, IntCounter, IntCounterVec, Opts, Registry};
use spiffe::SpiffeId;

use super::metrics::registered;

pub(super) struct Certificates {
    expiry: GaugeVec,
    bundle_expiry: Gauge,
    issued: IntCounter,
    renewals: IntCounter,
    failures: IntCounterVec,
}

impl Certificates {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| registered(registry, IntCounter::new(name, help)?);
        Ok(Self {
            expiry: registered(
                registry,
                GaugeVec::new(
                    Opts::new(
                        "ambit_certificate_expiry_timestamp_seconds",
                        "When the identity's certificate expires (Unix time)",
                    ),
                    &["identity"],
                )?,
            )?,
            bundle_expiry: registered(
                registry,
                Gauge::new(
                    "ambit_trust_bundle_expiry_timestamp_seconds",
                    "When the first root of the trust bundle expires (Unix time); 0 without a bundle",
                )?,
            )?,
            issued: counter(
                "ambit_certificate_first_issues_total",
                "Certificates that were issued for identities that had none before",
            )?,
            renewals: counter(
                "ambit_certificate_renewals_total",
                "Certificates that took the place of earlier ones",
            )?,
            failures: registered(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "ambit_certificate_failures_total",
                        "Attempts to have a certificate issued that failed, by reason code",
                    ),
                    &["reason"],
                )?,
            )?,
        })
    }

    /// An identity's certificate expires then, or there is none.
    pub(super) fn expiry(&self, identity: &SpiffeId, expiry: Option<SystemTime>) {
        let identity = identity.to_string();
        match expiry {
            Some(expiry) => self
                .expiry
                .with_label_values(&[&identity])
                .set(seconds(expiry)),
            // There may have been none.
            None => drop(self.expiry.remove_label_values(&[&identity])),
        }
    }

    pub(super) fn bundle(&self, bundle: &TrustBundle) {
        let earliest = bundle.earliest_expiry();
        self.bundle_expiry.set(earliest.map_or(0.0, seconds));
    }

    /// Takes over counts, which only grow.
    pub(super) fn counters(&self, counters: &Counters) {
        let catch_up = |counter: &IntCounter, count: u64| {
            counter.inc_by(count.saturating_sub(counter.get()));
        };
        catch_up(&self.issued, counters.first_issues);
        catch_up(&self.renewals, counters.renewals);
        for (reason, count) in &counters.failures {
            catch_up(&self.failures.with_label_values(&[*reason]), *count);
        }
    }
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}
