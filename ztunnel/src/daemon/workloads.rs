//! The enrolment state of this node's pods as the admin page shows it.

use mesh::{Store, Workload};
use tokio::sync::watch;

use crate::admin::WorkloadState;
use crate::enrolment::Statuses;

/// Returns a function that joins the enrolment statuses with the model's workloads.
pub(super) fn workload_states(
    store: Store,
    statuses: watch::Receiver<Statuses>,
) -> Box<dyn Fn() -> Vec<WorkloadState>> {
    Box::new(move || {
        let model = store.model();
        let statuses = statuses.borrow().clone();
        statuses
            .iter()
            .map(|(uid, status)| {
                let workload = model.workload(uid);
                let text = |field: fn(&Workload) -> String| {
                    workload.map(|workload| field(workload)).unwrap_or_default()
                };
                let reason = status.reason.map(|code| match &status.message {
                    Some(message) => format!("{code}: {message}"),
                    None => code.to_string(),
                });
                WorkloadState {
                    uid: uid.clone(),
                    state: status.state.name(),
                    reason,
                    since: status.since,
                    name: text(|workload| workload.name.to_string()),
                    namespace: text(|workload| workload.namespace.to_string()),
                    service_account: text(|workload| workload.service_account.to_string()),
                    trust_domain: text(|workload| workload.identity.trust_domain().to_string()),
                }
            })
            .collect()
    })
}
