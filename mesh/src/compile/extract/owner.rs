//! Derives the workload that owns a pod, as Istio does, so that telemetry has the same names.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::values::label;
use crate::model::WorkloadType;

/// Type and name of the workload that owns a pod.
///
/// A ReplicaSet whose name ends in the pod's template hash is a Deployment's; a Job whose name
/// ends in a CronJob's time stamp is a CronJob's. The label `service.istio.io/workload-name`
/// overrides the name.
pub(super) fn workload(meta: &ObjectMeta) -> (WorkloadType, String) {
    let owners = meta.owner_references.iter().flatten();
    let (kind, name) = match owners
        .into_iter()
        .find(|owner| owner.controller == Some(true))
    {
        Some(owner) => owned_by(&owner.kind, &owner.name, label(meta, "pod-template-hash")),
        None => (WorkloadType::Pod, meta.name.as_deref().unwrap_or_default()),
    };
    let name = label(meta, "service.istio.io/workload-name").unwrap_or(name);
    (kind, name.to_owned())
}

fn owned_by<'a>(kind: &str, name: &'a str, hash: Option<&str>) -> (WorkloadType, &'a str) {
    let deployment = hash
        .filter(|hash| kind == "ReplicaSet" && !hash.is_empty())
        .and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'));
    match (kind, deployment) {
        (_, Some(deployment)) => (WorkloadType::Deployment, deployment),
        ("Job", _) => match cron_job(name) {
            Some(cron_job) => (WorkloadType::CronJob, cron_job),
            None => (WorkloadType::Job, name),
        },
        _ => (WorkloadType::Pod, name),
    }
}

/// CronJobs name their Jobs `<name>-<minutes since the epoch>`, 8 digits today; Istio takes 8 to 10.
fn cron_job(job: &str) -> Option<&str> {
    let (name, stamp) = job.rsplit_once('-')?;
    let is_stamp = (8..=10).contains(&stamp.len()) && stamp.bytes().all(|b| b.is_ascii_digit());
    (is_stamp && !name.is_empty()).then_some(name)
}

/// Canonical service name and revision: Istio's label, Kubernetes' recommended label, the
/// traditional one, the default.
pub(super) fn canonical(meta: &ObjectMeta, workload_name: &str) -> (String, String) {
    let first = |keys: [&str; 3], default: &str| {
        keys.iter()
            .find_map(|key| label(meta, key))
            .unwrap_or(default)
            .to_owned()
    };
    let name = first(
        [
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ],
        workload_name,
    );
    let revision = first(
        [
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ],
        "latest",
    );
    (name, revision)
}
