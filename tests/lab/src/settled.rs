//! Whether a daemon has taken in what the lab has written for it.
//!
//! Files reach a daemon by a notification and a pause in which it gathers more of them: a test that
//! connects the moment a pod is ready would meet yesterday's model.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::protocol::{PodStatus, ServiceStatus, Status};

/// What the daemon's configuration dump lacks of the lab's state, or has too much; `None` when they
/// agree on every pod and on every service's endpoints.
pub(crate) fn lacking(dump: &Value, status: &Status) -> Option<String> {
    let pods = status.pods.iter().filter(|pod| own_network(pod, status));
    let pods = pods.filter_map(|pod| lacking_pod(dump, pod));
    let services = status
        .services
        .iter()
        .filter_map(|service| lacking_service(dump, status, service));
    pods.chain(services).next()
}

/// A pod on the host's network has no identity of its own, and is no workload to a mesh.
fn own_network(pod: &PodStatus, status: &Status) -> bool {
    status.nodes.iter().all(|node| node.netns != pod.netns)
}

fn lacking_pod(dump: &Value, pod: &PodStatus) -> Option<String> {
    if !pod.ready || pod.phase != "Running" {
        // Not being ready is what a daemon takes anything for that it does not know.
        return None;
    }
    let name = format!("pod {}/{}", pod.namespace, pod.name);
    let Some(workload) =
        list(dump, "workloads").find(|workload| kube_uid(workload, "uid") == Some(&pod.uid))
    else {
        return Some(format!("{name} is unknown"));
    };
    let protocol = if pod.meshed { "HBONE" } else { "TCP" };
    for (field, wanted) in [("status", "Healthy"), ("protocol", protocol)] {
        let found = workload
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default();
        if found != wanted {
            return Some(format!("{name} has {field} {found}, not yet {wanted}"));
        }
    }
    None
}

fn lacking_service(dump: &Value, status: &Status, service: &ServiceStatus) -> Option<String> {
    let name = format!("service {}/{}", service.namespace, service.name);
    let same = |found: &&Value| {
        let text = |field: &str| found.get(field).and_then(Value::as_str);
        text("namespace") == Some(&service.namespace) && text("name") == Some(&service.name)
    };
    let Some(found) = list(dump, "services").find(same) else {
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
    let mut uids = endpoints
        .iter()
        .filter_map(|endpoint| kube_uid(endpoint, "workloadUid"));
    let gone = uids.find(|uid| status.pods.iter().all(|pod| pod.uid != *uid));
    gone.map(|uid| format!("{name} still has the endpoint of {uid}"))
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
    fn a_daemon_that_knows_everything_lacks_nothing() {
        assert_eq!(lacking(&dump(), &status()), None);
    }

    #[test]
    fn what_is_missing_or_old_is_named() {
        let with = |pointer: &str, value: Value| {
            let mut dump = dump();
            *dump.pointer_mut(pointer).unwrap() = value;
            lacking(&dump, &status()).unwrap()
        };
        assert_eq!(with("/workloads", json!([])), "pod shop/web is unknown");
        assert!(with("/workloads/0/status", json!("Unhealthy")).contains("not yet Healthy"));
        assert!(with("/workloads/0/protocol", json!("TCP")).contains("not yet HBONE"));
        assert_eq!(with("/services", json!([])), "service shop/web is unknown");
        assert!(with("/services/0/endpoints", json!({})).contains("no endpoint 10.244.1.2 yet"));
    }

    #[test]
    fn the_endpoint_of_a_pod_that_is_gone_is_too_much() {
        let mut status = status();
        status.pods.clear();
        status.services[0].endpoints.clear();
        assert_eq!(
            lacking(&dump(), &status).unwrap(),
            "service shop/web still has the endpoint of u1"
        );
    }
}
