//! Compares a daemon's configuration dump with the state of the lab.
//!
//! A daemon reads the lab's files after a change notification and a debounce. Until then it works
//! with the previous state, so a test that connects as soon as a pod is ready can hit that state.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::protocol::{PodStatus, ServiceStatus, Status};

/// The first difference between the daemon's configuration dump and the lab's status; `None` when
/// they agree on every ready pod and on every service's endpoints.
pub(crate) fn first_difference(dump: &Value, status: &Status) -> Option<String> {
    let pods = status.pods.iter().filter(|pod| has_own_netns(pod, status));
    let pods = pods.filter_map(|pod| pod_difference(dump, pod));
    let services = status
        .services
        .iter()
        .filter_map(|service| service_difference(dump, status, service));
    pods.chain(services).next()
}

/// A host-network pod has no identity of its own and is not a workload of the mesh.
fn has_own_netns(pod: &PodStatus, status: &Status) -> bool {
    status.nodes.iter().all(|node| node.netns != pod.netns)
}

fn pod_difference(dump: &Value, pod: &PodStatus) -> Option<String> {
    if !pod.ready || pod.phase != "Running" {
        // A daemon that has not read the pod and one that has both treat it as not ready.
        return None;
    }
    let name = format!("pod {}/{}", pod.namespace, pod.name);
    let Some(workload) =
        list(dump, "workloads").find(|workload| kube_uid(workload, "uid") == Some(&pod.uid))
    else {
        return Some(format!("{name} is unknown"));
    };
    let protocol = if pod.meshed { "HBONE" } else { "TCP" };
    for (field, expected) in [("status", "Healthy"), ("protocol", protocol)] {
        let found = workload
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default();
        if found != expected {
            return Some(format!("{name} has {field} {found}, not yet {expected}"));
        }
    }
    None
}

fn service_difference(dump: &Value, status: &Status, service: &ServiceStatus) -> Option<String> {
    let name = format!("service {}/{}", service.namespace, service.name);
    let is_service = |found: &&Value| {
        let text = |field: &str| found.get(field).and_then(Value::as_str);
        text("namespace") == Some(&service.namespace) && text("name") == Some(&service.name)
    };
    let Some(found) = list(dump, "services").find(is_service) else {
        return Some(format!("{name} is unknown"));
    };
    let endpoints = found.get("endpoints").and_then(Value::as_object);
    let endpoints: Vec<&Value> = endpoints.into_iter().flat_map(|map| map.values()).collect();
    let known: BTreeSet<&str> = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.get("addresses")?.as_array())
        .flat_map(|addresses| addresses.iter().filter_map(Value::as_str))
        .collect();
    if let Some(ip) = service
        .endpoints
        .iter()
        .find(|ip| !known.contains(ip.to_string().as_str()))
    {
        return Some(format!("{name} has no endpoint {ip} yet"));
    }
    let mut pod_uids = endpoints
        .iter()
        .filter_map(|endpoint| kube_uid(endpoint, "workloadUid"));
    let stale = pod_uids.find(|uid| status.pods.iter().all(|pod| pod.uid != *uid));
    stale.map(|uid| format!("{name} still has the endpoint of {uid}"))
}

fn list<'a>(dump: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    dump.get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

/// The last part of a workload's uid, `<cluster>//Pod/<namespace>/<name>/<uid>`.
fn kube_uid<'a>(object: &'a Value, field: &str) -> Option<&'a str> {
    let uid = object.get(field)?.as_str()?;
    uid.split_once("//Pod/")
        .and_then(|(_, rest)| rest.rsplit('/').next())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> Status {
        serde_json::from_value(json!({
            "generation": 1, "name": "t", "dir": "/", "fabric": "f", "nodes": [],
            "pods": [{
                "namespace": "shop", "name": "web", "uid": "u1", "node": "a", "netns": "n",
                "ips": ["10.244.1.2"], "phase": "Running", "ready": true, "meshed": true,
                "restarts": 0, "message": "",
            }],
            "services": [{
                "namespace": "shop", "name": "web", "cluster_ips": ["10.96.0.2"],
                "endpoints": ["10.244.1.2"],
            }],
        }))
        .unwrap()
    }

    fn dump() -> Value {
        json!({
            "workloads": [{"uid": "c//Pod/shop/web/u1", "status": "Healthy", "protocol": "HBONE"}],
            "services": [{"namespace": "shop", "name": "web", "endpoints": {
                "c//Pod/shop/web/u1": {
                    "workloadUid": "c//Pod/shop/web/u1", "addresses": ["10.244.1.2", "fd00::2"],
                },
            }}],
        })
    }

    #[test]
    fn equal_state_has_no_difference() {
        assert_eq!(first_difference(&dump(), &status()), None);
    }

    #[test]
    fn missing_or_stale_objects_are_named() {
        let with = |pointer: &str, value: Value| {
            let mut dump = dump();
            *dump.pointer_mut(pointer).unwrap() = value;
            first_difference(&dump, &status()).unwrap()
        };
        assert_eq!(with("/workloads", json!([])), "pod shop/web is unknown");
        assert!(with("/workloads/0/status", json!("Unhealthy")).contains("not yet Healthy"));
        assert!(with("/workloads/0/protocol", json!("TCP")).contains("not yet HBONE"));
        assert_eq!(with("/services", json!([])), "service shop/web is unknown");
        assert!(with("/services/0/endpoints", json!({})).contains("no endpoint 10.244.1.2 yet"));
    }

    #[test]
    fn endpoint_of_a_deleted_pod_is_a_difference() {
        let mut status = status();
        status.pods.clear();
        status.services[0].endpoints.clear();
        assert_eq!(
            first_difference(&dump(), &status).unwrap(),
            "service shop/web still has the endpoint of u1"
        );
    }
}
