//! The pods of one worker.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use mesh::WorkloadUid;
use tokio_util::sync::CancellationToken;

use super::pod::PodContext;

/// A pod that is served, or one that left but still has connections.
pub(super) struct Served {
    pub(super) context: Rc<PodContext>,
    pub(super) ended: CancellationToken,
}

/// Everything that is served, shared by the worker and its re-check. A pod that left and came back
/// is there twice while its old connections live.
#[derive(Clone, Default)]
pub(super) struct Pods(Rc<RefCell<HashMap<WorkloadUid, Vec<Rc<Served>>>>>);

impl Pods {
    pub(super) fn add(&self, uid: WorkloadUid, served: Rc<Served>) {
        self.0.borrow_mut().entry(uid).or_default().push(served);
    }

    pub(super) fn of(&self, uid: &WorkloadUid) -> Vec<Rc<Served>> {
        self.0.borrow().get(uid).cloned().unwrap_or_default()
    }

    /// A copy, so that nothing is done while the map is borrowed.
    pub(super) fn all(&self) -> Vec<Rc<PodContext>> {
        let pods = self.0.borrow();
        let served = pods.values().flatten();
        served.map(|served| served.context.clone()).collect()
    }

    /// Lets go what of this pod has ended.
    pub(super) fn forget_ended(&self, uid: &WorkloadUid) {
        let mut pods = self.0.borrow_mut();
        if let Some(generations) = pods.get_mut(uid) {
            generations.retain(|served| !served.ended.is_cancelled());
            if generations.is_empty() {
                pods.remove(uid);
            }
        }
    }
}
