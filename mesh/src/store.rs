//! The store: the current model, read without a lock.

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
/// An update replaces only what changed: entries that say the same stay the same allocation, and a
/// workload keeps its load counter through every change of what it says.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    model: ArcSwap<Model>,
    /// Held by writers only, so that each builds on the one before.
    writer: Mutex<()>,
    version: watch::Sender<u64>,
}

/// A model as it was at one moment, held cheaply. Keep it for one decision; for longer use
/// [`Store::model`].
#[derive(Debug)]
pub struct Snapshot(Guard<Arc<Model>>);

impl Deref for Snapshot {
    type Target = Model;
    fn deref(&self) -> &Model {
        &self.0
    }
}

/// What an update changed. All lists are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Workloads that are new.
    pub added: Vec<WorkloadUid>,
    /// Workloads that are gone.
    pub removed: Vec<WorkloadUid>,
    /// Workloads that are the same pod but say something else.
    pub changed: Vec<WorkloadUid>,
    /// Services that are new, gone or different.
    pub services: Vec<ServiceName>,
    /// Nodes that are new, gone or different.
    pub nodes: Vec<Arc<str>>,
    /// Namespaces that are new, gone or different.
    pub namespaces: Vec<Arc<str>>,
    /// Policies that are new, gone or different, in themselves or in whom they select.
    pub policies: Vec<ObjectRef>,
    /// The refused addresses are others.
    pub refusals: bool,
    /// The list of diagnostics is another one.
    pub diagnostics: bool,
}

impl Changes {
    /// Nothing changed.
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

    /// Tells of every change; the value counts them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// Replaces the model by what `compile` made and says what that changed. Subscribers are woken
    /// only if something did.
    pub fn apply(&self, model: Model, diagnostics: Vec<Diagnostic>) -> Changes {
        // The lock guards no data, so a writer that panicked left nothing half done.
        let _writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.model();
        let (mut model, mut changes) = reconcile::reconcile(&old, model);
        changes.diagnostics = *old.diagnostics != diagnostics;
        model.diagnostics = if changes.diagnostics {
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
