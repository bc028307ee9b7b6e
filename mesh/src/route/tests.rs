//! The outbound decision, as tables.

mod choose_endpoint;

use std::net::SocketAddr;

use serde_json::json;

use super::*;
use crate::testing::{Doc, model, node, pod, service, slice, workload};

/// The route of a connection from the pod `client`.
fn decide(model: &Model, destination: &str, tried: &[EndpointKey]) -> Route {
    let client = workload(model, "client");
    let destination: SocketAddr = destination.parse().unwrap();
    route(
        model,
        client,
        destination,
        tried,
        &mut fastrand::Rng::with_seed(7),
    )
}

/// A route in one line.
fn line(route: &Route) -> String {
    let of = |service: &Option<Arc<Service>>| match service {
        Some(service) => format!(" for {}", service.name),
        None => String::new(),
    };
    match route {
        Route::Mesh {
            workload,
            service,
            target,
            tunnel,
            ..
        } => {
            format!("mesh {} {target} by {tunnel}{}", workload.name, of(service))
        }
        Route::Plain {
            target,
            workload,
            service,
            ..
        } => {
            let name = workload.as_ref().map_or("-", |w| &*w.name);
            format!("plain {name} {target}{}", of(service))
        }
        Route::Passthrough { target } => format!("passthrough {target}"),
        Route::NoEndpoint { service, code } => format!("none {code}{}", of(service)),
    }
}

fn client() -> Doc {
    pod("client", "10.0.0.100").ambient()
}

fn check(docs: &[Doc], cases: &[(&str, &str)]) {
    let model = model(&[docs, &[client()]].concat());
    for (destination, expected) in cases {
        assert_eq!(
            line(&decide(&model, destination, &[])),
            *expected,
            "{destination}"
        );
    }
}

#[test]
fn pod_service_and_unknown_destinations_are_routed() {
    let docs = [
        service("web", "10.1.0.1"),
        pod("web-1", "10.0.0.1").ambient(),
        service("old", "10.1.0.2"),
        pod("old-1", "10.0.0.2"),
        service("outside", "10.1.0.3"),
        slice("x", "outside", json!([{"addresses": ["203.0.113.7"]}])),
        pod("agent", "192.168.0.1").set("spec.hostNetwork", true),
    ];
    check(
        &docs,
        &[
            (
                "10.0.0.1:8080",
                "mesh web-1 10.0.0.1:8080 by 10.0.0.1:15008",
            ),
            ("10.0.0.1:22", "mesh web-1 10.0.0.1:22 by 10.0.0.1:15008"),
            (
                "10.1.0.1:80",
                "mesh web-1 10.0.0.1:8080 by 10.0.0.1:15008 for web",
            ),
            ("10.0.0.2:8080", "plain old-1 10.0.0.2:8080"),
            ("10.1.0.2:80", "plain old-1 10.0.0.2:8080 for old"),
            ("10.1.0.3:80", "plain - 203.0.113.7:8080 for outside"),
            ("203.0.113.7:443", "passthrough 203.0.113.7:443"),
            ("192.168.0.1:10250", "passthrough 192.168.0.1:10250"),
            (
                "[::ffff:10.0.0.1]:8080",
                "mesh web-1 10.0.0.1:8080 by 10.0.0.1:15008",
            ),
            ("10.1.0.1:81", "none service_port_unknown for web"),
        ],
    );
}

#[test]
fn external_addresses_and_node_ports_lead_to_their_service_on_its_ports() {
    let web = service("web", "10.1.0.1")
        .set(
            "spec.ports",
            json!([{"port": 80, "targetPort": 8080, "nodePort": 30080}]),
        )
        .set(
            "spec.externalIPs",
            json!(["198.51.100.1", "10.0.0.1", "10.1.0.2"]),
        )
        .set(
            "status",
            json!({"loadBalancer": {"ingress": [{"ip": "198.51.100.2"}, {"hostname": "lb.test"},
                                                {"ip": "198.51.100.3", "ipMode": "Proxy"}]}}),
        );
    let disputed =
        |name: &str, vip: &str| service(name, vip).set("spec.externalIPs", json!(["198.51.100.9"]));
    let local = service("local", "10.1.0.5")
        .set("spec.internalTrafficPolicy", "Local")
        .set("spec.externalIPs", json!(["198.51.100.5"]));
    let docs = [
        node("a", "region", "zone"),
        web,
        pod("web-1", "10.0.0.1").ambient(),
        service("old", "10.1.0.2"),
        pod("old-1", "10.0.0.2"),
        disputed("one", "10.1.0.3"),
        disputed("two", "10.1.0.4"),
        local,
    ];
    let mesh = "mesh web-1 10.0.0.1:8080 by 10.0.0.1:15008 for web";
    check(
        &docs,
        &[
            ("198.51.100.1:80", mesh),
            ("198.51.100.2:80", mesh),
            ("192.168.0.1:30080", mesh),
            ("198.51.100.1:443", "passthrough 198.51.100.1:443"),
            ("198.51.100.3:80", "passthrough 198.51.100.3:80"),
            ("192.168.0.1:80", "passthrough 192.168.0.1:80"),
            ("192.168.0.1:10250", "passthrough 192.168.0.1:10250"),
            ("198.51.100.1:30080", "passthrough 198.51.100.1:30080"),
            ("198.51.100.9:80", "passthrough 198.51.100.9:80"),
            ("198.51.100.5:80", "passthrough 198.51.100.5:80"),
            // An external IP never overrides a pod IP or a cluster IP.
            ("10.0.0.1:80", "mesh web-1 10.0.0.1:80 by 10.0.0.1:15008"),
            ("10.1.0.2:80", "plain old-1 10.0.0.2:8080 for old"),
        ],
    );
}

#[test]
fn not_ready_pod_is_reached_by_its_own_address_but_not_through_a_service() {
    let docs = [
        service("web", "10.1.0.1"),
        pod("web-1", "10.0.0.1").ambient().not_ready(),
    ];
    check(
        &docs,
        &[
            (
                "10.0.0.1:8080",
                "mesh web-1 10.0.0.1:8080 by 10.0.0.1:15008",
            ),
            ("10.1.0.1:80", "none no_healthy_endpoint for web"),
        ],
    );
}

#[test]
fn destination_on_the_daemon_itself_is_refused() {
    check(
        &[],
        &[
            ("127.0.0.1:15001", "none self_call"),
            ("[::1]:15001", "none self_call"),
            ("[::ffff:127.0.0.1]:8080", "none self_call"),
            ("0.0.0.0:80", "none self_call"),
            ("224.0.0.1:80", "none self_call"),
            ("10.0.0.100:15001", "none self_call"),
            ("10.0.0.100:15006", "none self_call"),
            ("10.0.0.100:15008", "none self_call"),
            (
                "10.0.0.100:8080",
                "mesh client 10.0.0.100:8080 by 10.0.0.100:15008",
            ),
        ],
    );
}

#[test]
fn refused_address_is_neither_meshed_nor_passed_through() {
    let docs = [
        pod("web", "10.0.0.1").ambient(),
        pod("duplicate", "10.0.0.1"),
        service("web", "10.1.0.1"),
        service("fake", "10.1.0.1"),
        service("odd", "10.0.0.3"),
        pod("odd", "10.0.0.3").ambient(),
        pod("invalid", "10.0.0.4")
            .ambient()
            .set("spec.serviceAccountName", "a/b"),
    ];
    check(
        &docs,
        &[
            ("10.0.0.1:8080", "none duplicate_ip"),
            ("10.1.0.1:80", "none duplicate_service_ip"),
            ("10.0.0.3:80", "none pod_ip_is_service_ip"),
            ("10.0.0.4:80", "none invalid_workload"),
        ],
    );
}

#[test]
fn missing_endpoint_has_a_reason_code() {
    let local =
        |name: &str, vip: &str| service(name, vip).set("spec.internalTrafficPolicy", "Local");
    let docs = [
        service("empty", "10.1.0.1"),
        local("far", "10.1.0.2"),
        pod("far-1", "10.0.0.2").set("spec.nodeName", "b"),
        service("unnamed", "10.1.0.3").set("spec.ports.0.targetPort", "grpc"),
        pod("unnamed-1", "10.0.0.3"),
        service("six", "10.1.0.4"),
        pod("six-1", "fd00::6"),
        local("near", "10.1.0.5"),
        pod("near-1", "10.0.0.5"),
        pod("near-2", "10.0.0.6").set("spec.nodeName", "b"),
    ];
    check(
        &docs,
        &[
            ("10.1.0.1:80", "none no_endpoint for empty"),
            ("10.1.0.2:80", "none no_local_endpoint for far"),
            ("10.1.0.3:80", "none no_endpoint_for_port for unnamed"),
            ("10.1.0.4:80", "none no_endpoint_for_port for six"),
            ("10.1.0.5:80", "plain near-1 10.0.0.5:8080 for near"),
        ],
    );
}

#[test]
fn destination_family_is_preferred_and_the_other_is_a_fallback() {
    let ips = |v4: &str, v6: &str| json!([{"ip": v4}, {"ip": v6}]);
    let docs = [
        service("web", "10.1.0.1").set("spec.clusterIPs", json!(["10.1.0.1", "fd01::1"])),
        pod("web-1", "10.0.0.1").set("status.podIPs", ips("10.0.0.1", "fd00::1")),
        service("six", "10.1.0.2").set("spec.clusterIPs", json!(["10.1.0.2", "fd01::2"])),
        pod("six-1", "fd00::6"),
        service("bare", "10.1.0.3").set("spec.clusterIPs", json!(["10.1.0.3", "fd01::3"])),
        slice("bare-4", "bare", json!([{"addresses": ["203.0.113.7"]}])),
        slice("bare-6", "bare", json!([{"addresses": ["2001:db8::7"]}]))
            .set("addressType", json!("IPv6")),
        client().set("status.podIPs", ips("10.0.0.100", "fd00::100")),
    ];
    let model = model(&docs);
    let cases = [
        ("10.1.0.1:80", "plain web-1 10.0.0.1:8080 for web"),
        ("[fd01::1]:80", "plain web-1 [fd00::1]:8080 for web"),
        ("10.1.0.2:80", "plain six-1 [fd00::6]:8080 for six"),
        ("[fd00::1]:8080", "plain web-1 [fd00::1]:8080"),
        ("10.1.0.3:80", "plain - 203.0.113.7:8080 for bare"),
        ("[fd01::3]:80", "plain - [2001:db8::7]:8080 for bare"),
    ];
    for (destination, expected) in cases {
        assert_eq!(
            line(&decide(&model, destination, &[])),
            expected,
            "{destination}"
        );
    }
}

#[test]
fn retry_uses_another_endpoint_until_all_are_tried() {
    let bare = json!([{"addresses": ["203.0.113.7"]}, {"addresses": ["10.0.0.1"]}]);
    let docs = [
        service("web", "10.1.0.1"),
        slice("x", "web", bare),
        pod("db", "10.0.0.1").ambient(),
        client(),
    ];
    let model = model(&docs);
    let mut tried = Vec::new();
    for _ in 0..2 {
        let next = decide(&model, "10.1.0.1:80", &tried);
        assert!(next.may_retry());
        let key = next.endpoint().unwrap();
        assert!(!tried.contains(&key));
        tried.push(key);
    }
    assert_eq!(
        line(&decide(&model, "10.1.0.1:80", &tried)),
        "none endpoints_exhausted for web"
    );
    assert_eq!(
        line(&decide(&model, "10.0.0.1:80", &tried)),
        "none endpoints_exhausted"
    );
    assert!(!decide(&model, "10.0.0.1:80", &[]).may_retry());
}
