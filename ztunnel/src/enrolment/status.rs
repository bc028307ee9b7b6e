//! What is known, and was verified, of each pod of this node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh::WorkloadUid;

/// Where a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodState {
    /// It opted in and is not in the mesh yet, or not any more; the reason says why.
    Pending,
    /// Its capture and its listeners were seen to stand at the last verification.
    Enrolled,
    /// It opted out; connections from before are still open.
    Leaving,
}

impl PodState {
    /// Stable name, in the admin dump and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            PodState::Pending => "pending",
            PodState::Enrolled => "enrolled",
            PodState::Leaving => "leaving",
        }
    }
}

/// One pod's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// Where it stands.
    pub state: PodState,
    /// Why it is not enrolled: a stable code.
    pub reason: Option<&'static str>,
    /// The same for people.
    pub message: Option<String>,
    /// Since when it has been in this state.
    pub since: SystemTime,
    /// The path of its network namespace, once found.
    pub netns: Option<String>,
    /// How often its capture was repaired.
    pub repairs: u64,
}

/// The states of all pods of this node that are in the mesh or on their way in or out.
pub type Statuses = Arc<BTreeMap<WorkloadUid, PodStatus>>;
