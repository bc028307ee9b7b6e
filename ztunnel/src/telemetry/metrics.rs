//! The metrics that are recorded as things happen, other than traffic: Istio's names where Istio
//! has the metric, `ambit_` otherwise.

use std::time::SystemTime;

use mesh::certs::{Counters, TrustBundle};
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use spiffe::SpiffeId;

use super::denials::Denials;

pub(super) struct Metrics {
    pub(super) sockets_open: IntGaugeVec,
    pub(super) failures: IntCounterVec,
    pub(super) accept_failures: IntCounterVec,
    pub(super) policy_denials: Denials,
    pub(super) dry_run_denials: Denials,
    enrolment: IntGaugeVec,
    pub(super) capture_repairs: IntCounterVec,
    pub(super) guard_dropped: IntCounter,
    pub(super) problems: IntGauge,
    pub(super) certificates: CertificateMetrics,
    active_proxies: IntGauge,
    pending_proxies: IntGauge,
    pub(super) proxies_started: IntCounter,
    pub(super) proxies_stopped: IntCounter,
}

impl Metrics {
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counters = |name: &str, help: &str, label: &[&str]| {
            registered(registry, IntCounterVec::new(Opts::new(name, help), label)?)
        };
        let gauges = |name: &str, help: &str, label: &[&str]| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), label)?)
        };
        let gauge = |name: &str, help: &str| {
            registered(registry, IntGauge::with_opts(Opts::new(name, help))?)
        };
        let counter = |name: &str, help: &str| {
            registered(registry, IntCounter::with_opts(Opts::new(name, help))?)
        };
        let denials = |name, help| registered(registry, Denials::new(name, help)?);
        Ok(Self {
            sockets_open: gauges(
                "istio_tcp_sockets_open",
                "The number of connections open now",
                &["reporter"],
            )?,
            failures: counters(
                "ambit_connection_failures_total",
                "Connections that failed, by the reason code of the access log",
                &["direction", "reason"],
            )?,
            accept_failures: counters(
                "ambit_accept_failures_total",
                "Connections that could not be accepted",
                &["reason"],
            )?,
            policy_denials: denials(
                "ambit_policy_denials_total",
                "Connections that a policy refused or ended, by policy",
            )?,
            dry_run_denials: denials(
                "ambit_policy_dry_run_denials_total",
                "Connections that a dry-run policy (istio.io/dry-run) would have denied, by policy",
            )?,
            enrolment: gauges(
                "ambit_enrolment_pods",
                "Opted-in pods of this node, by verified state",
                &["state"],
            )?,
            capture_repairs: counters(
                "ambit_capture_repairs_total",
                "Repairs of a pod's capture, by what was wrong",
                &["reason"],
            )?,
            guard_dropped: counter(
                "ambit_guard_dropped_packets_total",
                "Plain packets between meshed pods that the node's guard dropped",
            )?,
            problems: gauge(
                "ambit_configuration_problems",
                "Objects or fields that are invalid",
            )?,
            certificates: CertificateMetrics::register(registry)?,
            active_proxies: gauge(
                "workload_manager_active_proxy_count",
                "The total number of active proxies",
            )?,
            pending_proxies: gauge(
                "workload_manager_pending_proxy_count",
                "The total number of pending proxies",
            )?,
            proxies_started: counter(
                "workload_manager_proxies_started_total",
                "The total number of proxies that were started",
            )?,
            proxies_stopped: counter(
                "workload_manager_proxies_stopped_total",
                "The total number of proxies that were stopped",
            )?,
        })
    }

    /// Sets how many pods are in each state; a state that is not named has none.
    pub(super) fn record_enrolment(&self, states: &[(&str, usize)]) {
        self.enrolment.reset();
        let (mut active, mut pending) = (0, 0);
        for (state, pods) in states {
            let pods = i64::try_from(*pods).unwrap_or(i64::MAX);
            self.enrolment.with_label_values(&[*state]).set(pods);
            match *state {
                "enrolled" => active = pods,
                "pending" => pending = pods,
                _ => {}
            }
        }
        self.active_proxies.set(active);
        self.pending_proxies.set(pending);
    }
}

/// What an alert on certificates needs, and what explains it.
pub(super) struct CertificateMetrics {
    expiry: GaugeVec,
    bundle_expiry: Gauge,
    first_issues: IntCounter,
    renewals: IntCounter,
    failures: IntCounterVec,
}

impl CertificateMetrics {
    fn register(registry: &Registry) -> prometheus::Result<Self> {
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
            first_issues: counter(
                "ambit_certificate_first_issues_total",
                "Certificates issued for identities that had none before",
            )?,
            renewals: counter(
                "ambit_certificate_renewals_total",
                "Certificates that replaced earlier ones",
            )?,
            failures: registered(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "ambit_certificate_failures_total",
                        "Failed attempts to have a certificate issued, by reason code",
                    ),
                    &["reason"],
                )?,
            )?,
        })
    }

    /// Sets when the certificate of an identity expires; none removes the identity.
    pub(super) fn record_expiry(&self, identity: &SpiffeId, expiry: Option<SystemTime>) {
        let identity = identity.to_string();
        match expiry {
            Some(expiry) => self
                .expiry
                .with_label_values(&[&identity])
                .set(unix_seconds(expiry)),
            // An identity that never had a certificate has no series to remove.
            None => drop(self.expiry.remove_label_values(&[&identity])),
        }
    }

    pub(super) fn record_bundle(&self, bundle: &TrustBundle) {
        let earliest = bundle.earliest_expiry();
        self.bundle_expiry.set(earliest.map_or(0.0, unix_seconds));
    }

    /// Raises the metrics to these counts, which never decrease.
    pub(super) fn record_counters(&self, counters: &Counters) {
        let raise = |metric: &IntCounter, count: u64| {
            metric.inc_by(count.saturating_sub(metric.get()));
        };
        raise(&self.first_issues, counters.first_issues);
        raise(&self.renewals, counters.renewals);
        for (reason, count) in &counters.failures {
            raise(&self.failures.with_label_values(&[*reason]), *count);
        }
    }
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// Registers a collector and returns it.
pub(super) fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: C,
) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}
