use std::net::IpAddr;

use serde_json::json;

use crate::AddressRefusal;
use crate::testing::{Doc, codes, compiled, pod, service, workload};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn host(name: &str, ip: &str) -> Doc {
    pod(name, ip).set("spec.hostNetwork", true)
}

#[test]
fn address_of_two_live_pods_has_no_owner() {
    let docs = [
        pod("web", "10.0.0.1"),
        pod("duplicate", "10.0.0.1"),
        pod("db", "10.0.0.2"),
    ];
    let (model, diagnostics) = compiled(&docs);
    assert!(model.workload_by_ip(ip("10.0.0.1")).is_none());
    assert_eq!(
        model.address_refusal(ip("10.0.0.1")),
        Some(AddressRefusal::DuplicatePodIp)
    );
    assert!(model.workload_by_ip(ip("10.0.0.2")).is_some());
    assert_eq!(codes(&diagnostics), ["duplicate_ip@status.podIPs"; 2]);
    assert!(
        diagnostics[0].message.contains("Pod shop/duplicate"),
        "{}",
        diagnostics[0]
    );
    assert_eq!(
        model.workloads().len(),
        3,
        "both are still known, and can be enrolled"
    );
}

#[test]
fn terminating_pod_yields_its_address_to_a_live_pod() {
    let docs = [pod("old", "10.0.0.1").terminating(), pod("new", "10.0.0.1")];
    let (model, diagnostics) = compiled(&docs);
    assert_eq!(&*model.workload_by_ip(ip("10.0.0.1")).unwrap().name, "new");
    assert!(diagnostics.is_empty());
    let (model, _) = compiled(&docs[..1]);
    assert_eq!(&*model.workload_by_ip(ip("10.0.0.1")).unwrap().name, "old");
}

#[test]
fn two_terminating_pods_of_one_address_are_a_conflict() {
    let docs = [
        pod("one", "10.0.0.1").terminating(),
        pod("two", "10.0.0.1").terminating(),
    ];
    assert_eq!(
        compiled(&docs).0.address_refusal(ip("10.0.0.1")),
        Some(AddressRefusal::DuplicatePodIp)
    );
}

#[test]
fn host_network_pods_own_no_address() {
    let docs = [host("agent", "192.168.0.1"), host("proxy", "192.168.0.1")];
    let (model, diagnostics) = compiled(&docs);
    assert!(model.workload_by_ip(ip("192.168.0.1")).is_none());
    assert!(model.address_refusal(ip("192.168.0.1")).is_none());
    assert!(diagnostics.is_empty());
}

#[test]
fn address_of_two_services_has_no_owner() {
    let docs = [
        service("web", "10.1.0.1"),
        service("fake", "10.1.0.1"),
        pod("web", "10.0.0.1"),
    ];
    let (model, diagnostics) = compiled(&docs);
    assert!(model.service_by_vip(ip("10.1.0.1")).is_none());
    assert_eq!(
        model.address_refusal(ip("10.1.0.1")),
        Some(AddressRefusal::DuplicateServiceIp)
    );
    assert!(codes(&diagnostics).contains(&"duplicate_service_ip@spec.clusterIPs".to_owned()));
}

#[test]
fn address_of_a_pod_and_a_service_is_refused() {
    let (model, diagnostics) = compiled(&[service("web", "10.0.0.1"), pod("web", "10.0.0.1")]);
    assert_eq!(
        model.address_refusal(ip("10.0.0.1")),
        Some(AddressRefusal::PodIpIsServiceIp)
    );
    assert!(model.workload_by_ip(ip("10.0.0.1")).is_none());
    assert!(model.service_by_vip(ip("10.0.0.1")).is_none());
    assert!(codes(&diagnostics).contains(&"pod_ip_is_service_ip@spec.clusterIPs".to_owned()));
}

#[test]
fn invalid_pod_takes_no_address_from_a_valid_one() {
    let invalid = pod("invalid", "10.0.0.1").set("spec.serviceAccountName", "a/b");
    let (model, _) = compiled(&[invalid, pod("web", "10.0.0.1")]);
    assert_eq!(&*model.workload_by_ip(ip("10.0.0.1")).unwrap().name, "web");
}

#[test]
fn addresses_of_an_invalid_service_are_refused() {
    let invalid = service("web", "10.1.0.1").set("metadata.name", "Web!");
    let (model, _) = compiled(&[invalid]);
    assert_eq!(
        model.address_refusal(ip("10.1.0.1")),
        Some(AddressRefusal::InvalidService)
    );
}

#[test]
fn loopback_and_link_local_addresses_are_reported() {
    for bad in [
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "169.254.1.1",
        "fe80::1",
        "224.0.0.1",
        "10.0.0",
        "::ffff:127.0.0.1",
        "010.0.0.1",
        "",
    ] {
        let doc = pod("web", "10.0.0.1").set("status.podIPs", json!([{"ip": bad}]));
        let (model, diagnostics) = compiled(&[doc]);
        assert!(workload(&model, "web").ips.is_empty(), "{bad}");
        assert_eq!(diagnostics.len(), usize::from(!bad.is_empty()), "{bad}");
    }
}

#[test]
fn pod_has_at_most_one_address_per_family() {
    let ips = json!([{"ip": "10.0.0.1"}, {"ip": "fd00::1"}, {"ip": "10.0.0.2"}]);
    let doc = pod("web", "10.0.0.1")
        .set("status.podIPs", ips)
        .set("status.podIP", "10.0.0.1");
    let (model, diagnostics) = compiled(&[doc]);
    assert_eq!(workload(&model, "web").ips, [ip("10.0.0.1"), ip("fd00::1")]);
    assert_eq!(codes(&diagnostics), ["bad_ip@status.podIPs[2].ip"]);
}

#[test]
fn ipv4_mapped_address_is_read_as_ipv4() {
    let doc = pod("web", "::ffff:10.0.0.1");
    let (model, _) = compiled(&[doc]);
    assert!(model.workload_by_ip(ip("10.0.0.1")).is_some());
    assert!(model.workload_by_ip(ip("::ffff:10.0.0.1")).is_some());
}
