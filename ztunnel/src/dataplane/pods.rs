//! The pods of one worker: their listeners, and the task that serves each.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;

use mesh::WorkloadUid;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::listener::{Listener, accept_loop};
use crate::capture::PodListeners;
use crate::proxy::{self, PodContext};

/// A pod that is served, or one that was removed but still has connections.
pub(super) struct ServedPod {
    pub(super) context: Rc<PodContext>,
    /// The listeners that are still open.
    pub(super) open_listeners: TaskTracker,
    /// Cancelled when the pod's last connection has ended.
    pub(super) ended: CancellationToken,
}

/// The pods of one worker. A pod that was removed and added again is in it twice while its old
/// connections are open. Clones share it.
#[derive(Clone, Default)]
pub(super) struct ServedPods(Rc<RefCell<HashMap<WorkloadUid, Vec<Rc<ServedPod>>>>>);

impl ServedPods {
    pub(super) fn add(&self, pod: Rc<ServedPod>) {
        let mut pods = self.0.borrow_mut();
        pods.entry(pod.context.uid.clone()).or_default().push(pod);
    }

    /// The pods with this UID.
    pub(super) fn with_uid(&self, uid: &WorkloadUid) -> Vec<Rc<ServedPod>> {
        self.0.borrow().get(uid).cloned().unwrap_or_default()
    }

    /// All pods. A copy, so that callers do not hold the map borrowed.
    pub(super) fn contexts(&self) -> Vec<Rc<PodContext>> {
        let pods = self.0.borrow();
        let served = pods.values().flatten();
        served.map(|pod| pod.context.clone()).collect()
    }

    /// Removes the pods with this UID that have ended.
    pub(super) fn remove_ended(&self, uid: &WorkloadUid) {
        let mut pods = self.0.borrow_mut();
        if let Some(generations) = pods.get_mut(uid) {
            generations.retain(|pod| !pod.ended.is_cancelled());
            if generations.is_empty() {
                pods.remove(uid);
            }
        }
    }
}

/// One pod's listeners, registered with the worker's runtime.
pub(super) struct RegisteredListeners {
    outbound: Listener,
    inbound_plain: Listener,
    inbound_hbone: Listener,
}

impl RegisteredListeners {
    /// Registers the listeners with the runtime of this thread, and counts them in `open`.
    pub(super) fn new(listeners: PodListeners, open: &TaskTracker) -> io::Result<Self> {
        Ok(Self {
            outbound: Listener::new(listeners.outbound, open)?,
            inbound_plain: Listener::new(listeners.inbound_plain, open)?,
            inbound_hbone: Listener::new(listeners.inbound_hbone, open)?,
        })
    }
}

/// Serves a pod until it is drained or aborted and its last connection has ended.
pub(super) async fn serve(pod: Rc<PodContext>, listeners: RegisteredListeners) {
    let mut loops = JoinSet::new();
    loops.spawn_local(accept_loop(
        listeners.outbound,
        pod.clone(),
        proxy::outbound::serve,
    ));
    loops.spawn_local(accept_loop(
        listeners.inbound_plain,
        pod.clone(),
        proxy::inbound_plain::serve,
    ));
    loops.spawn_local(accept_loop(
        listeners.inbound_hbone,
        pod.clone(),
        proxy::inbound::serve,
    ));
    while loops.join_next().await.is_some() {}
    // Every connection has ended, so the pool's tunnels carry no stream.
    pod.pool.close(Instant::now()).await;
}
