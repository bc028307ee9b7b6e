//! Who decides that a pod is in the mesh: its own label, its namespace's label, or an exclusion.

use std::sync::Arc;

use crate::model::Mode;

use super::extract::ExtractedPod;

/// The mode of a pod. As in Istio, the pod's own label overrides its namespace's. Host-network pods,
/// pods with Istio's sidecar and pods of excluded namespaces are never in the mesh.
pub(super) fn mode(pod: &ExtractedPod, namespace: Mode, excluded: &[Arc<str>]) -> Mode {
    let workload = &pod.workload;
    let never = workload.host_network || pod.has_sidecar || excluded.contains(&workload.namespace);
    match never {
        true => Mode::Plain,
        false => pod.mode.unwrap_or(namespace),
    }
}
