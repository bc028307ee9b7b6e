//! An invalid NetworkPolicy denies what it selects, and its errors are reported.

use super::{Fixture, read_value, yaml};

/// Policies with one error, at this field. The rest of each policy would admit every source.
const INVALID: [(&str, &str); 66] = [
    ("spec: []", "bad_field@spec"),
    ("spec: text", "bad_field@spec"),
    ("Spec: {}", "unknown_field@Spec"),
    (
        "apiVersion: networking.k8s.io/v2",
        "unknown_version@apiVersion",
    ),
    (
        "apiVersion: extensions/v1beta1",
        "unknown_version@apiVersion",
    ),
    (
        "spec: {ingress: [{}], priority: 5}",
        "unknown_field@spec.priority",
    ),
    (
        "spec: {ingress: [{}], Egress: []}",
        "unknown_field@spec.Egress",
    ),
    (
        "spec: {ingress: [{}], policyTypes: Ingress}",
        "bad_field@spec.policyTypes",
    ),
    (
        "spec: {ingress: [{}], policyTypes: [ingress]}",
        "bad_value@spec.policyTypes[0]",
    ),
    (
        "spec: {ingress: [{}], policyTypes: [Egress, Both]}",
        "bad_value@spec.policyTypes[1]",
    ),
    (
        "spec: {ingress: [{}], policyTypes: [null]}",
        "bad_value@spec.policyTypes[0]",
    ),
    (
        "spec: {ingress: [{}], podSelector: a}",
        "bad_field@spec.podSelector",
    ),
    (
        "spec: {ingress: [{}], podSelector: [a]}",
        "bad_field@spec.podSelector",
    ),
    (
        "spec: {ingress: [{}], podSelector: {app: web}}",
        "unknown_field@spec.podSelector.app",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchLabels: [a]}}",
        "bad_field@spec.podSelector.matchLabels",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchLabels: {a: 1}}}",
        "bad_field@spec.podSelector.matchLabels.a",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchLabels: {a: null}}}",
        "bad_field@spec.podSelector.matchLabels.a",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: {}}}",
        "bad_field@spec.podSelector.matchExpressions",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a}]}}",
        "bad_field@spec.podSelector.matchExpressions[0].operator",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{operator: Exists}]}}",
        "bad_field@spec.podSelector.matchExpressions[0].key",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}",
        "bad_selector@spec.podSelector.matchExpressions[0].operator",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}",
        "bad_selector@spec.podSelector.matchExpressions[0].operator",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: In}]}}",
        "bad_selector@spec.podSelector.matchExpressions[0]",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: NotIn, values: []}]}}",
        "bad_selector@spec.podSelector.matchExpressions[0]",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
        "bad_selector@spec.podSelector.matchExpressions[0]",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: DoesNotExist, values: [b]}]}}",
        "bad_selector@spec.podSelector.matchExpressions[0]",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: In, values: [1]}]}}",
        "bad_field@spec.podSelector.matchExpressions[0].values[0]",
    ),
    (
        "spec: {ingress: [{}], podSelector: {matchExpressions: [{key: a, operator: Exists, value: b}]}}",
        "unknown_field@spec.podSelector.matchExpressions[0].value",
    ),
    ("spec: {ingress: {}}", "bad_field@spec.ingress"),
    ("spec: {ingress: [null]}", "empty_item@spec.ingress[0]"),
    ("spec: {ingress: [{}, all]}", "bad_field@spec.ingress[1]"),
    (
        "spec: {ingress: [{}, {source: []}]}",
        "unknown_field@spec.ingress[1].source",
    ),
    (
        "spec: {ingress: [{}, {to: []}]}",
        "unknown_field@spec.ingress[1].to",
    ),
    (
        "spec: {ingress: [{}, {from: {}}]}",
        "bad_field@spec.ingress[1].from",
    ),
    (
        "spec: {ingress: [{}, {from: [null]}]}",
        "empty_peer@spec.ingress[1].from[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{}]}]}",
        "empty_peer@spec.ingress[1].from[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [everyone]}]}",
        "bad_field@spec.ingress[1].from[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{podSelector: null}]}]}",
        "empty_peer@spec.ingress[1].from[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{podSelector: x}]}]}",
        "bad_field@spec.ingress[1].from[0].podSelector",
    ),
    (
        "spec: {ingress: [{}, {from: [{namespaceSelector: {ns: y}}]}]}",
        "unknown_field@spec.ingress[1].from[0].namespaceSelector.ns",
    ),
    (
        "spec: {ingress: [{}, {from: [{podSelector: {}, serviceAccount: a}]}]}",
        "unknown_field@spec.ingress[1].from[0].serviceAccount",
    ),
    (
        "spec: {ingress: [{}, {from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "ambiguous_peer@spec.ingress[1].from[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{namespaceSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
        "ambiguous_peer@spec.ingress[1].from[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: 10.0.0.0/8}]}]}",
        "bad_field@spec.ingress[1].from[0].ipBlock",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0}}]}]}",
        "bad_cidr@spec.ingress[1].from[0].ipBlock.cidr",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: ''}}]}]}",
        "bad_cidr@spec.ingress[1].from[0].ipBlock.cidr",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {except: []}}]}]}",
        "bad_field@spec.ingress[1].from[0].ipBlock.cidr",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0/8, exclude: []}}]}]}",
        "unknown_field@spec.ingress[1].from[0].ipBlock.exclude",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0/8, except: 10.0.1.0/24}}]}]}",
        "bad_field@spec.ingress[1].from[0].ipBlock.except",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.1.0]}}]}]}",
        "bad_cidr@spec.ingress[1].from[0].ipBlock.except[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/24]}}]}]}",
        "bad_except@spec.ingress[1].from[0].ipBlock.except[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
        "bad_except@spec.ingress[1].from[0].ipBlock.except[0]",
    ),
    (
        "spec: {ingress: [{}, {from: [{ipBlock: {cidr: '::/0', except: [10.0.0.0/8]}}]}]}",
        "bad_except@spec.ingress[1].from[0].ipBlock.except[0]",
    ),
    (
        "spec: {ingress: [{}, {ports: {}}]}",
        "bad_field@spec.ingress[1].ports",
    ),
    (
        "spec: {ingress: [{}, {ports: [null]}]}",
        "empty_item@spec.ingress[1].ports[0]",
    ),
    (
        "spec: {ingress: [{}, {ports: [80]}]}",
        "bad_field@spec.ingress[1].ports[0]",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: 0}]}]}",
        "bad_port@spec.ingress[1].ports[0].port",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: 65536}]}]}",
        "bad_port@spec.ingress[1].ports[0].port",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: '80'}]}]}",
        "bad_port@spec.ingress[1].ports[0].port",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: HTTP}]}]}",
        "bad_port@spec.ingress[1].ports[0].port",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: 80, endPort: 79}]}]}",
        "bad_port@spec.ingress[1].ports[0].endPort",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: http, endPort: 90}]}]}",
        "bad_port@spec.ingress[1].ports[0].endPort",
    ),
    (
        "spec: {ingress: [{}, {ports: [{endPort: 90}]}]}",
        "bad_port@spec.ingress[1].ports[0].endPort",
    ),
    (
        "spec: {ingress: [{}, {ports: [{protocol: tcp}]}]}",
        "bad_protocol@spec.ingress[1].ports[0].protocol",
    ),
    (
        "spec: {ingress: [{}, {ports: [{protocol: ICMP}]}]}",
        "bad_protocol@spec.ingress[1].ports[0].protocol",
    ),
    (
        "spec: {ingress: [{}, {ports: [{port: 80, name: http}]}]}",
        "unknown_field@spec.ingress[1].ports[0].name",
    ),
];

#[test]
fn each_error_is_reported_with_its_field() {
    for (text, expected) in INVALID {
        let (_, errors) = read_value(yaml(text));
        assert_eq!(errors, [expected], "{text}");
    }
}

#[test]
fn invalid_policy_admits_nothing() {
    for (text, _) in INVALID {
        let fixture = Fixture::with_errors(&[text]);
        fixture.expect("x/a", "");
        assert!(!fixture.admits("203.0.113.9", "x/a", 80), "{text}");
        fixture.expect_open("y/* z/*");
    }
}

#[test]
fn invalid_policy_does_not_affect_other_policies() {
    let other = "spec: {ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}";
    for (text, _) in INVALID {
        Fixture::with_errors(&[text, other]).expect("x/a", "x/b");
    }
}

#[test]
fn invalid_policy_keeps_a_valid_selector() {
    let fixture = Fixture::with_errors(&[
        "spec: {podSelector: {matchLabels: {pod: a}}, ingress: [{from: [{ipBlock: {cidr: x}}]}]}",
    ]);
    fixture.expect("x/a", "");
    fixture.expect_open("x/b x/c");
}

#[test]
fn invalid_selector_selects_the_namespace() {
    let fixture = Fixture::with_errors(&[
        "spec: {podSelector: {matchLabels: {pod: a}, matchFields: {}}, ingress: [{}]}",
    ]);
    fixture.expect("x/*", "");
    fixture.expect_open("y/* z/*");
}

#[test]
fn all_errors_of_a_policy_are_reported() {
    let (_, errors) = read_value(yaml(
        "
spec:
  podSelector: {matchLabels: {a: 1, b: 2}}
  ingress:
  - from: [{ipBlock: {cidr: x}}, {}]
    ports: [{port: 0}, {protocol: x}]
",
    ));
    assert_eq!(
        errors,
        [
            "bad_field@spec.podSelector.matchLabels.a",
            "bad_field@spec.podSelector.matchLabels.b",
            "bad_cidr@spec.ingress[0].from[0].ipBlock.cidr",
            "empty_peer@spec.ingress[0].from[1]",
            "bad_port@spec.ingress[0].ports[0].port",
            "bad_protocol@spec.ingress[0].ports[1].protocol",
        ]
    );
}

#[test]
fn egress_only_policy_does_not_restrict_ingress_after_an_error_in_unused_fields() {
    // `policyTypes` is valid and does not list ingress.
    let table = [
        "spec: {policyTypes: [Egress], podSelector: {app: web}}",
        "spec: {policyTypes: [Egress], ingress: [null]}",
    ];
    for text in table {
        assert_eq!(read_value(yaml(text)).1.len(), 1, "{text}");
        Fixture::with_errors(&[text]).expect_open("x/a");
    }
    // An unknown field may be about ingress.
    let table = [
        "spec: {policyTypes: [Egress], direction: both}",
        "spec: {policyTypes: [Egress, Everything]}",
        "{apiVersion: networking.k8s.io/v9, spec: {policyTypes: [Egress]}}",
    ];
    for text in table {
        Fixture::with_errors(&[text]).expect("x/a", "");
    }
}

#[test]
fn egress_rules_are_not_read() {
    let text = "spec: {policyTypes: [Ingress, Egress], ingress: [{}], egress: [{to: [{x: 1}]}]}";
    let (_, errors) = read_value(yaml(text));
    assert!(errors.is_empty(), "{errors:?}");
    Fixture::new(&[text]).expect_open("x/*");
}
