use serde_json::json;

use crate::testing::{Doc, codes, compiled, model, namespace, pod, service};
use crate::{Affinity, Distribution, Service};

fn web(docs: &[Doc]) -> Service {
    Service::clone(model(docs).service("shop", "web").unwrap())
}

#[test]
fn service_has_addresses_ports_and_hostname() {
    let doc = service("web", "10.1.0.1").set("spec.clusterIPs", json!(["10.1.0.1", "fd01::1"]));
    let (model, diagnostics) = compiled(&[doc, pod("web", "10.0.0.1")]);
    let web = model.service("shop", "web").unwrap();
    assert_eq!(&*web.hostname, "web.shop.svc.cluster.local");
    assert_eq!(web.vips.len(), 2);
    assert!(model.service_by_vip("fd01::1".parse().unwrap()).is_some());
    assert_eq!((web.ports[0].port, &*web.ports[0].name), (80, "http"));
    assert!(diagnostics.is_empty());
}

#[test]
fn external_name_service_is_left_out() {
    let doc = service("web", "").set("spec.type", "ExternalName");
    assert_eq!(model(&[doc]).services().len(), 0);
}

#[test]
fn headless_service_has_endpoints_and_no_address() {
    let web = web(&[service("web", "None"), pod("web", "10.0.0.1")]);
    assert!(web.is_headless());
    assert_eq!(web.endpoints.len(), 1);
}

#[test]
fn udp_ports_are_left_out() {
    let ports =
        json!([{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "tcp", "port": 53}]);
    let web = web(&[service("web", "10.1.0.1").set("spec.ports", ports)]);
    assert_eq!(web.ports.len(), 1);
    assert_eq!(&*web.ports[0].name, "tcp");
}

#[test]
fn traffic_distribution_is_field_then_service_then_namespace_annotation() {
    const KEY: &str = "networking.istio.io/traffic-distribution";
    let cases = [
        (None, None, None, Distribution::Any),
        (
            None,
            None,
            Some("PreferClose"),
            Distribution::PreferSameZone,
        ),
        (
            None,
            Some("prefersamenode"),
            Some("PreferClose"),
            Distribution::PreferSameNode,
        ),
        (
            Some("PreferSameZone"),
            Some("PreferSameNode"),
            None,
            Distribution::PreferSameZone,
        ),
        (
            Some("PreferSameNode"),
            None,
            None,
            Distribution::PreferSameNode,
        ),
        (
            Some("Nearest"),
            Some("PreferClose"),
            None,
            Distribution::PreferSameZone,
        ),
    ];
    for (field, annotation, inherited, expected) in cases {
        let (mut doc, mut ns) = (service("web", "10.1.0.1"), namespace("shop"));
        if let Some(value) = field {
            doc = doc.set("spec.trafficDistribution", value);
        }
        if let Some(value) = annotation {
            doc = doc.annotation(KEY, value);
        }
        if let Some(value) = inherited {
            ns = ns.annotation(KEY, value);
        }
        let case = format!("{field:?} {annotation:?} {inherited:?}");
        assert_eq!(web(&[doc, ns]).distribution, expected, "{case}");
    }
}

#[test]
fn unknown_traffic_policy_is_read_as_the_narrower_one() {
    let doc = service("web", "10.1.0.1")
        .set("spec.internalTrafficPolicy", "Lokal")
        .set("spec.sessionAffinity", "Cookie")
        .set("spec.trafficDistribution", "Nearest");
    let (model, diagnostics) = compiled(&[doc, pod("web", "10.0.0.1")]);
    let web = model.service("shop", "web").unwrap();
    assert!(web.node_local);
    assert_eq!(
        (web.affinity, web.distribution),
        (Affinity::None, Distribution::Any)
    );
    let expected = [
        "bad_value@spec.internalTrafficPolicy",
        "bad_value@spec.sessionAffinity",
        "bad_value@spec.trafficDistribution",
    ];
    assert_eq!(codes(&diagnostics), expected);
}

#[test]
fn service_errors_are_reported_with_their_field() {
    let doc = service("web", "10.1.0.300").set(
        "spec.ports",
        json!([{"name": "a", "port": 0}, {"name": "b", "port": 80, "targetPort": 70000},
               {"name": "c", "port": 81}, {"name": "d", "port": 81}]),
    );
    let (model, diagnostics) = compiled(&[doc, pod("web", "10.0.0.1")]);
    assert_eq!(
        codes(&diagnostics),
        [
            "bad_ip@spec.clusterIP",
            "bad_ip@spec.clusterIPs[0]",
            "bad_port@spec.ports[0].port",
            "bad_port@spec.ports[1].targetPort",
            "duplicate_port@spec.ports[3].port",
        ]
    );
    assert_eq!(model.service("shop", "web").unwrap().ports.len(), 1);
}
