//! Renders the resolved objects, with status, as the API server returns them: the files that daemons
//! read.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{
    ContainerStatus, HostIP, Node, NodeAddress, NodeCondition, NodeSpec, NodeStatus, Pod,
    PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::pod::{Phase, PodEntry};
use super::topology;

/// The file name and YAML document of one object.
pub(crate) fn file(
    kind: &str,
    namespace: &str,
    name: &str,
    object: &impl Serialize,
) -> Result<(String, String)> {
    let scope = if namespace.is_empty() {
        String::new()
    } else {
        format!("{namespace}.")
    };
    let file = format!("{}.{scope}{name}.yaml", kind.to_lowercase()).replace('/', "_");
    let text =
        serde_yaml_ng::to_string(object).with_context(|| format!("cannot write {kind} {name}"))?;
    Ok((file, text))
}

/// A node with its addresses and pod CIDRs.
pub(crate) fn node(object: &Node, index: u8) -> Node {
    let mut node = object.clone();
    let name = node.metadata.name.clone().unwrap_or_default();
    let addresses = topology::node_addresses(index);
    let cidrs = topology::pod_cidrs(index);
    let labels = node.metadata.labels.get_or_insert_default();
    labels
        .entry("kubernetes.io/hostname".to_owned())
        .or_insert_with(|| name.clone());
    labels
        .entry("kubernetes.io/os".to_owned())
        .or_insert_with(|| "linux".to_owned());
    let internal = addresses.iter().map(|ip| ("InternalIP", ip.to_string()));
    let all = internal.chain([("Hostname", name)]);
    let address = |(type_, address): (&str, String)| NodeAddress {
        type_: type_.to_owned(),
        address,
    };
    node.spec = Some(NodeSpec {
        pod_cidr: cidrs.first().cloned(),
        pod_cidrs: Some(cidrs.to_vec()),
        ..node.spec.unwrap_or_default()
    });
    node.status = Some(NodeStatus {
        addresses: Some(all.map(address).collect()),
        conditions: Some(vec![NodeCondition {
            type_: "Ready".to_owned(),
            status: "True".to_owned(),
            ..NodeCondition::default()
        }]),
        ..NodeStatus::default()
    });
    node
}

/// A pod with its status.
pub(crate) fn pod(entry: &PodEntry) -> Pod {
    let mut pod = entry.object.clone();
    if let Some((since, grace)) = &entry.deleting {
        pod.metadata.deletion_timestamp = Some(since.clone());
        pod.metadata.deletion_grace_period_seconds = i64::try_from(*grace).ok();
    }
    let node_ips: Vec<String> = entry.node_ips.iter().map(ToString::to_string).collect();
    let ips: Vec<String> = if entry.status.has_sandbox {
        entry.ips.iter().map(ToString::to_string).collect()
    } else {
        Vec::new()
    };
    pod.status = Some(PodStatus {
        phase: Some(entry.status.phase.name().to_owned()),
        conditions: Some(conditions(entry)),
        host_ip: node_ips.first().cloned(),
        host_ips: Some(node_ips.into_iter().map(|ip| HostIP { ip }).collect()),
        pod_ip: ips.first().cloned(),
        pod_ips: Some(ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: Some(entry.created.clone()),
        container_statuses: Some(containers(entry)),
        message: Some(entry.status.message.clone()).filter(|message| !message.is_empty()),
        ..PodStatus::default()
    });
    pod
}

fn conditions(entry: &PodEntry) -> Vec<PodCondition> {
    let running = entry.status.phase == Phase::Running;
    let states = BTreeMap::from([
        ("PodScheduled", true),
        ("Initialized", running),
        ("ContainersReady", entry.status.ready),
        ("Ready", entry.status.ready),
    ]);
    let condition = |(type_, is_true): (&str, bool)| PodCondition {
        type_: type_.to_owned(),
        status: if is_true { "True" } else { "False" }.to_owned(),
        ..PodCondition::default()
    };
    states.into_iter().map(condition).collect()
}

fn containers(entry: &PodEntry) -> Vec<ContainerStatus> {
    let status = |container: k8s_openapi::api::core::v1::Container| ContainerStatus {
        name: container.name,
        image: container.image.unwrap_or_default(),
        ready: entry.status.ready,
        started: Some(entry.status.phase == Phase::Running),
        restart_count: i32::try_from(entry.status.restarts).unwrap_or(i32::MAX),
        ..ContainerStatus::default()
    };
    entry.spec().containers.into_iter().map(status).collect()
}

/// The current time to the second, which is the precision of Kubernetes' timestamps.
pub(crate) fn now() -> Time {
    // A clock before 1970 or after 9999 counts as 1970.
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let seconds = i64::try_from(seconds).unwrap_or_default();
    Time(Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_has_its_addresses_and_keeps_its_labels() {
        let text = "{metadata: {name: a, labels: {topology.kubernetes.io/zone: x}}}";
        let node = node(&serde_yaml_ng::from_str(text).unwrap(), 1);
        let (file, yaml) = file("Node", "", "a", &node).unwrap();
        assert_eq!(file, "node.a.yaml");
        for line in [
            "kind: Node",
            "address: 10.0.0.11",
            "address: fd00:10::11",
            "topology.kubernetes.io/zone: x",
        ] {
            assert!(yaml.contains(line), "{line} in {yaml}");
        }
    }

    #[test]
    fn object_name_cannot_leave_the_folder() {
        assert_eq!(file("Pod", "../x", "y", &()).unwrap().0, "pod..._x.y.yaml");
    }
}
