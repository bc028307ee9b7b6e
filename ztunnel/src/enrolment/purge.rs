//! Tunnels to pods that no longer exist are forgotten, so that an address that comes back as
//! another pod never meets one.

use std::sync::Arc;

use mesh::{Store, WorkloadUid};
use tokio_util::sync::CancellationToken;

use crate::dataplane::DataPlane;

/// Follows the store and purges, from every pool of this node, the workloads that vanish from it;
/// until cancelled.
pub async fn purge_removed(store: Store, data_plane: Arc<DataPlane>, stop: CancellationToken) {
    let mut changed = store.subscribe();
    let mut before = store.model();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
        }
        let now = store.model();
        let removed: Vec<WorkloadUid> = before
            .workloads()
            .filter(|workload| now.workload(&workload.uid).is_none())
            .map(|workload| workload.uid.clone())
            .collect();
        before = now;
        for uid in removed {
            if let Err(error) = data_plane.purge(&uid).await {
                let error = &error as &dyn std::error::Error;
                tracing::error!(workload = %uid, error, "tunnels to it may live on");
            }
        }
    }
}
