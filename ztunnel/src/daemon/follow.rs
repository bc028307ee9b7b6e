//! Tasks that follow the model: one purges the tunnels to deleted workloads, one publishes the
//! number of problems in the objects.

use std::error::Error;
use std::sync::Arc;

use mesh::{Store, WorkloadUid};
use tokio_util::sync::CancellationToken;

use crate::dataplane::DataPlane;
use crate::telemetry::Telemetry;

/// Purges workloads that are removed from the model from every tunnel pool of this node, until
/// cancelled. A later pod with the same address must not get a tunnel of the deleted one.
pub(super) async fn purge_deleted(
    store: Store,
    data_plane: Arc<DataPlane>,
    stop: CancellationToken,
) {
    let mut changed = store.subscribe();
    let mut before = store.model();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
        }
        let now = store.model();
        let deleted: Vec<WorkloadUid> = before
            .workloads()
            .filter(|workload| now.workload(&workload.uid).is_none())
            .map(|workload| workload.uid.clone())
            .collect();
        before = now;
        for uid in deleted {
            if let Err(error) = data_plane.purge(&uid).await {
                let error = &error as &dyn Error;
                tracing::error!(workload = %uid, error, "cannot close tunnels to a deleted workload");
            }
        }
    }
}

/// Publishes the number of problems in the objects as a metric, until cancelled. The source logs
/// the problems themselves.
pub(super) async fn count_problems(
    store: Store,
    telemetry: Arc<Telemetry>,
    stop: CancellationToken,
) {
    let mut changed = store.subscribe();
    loop {
        changed.borrow_and_update();
        telemetry.record_problems(store.load().diagnostics().len());
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
        }
    }
}
