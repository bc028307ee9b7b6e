//! Common policies and the resulting reachability: the cases of Kubernetes' NetworkPolicy conformance
//! suite, and recipes of guides.

use super::Fixture;

#[test]
fn deny_all_ingress_of_a_namespace() {
    for spec in [
        "{podSelector: {}, policyTypes: [Ingress]}",
        "{podSelector: {}, policyTypes: [Ingress], ingress: []}",
        "{podSelector: {matchLabels: {}}}",
        "{podSelector: {}, policyTypes: [Ingress, Egress]}",
    ] {
        let fixture = Fixture::new(&[&format!("spec: {spec}")]);
        fixture.expect("x/*", "");
        fixture.expect_open("y/* z/*");
    }
}

#[test]
fn deny_all_traffic_to_an_application() {
    let fixture = Fixture::new(&["
metadata: {name: web-deny-all, namespace: x}
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress: []
"]);
    fixture.expect("x/a", "");
    fixture.expect_open("x/b x/c y/* z/*");
}

#[test]
fn limit_traffic_to_an_application() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - podSelector: {matchLabels: {pod: b}}
"]);
    fixture.expect("x/a", "x/b");
    fixture.expect_open("x/b x/c y/* z/*");
}

#[test]
fn allow_all_traffic_to_an_application_despite_a_default_deny() {
    let fixture = Fixture::new(&[
        "{metadata: {name: default-deny-all, namespace: x}, spec: {podSelector: {}, ingress: []}}",
        "{metadata: {name: web-allow-all, namespace: x}, spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{}]}}",
    ]);
    fixture.expect_open("x/a y/* z/*");
    fixture.expect("x/b", "");
    fixture.expect("x/c", "");
}

#[test]
fn deny_all_traffic_from_other_namespaces() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: }
  ingress:
  - from:
    - podSelector: {}
"]);
    fixture.expect("x/*", "x/*");
    assert!(!fixture.admits("203.0.113.9", "x/a", 80));
}

#[test]
fn allow_traffic_from_all_namespaces_is_not_from_everywhere() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector: {}
"]);
    fixture.expect_open("x/a");
    assert!(!fixture.admits("203.0.113.9", "x/a", 80));
}

#[test]
fn allow_traffic_from_one_namespace() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {ns: y}}
"]);
    fixture.expect("x/a", "y/*");
}

#[test]
fn allow_traffic_from_some_pods_of_another_namespace() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {ns: y}}
      podSelector: {matchLabels: {pod: b}}
"]);
    fixture.expect("x/a", "y/b");
}

#[test]
fn allow_traffic_from_external_clients() {
    for rule in ["- {}", "- from: []"] {
        let text =
            format!("spec:\n  podSelector: {{matchLabels: {{pod: a}}}}\n  ingress:\n  {rule}\n");
        let fixture = Fixture::new(&["{spec: {podSelector: {}}}", &text]);
        fixture.expect_open("x/a");
        assert!(fixture.admits("203.0.113.9", "x/a", 80));
        assert!(fixture.admits("2001:db8::9", "x/a", 80));
        assert!(!fixture.admits("203.0.113.9", "x/b", 80));
    }
}

#[test]
fn allow_external_clients_to_one_port_only() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - ports: [{port: 80}]
    from: []
"]);
    assert!(fixture.admits("203.0.113.9", "x/a", 80));
    assert!(!fixture.admits("203.0.113.9", "x/a", 81));
}

#[test]
fn allow_traffic_only_to_a_port_of_an_application() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - ports: [{port: 81}]
    from:
    - podSelector: {matchLabels: {pod: b}}
"]);
    fixture.expect_on("x/a", 81, "x/b");
    fixture.expect_on("x/a", 80, "");
}

#[test]
fn allow_traffic_from_applications_with_several_selectors() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - podSelector: {matchLabels: {pod: b}}
    - podSelector: {matchLabels: {pod: c}}
"]);
    fixture.expect("x/a", "x/b x/c");
}

#[test]
fn match_expressions_select_namespaces_and_pods() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector:
        matchExpressions: [{key: ns, operator: NotIn, values: [x]}]
      podSelector:
        matchExpressions: [{key: pod, operator: In, values: [b, c]}]
"]);
    fixture.expect("x/a", "y/b y/c z/b z/c");
}

#[test]
fn policies_of_several_ports_stack() {
    let policy = |name: &str, port: u16| {
        format!(
            "
metadata: {{name: {name}, namespace: x}}
spec:
  podSelector: {{matchLabels: {{pod: a}}}}
  ingress:
  - from: [{{namespaceSelector: {{matchLabels: {{ns: y}}}}}}]
    ports: [{{port: {port}}}]
"
        )
    };
    let (first, second) = (policy("allow-80", 80), policy("allow-81", 81));
    let fixture = Fixture::new(&[&first]);
    fixture.expect_on("x/a", 80, "y/*");
    fixture.expect_on("x/a", 81, "");
    let fixture = Fixture::new(&[&first, &second]);
    fixture.expect_on("x/a", 80, "y/*");
    fixture.expect_on("x/a", 81, "y/*");
}

#[test]
fn policies_with_overlapping_selectors_stack() {
    let fixture = Fixture::new(&[
        "{metadata: {name: a, namespace: x}, spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}}",
        "{metadata: {name: b, namespace: x}, spec: {podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}}",
    ]);
    fixture.expect("x/a", "y/* z/*");
    fixture.expect("x/b", "y/* z/*");
    fixture.expect("x/c", "y/*");
}

#[test]
fn policy_of_udp_or_sctp_only_admits_no_tcp() {
    for protocol in ["UDP", "SCTP"] {
        let fixture = Fixture::new(&[&format!(
            "spec: {{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{ports: [{{port: 80, \
             protocol: {protocol}}}]}}]}}"
        )]);
        fixture.expect("x/a", "");
    }
}

#[test]
fn ip_block_with_an_exception_for_one_pod() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - ipBlock: {cidr: 10.0.0.0/16, except: [10.0.2.2/32]}
"]);
    fixture.expect("x/a", "x/* y/a y/c z/*");
}

#[test]
fn port_range_by_end_port() {
    let fixture = Fixture::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
    ports: [{port: 81, endPort: 90, protocol: TCP}]
"]);
    fixture.expect_on("x/a", 81, "y/*");
    fixture.expect_on("x/a", 80, "");
}

/// The example of the Kubernetes documentation.
#[test]
fn policy_of_the_kubernetes_documentation() {
    let fixture = Fixture::new(&["
metadata: {name: test-network-policy, namespace: x}
spec:
  podSelector: {matchLabels: {pod: a}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from:
    - ipBlock: {cidr: 172.17.0.0/16, except: [172.17.1.0/24]}
    - namespaceSelector: {matchLabels: {ns: y}}
    - podSelector: {matchLabels: {pod: b}}
    ports: [{protocol: TCP, port: 80}]
  egress:
  - to: [{ipBlock: {cidr: 10.0.0.0/24}}]
    ports: [{protocol: TCP, port: 5978}]
"]);
    fixture.expect_on("x/a", 80, "x/b y/*");
    fixture.expect_on("x/a", 81, "");
    assert!(fixture.admits("172.17.0.9", "x/a", 80));
    assert!(!fixture.admits("172.17.1.9", "x/a", 80));
    assert!(!fixture.admits("172.17.0.9", "x/a", 81));
    fixture.expect_open("x/b x/c y/* z/*");
}
