//! When each identity had a valid certificate, recorded from the daemons' metrics.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lab::Lab;

use crate::metrics;

/// The metric with the expiry of each identity's certificate.
const EXPIRY: &str = "ambit_certificate_expiry_timestamp_seconds";

/// How often the metric is read.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);

/// The certificates of each identity in the order in which they were issued.
#[derive(Debug, Default)]
pub struct CertTimeline(BTreeMap<String, Vec<Certificate>>);

/// One certificate. All times are Unix times in seconds.
#[derive(Debug, Clone, Copy)]
struct Certificate {
    first_seen: f64,
    expires: f64,
}

impl CertTimeline {
    /// Records the daemons of these nodes until [`TimelineRecorder::stop`].
    pub fn record<'scope>(
        scope: &'scope Scope<'scope, '_>,
        lab: &'scope Lab,
        nodes: &'scope [&'scope str],
    ) -> TimelineRecorder<'scope> {
        let (stop, stopped) = channel::<()>();
        let run = move || {
            let mut timeline = Self::default();
            loop {
                for node in nodes {
                    // A daemon that does not respond has no new certificate.
                    let scrape = metrics::scrape(lab, node).unwrap_or_default();
                    timeline.add(&scrape, unix_now());
                }
                if stopped.recv_timeout(SAMPLE_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return timeline;
                }
            }
        };
        let thread = scope.spawn(run);
        TimelineRecorder { stop, thread }
    }

    fn add(&mut self, scrape: &[metrics::Sample], first_seen: f64) {
        for sample in scrape.iter().filter(|sample| sample.name == EXPIRY) {
            let Some(identity) = sample.labels.get("identity") else {
                continue;
            };
            let expires = sample.value;
            let all = self.0.entry(identity.clone()).or_default();
            if all.last().is_none_or(|last| last.expires < expires) {
                all.push(Certificate {
                    first_seen,
                    expires,
                });
            }
        }
    }

    /// The periods without a valid certificate: from an expiry until the next certificate was seen.
    pub fn gaps(&self, identity: &str) -> Vec<Range<f64>> {
        let all = self.0.get(identity).map(Vec::as_slice).unwrap_or_default();
        all.windows(2)
            .filter(|pair| pair[1].first_seen > pair[0].expires)
            .map(|pair| pair[0].expires..pair[1].first_seen)
            .collect()
    }

    /// How many certificates of the identity were seen.
    pub fn certificate_count(&self, identity: &str) -> usize {
        self.0.get(identity).map_or(0, Vec::len)
    }
}

/// Records a [`CertTimeline`] on a thread.
#[derive(Debug)]
pub struct TimelineRecorder<'scope> {
    stop: Sender<()>,
    thread: ScopedJoinHandle<'scope, CertTimeline>,
}

impl TimelineRecorder<'_> {
    /// Stops recording and returns the timeline.
    ///
    /// # Panics
    /// The recording thread has panicked.
    pub fn stop(self) -> CertTimeline {
        drop(self.stop);
        match self.thread.join() {
            Ok(timeline) => timeline,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Unix time in seconds.
pub fn unix_now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gap_lasts_from_an_expiry_to_the_next_certificate() {
        let mut timeline = CertTimeline::default();
        let scrape =
            |expires: u32| metrics::parse(&format!("{EXPIRY}{{identity=\"i\"}} {expires}"));
        for (first_seen, expires) in [(0.0, 20), (10.0, 30), (25.0, 30), (34.0, 54), (44.0, 64)] {
            timeline.add(&scrape(expires), first_seen);
        }
        assert_eq!(timeline.gaps("i"), [30.0..34.0]);
        assert_eq!(timeline.certificate_count("i"), 4);
        assert!(timeline.gaps("other").is_empty());
    }
}
