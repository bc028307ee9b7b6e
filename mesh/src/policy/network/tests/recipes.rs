//! Common policies and the resulting reachability: the cases of Kubernetes' NetworkPolicy conformance
//! suite, and recipes of guides.

use super::World;

#[test]
fn deny_all_ingress_of_a_namespace() {
    for spec in [
        "{podSelector: {}, policyTypes: [Ingress]}",
        "{podSelector: {}, policyTypes: [Ingress], ingress: []}",
        "{podSelector: {matchLabels: {}}}",
        "{podSelector: {}, policyTypes: [Ingress, Egress]}",
    ] {
        let world = World::new(&[&format!("spec: {spec}")]);
        world.expect("x/*", "");
        world.expect_open("y/* z/*");
    }
}

#[test]
fn deny_all_traffic_to_an_application() {
    let world = World::new(&["
metadata: {name: web-deny-all, namespace: x}
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress: []
"]);
    world.expect("x/a", "");
    world.expect_open("x/b x/c y/* z/*");
}

#[test]
fn limit_traffic_to_an_application() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - podSelector: {matchLabels: {pod: b}}
"]);
    world.expect("x/a", "x/b");
    world.expect_open("x/b x/c y/* z/*");
}

#[test]
fn allow_all_traffic_to_an_application_despite_a_default_deny() {
    let world = World::new(&[
        "{metadata: {name: default-deny-all, namespace: x}, spec: {podSelector: {}, ingress: []}}",
        "{metadata: {name: web-allow-all, namespace: x}, spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{}]}}",
    ]);
    world.expect_open("x/a y/* z/*");
    world.expect("x/b", "");
    world.expect("x/c", "");
}

#[test]
fn deny_all_traffic_from_other_namespaces() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: }
  ingress:
  - from:
    - podSelector: {}
"]);
    world.expect("x/*", "x/*");
    assert!(!world.admits("203.0.113.9", "x/a", 80));
}

#[test]
fn allow_traffic_from_all_namespaces_is_not_from_everywhere() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector: {}
"]);
    world.expect_open("x/a");
    assert!(!world.admits("203.0.113.9", "x/a", 80));
}

#[test]
fn allow_traffic_from_one_namespace() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {ns: y}}
"]);
    world.expect("x/a", "y/*");
}

#[test]
fn allow_traffic_from_some_pods_of_another_namespace() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector: {matchLabels: {ns: y}}
      podSelector: {matchLabels: {pod: b}}
"]);
    world.expect("x/a", "y/b");
}

#[test]
fn allow_traffic_from_external_clients() {
    for rule in ["- {}", "- from: []"] {
        let text =
            format!("spec:\n  podSelector: {{matchLabels: {{pod: a}}}}\n  ingress:\n  {rule}\n");
        let world = World::new(&["{spec: {podSelector: {}}}", &text]);
        world.expect_open("x/a");
        assert!(world.admits("203.0.113.9", "x/a", 80));
        assert!(world.admits("2001:db8::9", "x/a", 80));
        assert!(!world.admits("203.0.113.9", "x/b", 80));
    }
}

#[test]
fn allow_external_clients_to_one_port_only() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - ports: [{port: 80}]
    from: []
"]);
    assert!(world.admits("203.0.113.9", "x/a", 80));
    assert!(!world.admits("203.0.113.9", "x/a", 81));
}

#[test]
fn allow_traffic_only_to_a_port_of_an_application() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - ports: [{port: 81}]
    from:
    - podSelector: {matchLabels: {pod: b}}
"]);
    world.expect_on("x/a", 81, "x/b");
    world.expect_on("x/a", 80, "");
}

#[test]
fn allow_traffic_from_applications_with_several_selectors() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - podSelector: {matchLabels: {pod: b}}
    - podSelector: {matchLabels: {pod: c}}
"]);
    world.expect("x/a", "x/b x/c");
}

#[test]
fn match_expressions_select_namespaces_and_pods() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - namespaceSelector:
        matchExpressions: [{key: ns, operator: NotIn, values: [x]}]
      podSelector:
        matchExpressions: [{key: pod, operator: In, values: [b, c]}]
"]);
    world.expect("x/a", "y/b y/c z/b z/c");
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
    let world = World::new(&[&first]);
    world.expect_on("x/a", 80, "y/*");
    world.expect_on("x/a", 81, "");
    let world = World::new(&[&first, &second]);
    world.expect_on("x/a", 80, "y/*");
    world.expect_on("x/a", 81, "y/*");
}

#[test]
fn policies_with_overlapping_selectors_stack() {
    let world = World::new(&[
        "{metadata: {name: a, namespace: x}, spec: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}}",
        "{metadata: {name: b, namespace: x}, spec: {podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: z}}}]}]}}",
    ]);
    world.expect("x/a", "y/* z/*");
    world.expect("x/b", "y/* z/*");
    world.expect("x/c", "y/*");
}

#[test]
fn policy_of_udp_or_sctp_only_admits_no_tcp() {
    for protocol in ["UDP", "SCTP"] {
        let world = World::new(&[&format!(
            "spec: {{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{ports: [{{port: 80, \
             protocol: {protocol}}}]}}]}}"
        )]);
        world.expect("x/a", "");
    }
}

#[test]
fn ip_block_with_an_exception_for_one_pod() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from:
    - ipBlock: {cidr: 10.0.0.0/16, except: [10.0.2.2/32]}
"]);
    world.expect("x/a", "x/* y/a y/c z/*");
}

#[test]
fn port_range_by_end_port() {
    let world = World::new(&["
spec:
  podSelector: {matchLabels: {pod: a}}
  ingress:
  - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
    ports: [{port: 81, endPort: 90, protocol: TCP}]
"]);
    world.expect_on("x/a", 81, "y/*");
    world.expect_on("x/a", 80, "");
}

/// The example of the Kubernetes documentation.
#[test]
fn policy_of_the_kubernetes_documentation() {
    let world = World::new(&["
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
    world.expect_on("x/a", 80, "x/b y/*");
    world.expect_on("x/a", 81, "");
    assert!(world.admits("172.17.0.9", "x/a", 80));
    assert!(!world.admits("172.17.1.9", "x/a", 80));
    assert!(!world.admits("172.17.0.9", "x/a", 81));
    world.expect_open("x/b x/c y/* z/*");
}
