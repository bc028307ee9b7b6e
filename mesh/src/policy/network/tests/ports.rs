//! `ports`: which ports a rule admits.

use super::Fixture;
use serde_json::json;

/// A policy for `x/a` that admits anyone to these ports.
fn ports(ports: &str) -> Fixture {
    Fixture::new(&[&policy(ports)])
}

fn policy(ports: &str) -> String {
    format!("spec: {{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{ports: {ports}}}]}}")
}

/// Which of some ports are open.
fn open(fixture: &Fixture) -> Vec<u16> {
    let candidates = [1, 79, 80, 81, 82, 443, 8080, 15008, 65535];
    let open = |port: &u16| fixture.admits("y/a", "x/a", *port);
    candidates.into_iter().filter(open).collect()
}

#[test]
fn each_form_of_a_port_admits_its_ports() {
    let all: &[u16] = &[1, 79, 80, 81, 82, 443, 8080, 15008, 65535];
    let table: [(&str, &[u16]); 22] = [
        ("null", all),
        ("[]", all),
        ("[{}]", all),
        ("[{protocol: TCP}]", all),
        ("[{port: 80}]", &[80]),
        ("[{port: 80, protocol: TCP}]", &[80]),
        ("[{port: 80}, {port: 443}]", &[80, 443]),
        ("[{port: 80, endPort: 80}]", &[80]),
        ("[{port: 80, endPort: 443}]", &[80, 81, 82, 443]),
        ("[{port: 1, endPort: 65535}]", all),
        ("[{port: 65535}]", &[65535]),
        ("[{port: serve-80}]", &[80]),
        ("[{port: serve-81, protocol: TCP}]", &[81]),
        ("[{port: unknown}]", &[]),
        ("[{protocol: UDP}]", &[]),
        ("[{protocol: SCTP}]", &[]),
        ("[{port: 80, protocol: UDP}]", &[]),
        ("[{port: serve-80, protocol: UDP}]", &[]),
        ("[{port: 79, endPort: 82, protocol: SCTP}]", &[]),
        ("[{protocol: UDP}, {port: 81}]", &[81]),
        ("[{port: 81}, {protocol: TCP}]", all),
        // The tunnel's port has no special meaning: the application's port is checked.
        ("[{port: 15008}]", &[15008]),
    ];
    for (text, expected) in table {
        assert_eq!(open(&ports(text)), expected, "{text}");
    }
}

#[test]
fn port_name_is_resolved_at_the_destination_pod() {
    let named = |first: u16, second: u16| {
        Fixture::changed(
            &["spec: {ingress: [{ports: [{port: http}]}]}"],
            move |docs| {
                for (pod, port) in [("a", first), ("b", second)] {
                    let doc = docs.iter_mut().find(|doc| {
                        doc.0["metadata"]["namespace"] == "x" && doc.0["metadata"]["name"] == pod
                    });
                    doc.expect("the pod").0["spec"]["containers"][0]["ports"] =
                        json!([{"name": "http", "containerPort": port}]);
                }
            },
        )
    };
    let fixture = named(80, 81);
    let reached = |to: &str, port| fixture.admits("y/a", to, port);
    assert!(reached("x/a", 80) && !reached("x/a", 81));
    assert!(reached("x/b", 81) && !reached("x/b", 80));
    assert!(!reached("x/c", 80), "it has no port of that name");
}

#[test]
fn name_of_a_udp_port_admits_no_tcp_port() {
    let fixture = Fixture::changed(&[&policy("[{port: dns}]")], |docs| {
        for doc in docs.iter_mut().filter(|doc| doc.0["kind"] == "Pod") {
            doc.0["spec"]["containers"][0]["ports"] =
                json!([{"name": "dns", "containerPort": 53, "protocol": "UDP"}]);
        }
    });
    assert!(!fixture.admits("y/a", "x/a", 53));
}

#[test]
fn from_and_ports_of_one_rule_are_anded_and_rules_are_ored() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
    ports: [{port: 80}]
  - from: [{podSelector: {}}]
    ports: [{port: 81}]
"]);
    fixture.expect_on("x/a", 80, "y/*");
    fixture.expect_on("x/a", 81, "x/*");
}
