use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::super::pod::KubeletStatus;
use super::*;

fn service(spec: &str) -> Service {
    let text = format!("{{metadata: {{name: web, namespace: shop}}, spec: {spec}}}");
    serde_yaml_ng::from_str(&text).unwrap()
}

fn pod(name: &str, ips: &[&str], ports: &str) -> PodEntry {
    let text = format!(
        "{{metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}},
           spec: {{containers: [{{name: c, command: [x], ports: {ports}}}]}}}}"
    );
    let phase = Phase::Running;
    PodEntry {
        object: serde_yaml_ng::from_str(&text).unwrap(),
        uid: name.to_owned(),
        node: "a".to_owned(),
        netns: String::new(),
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        node_ips: Vec::new(),
        created: Time(Timestamp::UNIX_EPOCH),
        status: KubeletStatus {
            has_sandbox: true,
            phase,
            ready: true,
            ..KubeletStatus::default()
        },
        deleting: None,
    }
}

fn slices_of(service: &Service, pods: &[PodEntry]) -> Vec<EndpointSlice> {
    slices(service, pods.iter(), |_| Some("z".to_owned()))
}

const DUAL: &str =
    "{selector: {app: web}, ipFamilies: [IPv4, IPv6], ports: [{port: 80, targetPort: http}]}";
const HTTP_8080: &str = "[{name: http, containerPort: 8080}]";

#[test]
fn each_family_has_a_slice_with_the_pods_port() {
    let pods = [pod("a", &["10.244.1.2", "fd00::2"], HTTP_8080)];
    let slices = slices_of(&service(DUAL), &pods);
    let seen: Vec<_> = slices
        .iter()
        .map(|s| {
            (
                s.address_type.as_str(),
                s.endpoints.as_ref().unwrap()[0].addresses[0].as_str(),
            )
        })
        .collect();
    assert_eq!(seen, [("IPv4", "10.244.1.2"), ("IPv6", "fd00::2")]);
    assert_eq!(slices[0].ports.as_ref().unwrap()[0].port, Some(8080));
    assert_eq!(
        slices[0].metadata.labels.as_ref().unwrap()[SERVICE_NAME],
        "web"
    );
}

#[test]
fn named_port_with_another_number_is_another_slice() {
    let pods = [
        pod("a", &["10.244.1.2"], HTTP_8080),
        pod("b", &["10.244.1.3"], "[{name: http, containerPort: 9090}]"),
    ];
    let spec = "{selector: {app: web}, ipFamilies: [IPv4], ports: [{port: 80, targetPort: http}]}";
    let slices = slices_of(&service(spec), &pods);
    let ports: Vec<_> = slices
        .iter()
        .map(|s| s.ports.as_ref().unwrap()[0].port.unwrap())
        .collect();
    assert_eq!(ports, [8080, 9090]);
}

#[test]
fn terminating_pod_is_serving_but_not_ready() {
    let mut terminating = pod("a", &["10.244.1.2"], HTTP_8080);
    terminating.deleting = Some((Time(Timestamp::UNIX_EPOCH), 1));
    let slices = slices_of(&service(DUAL), &[terminating]);
    let conditions = slices[0].endpoints.as_ref().unwrap()[0]
        .conditions
        .clone()
        .unwrap();
    assert_eq!(
        (conditions.ready, conditions.serving, conditions.terminating),
        (Some(false), Some(true), Some(true))
    );
}

#[test]
fn publish_not_ready_addresses_makes_endpoints_ready() {
    let mut starting = pod("a", &["10.244.1.2"], HTTP_8080);
    starting.status.ready = false;
    let spec = "{selector: {app: web}, ipFamilies: [IPv4], publishNotReadyAddresses: true}";
    let conditions = |service: &Service| {
        let slices = slices_of(service, std::slice::from_ref(&starting));
        slices[0].endpoints.as_ref().unwrap()[0]
            .conditions
            .clone()
            .unwrap()
    };
    assert_eq!(conditions(&service(DUAL)).ready, Some(false));
    assert_eq!(conditions(&service(spec)).ready, Some(true));
    assert_eq!(conditions(&service(spec)).serving, Some(false));
}

#[test]
fn pods_without_sandbox_of_other_namespaces_or_terminated_are_not_endpoints() {
    let mut pending = pod("a", &["10.244.1.2"], HTTP_8080);
    pending.status.has_sandbox = false;
    let mut succeeded = pod("b", &["10.244.1.3"], HTTP_8080);
    succeeded.status.phase = Phase::Succeeded;
    let mut in_other_namespace = pod("c", &["10.244.1.4"], HTTP_8080);
    in_other_namespace.object.metadata.namespace = Some("other".to_owned());
    let slices = slices_of(&service(DUAL), &[pending, succeeded, in_other_namespace]);
    assert_eq!(slices.len(), 2);
    assert!(
        slices
            .iter()
            .all(|slice| slice.endpoints.as_ref().unwrap().is_empty())
    );
}

#[test]
fn service_without_a_selector_has_no_generated_slices() {
    assert!(slices_of(&service("{ipFamilies: [IPv4]}"), &[]).is_empty());
}
