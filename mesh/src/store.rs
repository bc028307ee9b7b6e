//! The store: holds the current model, which readers load without a lock.

mod reconcile;

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::diagnostic::Diagnostic;
use crate::id::ObjectRef;
use crate::id::{ServiceName, WorkloadUid};
use crate::model::Model;

/// The current [`Model`]. Clones share it.
///
/// An update replaces only what changed: equal entries stay the same allocation, and a workload keeps
/// its load counter when it changes.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    model: ArcSwap<Model>,
    /// Serializes writers, so that each builds on the model before.
    writer: Mutex<()>,
    version: watch::Sender<u64>,
}

/// The model at one moment. Cheap to load; keep it for one decision only, and use [`Store::model`]
/// for longer.
#[derive(Debug)]
pub struct Snapshot(Guard<Arc<Model>>);

impl Deref for Snapshot {
    type Target = Model;
    fn deref(&self) -> &Model {
        &self.0
    }
}

/// The changes of an update. All lists are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Workloads that are new.
    pub added: Vec<WorkloadUid>,
    /// Workloads that are gone.
    pub removed: Vec<WorkloadUid>,
    /// Workloads of the same pod with other content.
    pub changed: Vec<WorkloadUid>,
    /// Services that are new, gone or different.
    pub services: Vec<ServiceName>,
    /// Nodes that are new, gone or different.
    pub nodes: Vec<Arc<str>>,
    /// Namespaces that are new, gone or different.
    pub namespaces: Vec<Arc<str>>,
    /// Policies that are new, gone or different, or select other workloads.
    pub policies: Vec<ObjectRef>,
    /// The refused addresses changed.
    pub refusals_changed: bool,
    /// The diagnostics changed.
    pub diagnostics_changed: bool,
}

impl Changes {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }
}

impl Store {
    /// A store that holds the empty model.
    pub fn new() -> Self {
        Self(Arc::new(Inner {
            model: ArcSwap::from_pointee(Model::default()),
            writer: Mutex::new(()),
            version: watch::Sender::new(0),
        }))
    }

    /// The current model, for one decision. Takes no lock.
    pub fn load(&self) -> Snapshot {
        Snapshot(self.0.model.load())
    }

    /// The current model, to keep.
    pub fn model(&self) -> Arc<Model> {
        self.0.model.load_full()
    }

    /// A receiver of every change; the value counts them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// Replaces the model by a compiled one and returns the changes. Notifies subscribers only if there
    /// are any.
    pub fn apply(&self, model: Model, diagnostics: Vec<Diagnostic>) -> Changes {
        // The lock guards no data, so a panic of another writer left nothing inconsistent.
        let _writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.model();
        let (mut model, mut changes) = reconcile::reconcile(&old, model);
        changes.diagnostics_changed = *old.diagnostics != diagnostics;
        model.diagnostics = if changes.diagnostics_changed {
            Arc::new(diagnostics)
        } else {
            old.diagnostics.clone()
        };
        if !changes.is_empty() {
            self.0.model.store(Arc::new(model));
            self.0.version.send_modify(|version| *version += 1);
        }
        changes
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
