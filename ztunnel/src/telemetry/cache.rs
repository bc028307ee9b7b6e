//! A worker's own index of the series that its connections count in.

use std::sync::Arc;

use mesh::{Service, Workload, WorkloadUid};
use rustc_hash::FxHashMap;

use super::labels::Parties;
use super::traffic::{Series, Traffic};
use crate::dataplane::Direction;

/// Label sets that one worker keeps at hand. A node's pods talk to fewer peers than this; past it
/// the index starts afresh, which costs each label set one build.
const ENTRIES: usize = 4096;

/// What names a label set cheaply. An address names one version of one object, and cannot be reused
/// while the entry holds it.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    reporter: Direction,
    source: usize,
    destination: usize,
    service: usize,
    source_proven: bool,
    mutual_tls: bool,
}

struct Entry {
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    // Held so that its address, which is part of the key, stays its own.
    _service: Option<Arc<Service>>,
    series: Arc<Series>,
}

/// The index of one worker.
#[derive(Default)]
pub(super) struct Cache {
    entries: FxHashMap<Key, Entry>,
}

impl Cache {
    /// The series for these parties: one hash of six words when they have met before.
    pub(super) fn series(&mut self, traffic: &Traffic, parties: &Parties) -> Arc<Series> {
        // Only an identity that is the known workload's own is implied by the key; a stranger's is
        // looked up in full.
        let source_known = match (&parties.source, &parties.source_identity) {
            (Some(source), Some(proven)) => source.identity == **proven,
            (_, None) => true,
            (None, Some(_)) => false,
        };
        if !source_known {
            return traffic.series(parties);
        }
        let key = Key {
            reporter: parties.reporter,
            source: address(parties.source.as_ref()),
            destination: address(parties.destination.as_ref()),
            service: address(parties.service.as_ref()),
            source_proven: parties.source_identity.is_some(),
            mutual_tls: parties.mutual_tls,
        };
        if let Some(entry) = self.entries.get(&key) {
            return entry.series.clone();
        }
        if self.entries.len() >= ENTRIES {
            self.entries.clear();
        }
        let series = traffic.series(parties);
        let entry = Entry {
            source: parties.source.clone(),
            destination: parties.destination.clone(),
            _service: parties.service.clone(),
            series: series.clone(),
        };
        self.entries.insert(key, entry);
        series
    }

    /// Forgets everything about a workload that is gone.
    pub(super) fn forget(&mut self, uid: &WorkloadUid) {
        let is = |workload: &Option<Arc<Workload>>| {
            workload
                .as_ref()
                .is_some_and(|workload| workload.uid == *uid)
        };
        self.entries
            .retain(|_, entry| !is(&entry.source) && !is(&entry.destination));
    }
}

fn address<T>(of: Option<&Arc<T>>) -> usize {
    of.map_or(0, |of| Arc::as_ptr(of).addr())
}
