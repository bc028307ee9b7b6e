//! What the agent's loop is told.

use serde_json::Value;
use tokio::sync::oneshot;

use super::program::Program;
use crate::model::Key;
use crate::model::pod::Progress;
use crate::protocol::{ProgramState, Request};

/// Where the answer to a request goes.
pub(super) type Answer = oneshot::Sender<Result<Value, String>>;

pub(super) enum Event {
    /// A request that changes or asks something; see [`super::requests`].
    Request(Request, Answer),
    /// The connection that owned the lab has ended.
    OwnerGone,
    /// The lab is to go.
    Down(Answer),
    /// How far a pod is.
    Pod {
        key: Key,
        uid: String,
        progress: Progress,
    },
    /// A pod's processes and its namespace are gone.
    PodGone { key: Key, uid: String },
    /// The state of one of our programs has changed.
    Program {
        program: Program,
        state: ProgramState,
        pid: Option<u32>,
    },
}
