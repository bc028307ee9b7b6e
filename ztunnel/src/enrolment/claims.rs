//! One namespace, one pod: whoever comes second is refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::WorkloadUid;

use crate::netns::NetnsId;

/// Which pod each namespace belongs to. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims(Arc<Mutex<HashMap<NetnsId, WorkloadUid>>>);

/// A namespace that is one pod's for as long as this lives.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Claims,
    netns: NetnsId,
}

impl Claims {
    /// Claims a namespace for a pod.
    ///
    /// # Errors
    /// Fails with the pod that has it.
    pub(super) fn claim(&self, netns: NetnsId, pod: &WorkloadUid) -> Result<Claim, WorkloadUid> {
        let mut owners = self.lock();
        match owners.get(&netns) {
            Some(owner) => Err(owner.clone()),
            None => {
                owners.insert(netns, pod.clone());
                Ok(Claim {
                    claims: self.clone(),
                    netns,
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NetnsId, WorkloadUid>> {
        // Every change is one call, so a panic elsewhere cannot have left half of one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.lock().remove(&self.netns);
    }
}
