use serde_json::json;

use crate::testing::{Doc, codes, compiled, model, pod, service, slice};
use crate::{Endpoint, EndpointKey, Model};

fn endpoints(model: &Model) -> &[std::sync::Arc<Endpoint>] {
    &model.service("shop", "web").unwrap().endpoints
}

fn only(model: &Model) -> &Endpoint {
    let [endpoint] = endpoints(model) else {
        panic!("{:?}", endpoints(model))
    };
    endpoint
}

fn target(pod: &str) -> serde_json::Value {
    json!({"kind": "Pod", "name": pod, "namespace": "shop"})
}

fn web() -> Doc {
    service("web", "10.1.0.1")
}

#[test]
fn selector_finds_the_pods_of_its_namespace() {
    let elsewhere = pod("web-3", "10.0.0.3")
        .set("metadata.namespace", "other")
        .set("metadata.uid", "x");
    let docs = [
        web(),
        pod("web-1", "10.0.0.1"),
        pod("web-2", "10.0.0.2"),
        pod("db", "10.0.0.9"),
        elsewhere,
    ];
    let model = model(&docs);
    assert_eq!(endpoints(&model).len(), 2);
    let one = model.workload_by_ip("10.0.0.1".parse().unwrap()).unwrap();
    assert_eq!(one.services.len(), 1);
    assert_eq!(one.services[0].to_string(), "shop/web");
}

#[test]
fn named_target_ports_are_resolved_per_pod() {
    let other = pod("web-2", "10.0.0.2").set("spec.containers.0.ports.0.containerPort", 9090);
    let lacking = pod("web-3", "10.0.0.3").set("spec.containers.0.ports.0.name", "grpc");
    let named = web().set("spec.ports.0.targetPort", "http");
    let (model, diagnostics) = compiled(&[named, pod("web-1", "10.0.0.1"), other, lacking]);
    let ports: Vec<_> = endpoints(&model)
        .iter()
        .map(|e| e.target_port(80))
        .collect();
    assert_eq!(ports, [Some(8080), Some(9090), None]);
    assert!(diagnostics.is_empty(), "some pod has it");
}

#[test]
fn missing_named_port_is_reported() {
    let named = web().set("spec.ports.0.targetPort", "grpc");
    let (_, diagnostics) = compiled(&[named.clone(), pod("web-1", "10.0.0.1")]);
    assert_eq!(
        codes(&diagnostics),
        ["named_port_missing@spec.ports[0].targetPort"]
    );
    let slice = slice(
        "web-x",
        "web",
        json!([{"addresses": ["10.0.0.1"], "targetRef": target("web-1")}]),
    );
    let (_, diagnostics) = compiled(&[named, pod("web-1", "10.0.0.1"), slice]);
    assert_eq!(
        codes(&diagnostics),
        ["named_port_missing@spec.ports[0].targetPort"]
    );
}

#[test]
fn service_without_endpoints_is_reported() {
    let (model, diagnostics) = compiled(&[web()]);
    assert_eq!(codes(&diagnostics), ["service_without_endpoints@"]);
    assert!(endpoints(&model).is_empty());
    let mut bare = web();
    bare.0["spec"].as_object_mut().unwrap().remove("selector");
    assert_eq!(codes(&compiled(&[bare]).1), ["service_without_slices@"]);
}

#[test]
fn existing_slices_decide_readiness() {
    let not_ready = json!([{"addresses": ["10.0.0.1"], "targetRef": target("web-1"),
                            "conditions": {"ready": false, "serving": false}}]);
    let docs = [web(), pod("web-1", "10.0.0.1"), pod("web-2", "10.0.0.2")];
    let model = model(&[&docs[..], &[slice("web-x", "web", not_ready)]].concat());
    assert!(
        !only(&model).health.ready,
        "and the pod that is in no slice is no endpoint"
    );
}

#[test]
fn missing_readiness_of_a_slice_endpoint_is_ready() {
    let silent = json!([{"addresses": ["10.0.0.1"], "targetRef": target("web-1")}]);
    let model = model(&[
        web(),
        pod("web-1", "10.0.0.1").not_ready(),
        slice("x", "web", silent),
    ]);
    let health = only(&model).health;
    assert!(health.ready && health.serving && !health.terminating);
}

#[test]
fn publish_not_ready_addresses_makes_every_endpoint_ready() {
    let doc = web().set("spec.publishNotReadyAddresses", true);
    assert!(
        only(&model(&[doc, pod("web-1", "10.0.0.1").not_ready()]))
            .health
            .ready
    );
}

#[test]
fn dual_stack_pod_is_one_endpoint() {
    let ips = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]);
    let dual = pod("web-1", "10.0.0.1").set("status.podIPs", ips);
    let v4 = slice(
        "v4",
        "web",
        json!([{"addresses": ["10.0.0.1"], "targetRef": target("web-1")}]),
    );
    let v6 = slice(
        "v6",
        "web",
        json!([{"addresses": ["fd00::1"], "targetRef": target("web-1")}]),
    )
    .set("addressType", "IPv6");
    let model = model(&[web(), dual, v4, v6]);
    assert_eq!(only(&model).addresses.len(), 2);
}

#[test]
fn service_without_a_selector_has_address_endpoints() {
    let mut bare = web();
    bare.0["spec"].as_object_mut().unwrap().remove("selector");
    let external = slice(
        "x",
        "web",
        json!([{"addresses": ["203.0.113.7"], "zone": "eu-1"}]),
    );
    let (model, diagnostics) = compiled(&[bare, external]);
    let endpoint = only(&model);
    assert_eq!(
        endpoint.key(),
        EndpointKey::Address("203.0.113.7".parse().unwrap())
    );
    assert_eq!(endpoint.target_port(80), Some(8080));
    assert_eq!(&*endpoint.locality.zone, "eu-1");
    assert!(diagnostics.is_empty());
}

#[test]
fn address_endpoint_of_a_pod_is_that_pod() {
    let model = model(&[
        web(),
        pod("db", "10.0.0.9").ambient(),
        slice("x", "web", json!([{"addresses": ["10.0.0.9"]}])),
    ]);
    assert!(
        only(&model).workload().unwrap().is_meshed(),
        "never in clear to a meshed pod"
    );
}

#[test]
fn endpoints_with_an_uncertain_identity_are_left_out() {
    let pods = [pod("web-1", "10.0.0.1"), pod("admin", "10.0.0.2")];
    let cases = [
        (
            json!([{"addresses": ["10.0.0.2"], "targetRef": target("web-1")}]),
            "endpoint_refused",
        ),
        (
            json!([{"addresses": ["10.0.0.1"], "targetRef": target("gone")}]),
            "endpoint_pod_unknown",
        ),
        (
            json!([{"addresses": ["10.0.0.1"],
                    "targetRef": {"kind": "Pod", "name": "web-1", "uid": "another-life"}}]),
            "endpoint_pod_unknown",
        ),
        (json!([{"addresses": ["127.0.0.1"]}]), "bad_ip"),
        (json!([{"addresses": ["fd00::1"]}]), "bad_ip"),
        (json!([{"addresses": []}]), "bad_ip"),
        (json!([{"addresses": ["10.1.0.1"]}]), "endpoint_refused"),
    ];
    for (endpoints, code) in cases {
        let slice = slice("x", "web", endpoints.clone());
        let (model, diagnostics) = compiled(&[&pods[..], &[web(), slice]].concat());
        assert!(
            model.service("shop", "web").unwrap().endpoints.is_empty(),
            "{endpoints}"
        );
        assert!(
            diagnostics.iter().any(|p| p.code == code),
            "{endpoints}: {diagnostics:?}"
        );
        assert!(
            diagnostics
                .iter()
                .any(|p| p.code == "service_without_endpoints")
        );
    }
}

#[test]
fn pod_with_a_duplicate_address_is_no_endpoint() {
    let (model, _) = compiled(&[
        web(),
        pod("web-1", "10.0.0.1"),
        pod("duplicate", "10.0.0.1"),
    ]);
    assert!(endpoints(&model).is_empty());
}

#[test]
fn host_network_pod_is_an_endpoint_at_its_node_address() {
    let host = pod("web-1", "192.168.0.1").set("spec.hostNetwork", true);
    let taken = pod("db", "192.168.0.1");
    assert_eq!(only(&model(&[web(), host.clone()])).addresses.len(), 1);
    assert!(
        endpoints(&model(&[web(), host, taken])).is_empty(),
        "unless a pod owns that address"
    );
}

#[test]
fn slice_without_service_or_with_unknown_family_is_reported() {
    let mut lost = slice("x", "web", json!([]));
    lost.0["metadata"]["labels"] = json!({});
    let fqdn = slice("y", "web", json!([])).set("addressType", "FQDN");
    let (_, diagnostics) = compiled(&[lost, fqdn]);
    assert_eq!(
        codes(&diagnostics),
        [
            "missing_label@metadata.labels[kubernetes.io/service-name]",
            "bad_value@addressType"
        ]
    );
}
