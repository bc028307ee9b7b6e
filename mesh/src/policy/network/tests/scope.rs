//! Which pods a policy restricts.

use super::{Fixture, read_value, yaml};

#[test]
fn pod_without_a_policy_accepts_everything() {
    Fixture::new(&[]).expect_open("x/* y/* z/*");
}

#[test]
fn policy_selects_pods_of_its_own_namespace_only() {
    let fixture = Fixture::new(&["spec: {podSelector: {}}"]);
    fixture.expect("x/*", "");
    fixture.expect_open("y/* z/*");
}

#[test]
fn policy_without_a_namespace_is_in_default() {
    let (policy, errors) = read_value(yaml("{metadata: {name: n}, spec: {podSelector: {}}}"));
    assert!(errors.is_empty());
    assert_eq!(&*policy.namespace, "default");
}

#[test]
fn missing_or_empty_pod_selector_selects_all_pods_of_the_namespace() {
    for spec in ["{}", "{podSelector: null}", "{podSelector: {}}", "null"] {
        let fixture = Fixture::new(&[&format!("spec: {spec}")]);
        fixture.expect("x/*", "");
        fixture.expect_open("y/* z/*");
    }
}

#[test]
fn pod_selector_selects_by_label() {
    let fixture = Fixture::new(&["spec: {podSelector: {matchLabels: {pod: a}}}"]);
    fixture.expect("x/a", "");
    fixture.expect_open("x/b x/c y/* z/*");
}

#[test]
fn pod_always_reaches_itself() {
    let fixture = Fixture::new(&["spec: {podSelector: {}}"]);
    assert!(fixture.admits("x/a", "x/a", 80));
    assert!(!fixture.admits("x/b", "x/a", 80));
}

#[test]
fn no_rule_admits_nothing_and_an_empty_rule_admits_everything() {
    let table = [
        ("{}", ""),
        ("{ingress: null}", ""),
        ("{ingress: []}", ""),
        ("{ingress: [{}]}", "x/* y/* z/*"),
        ("{ingress: [{from: [], ports: []}]}", "x/* y/* z/*"),
        ("{ingress: [{from: null, ports: null}]}", "x/* y/* z/*"),
    ];
    for (spec, sources) in table {
        let fixture = Fixture::new(&[&format!("spec: {spec}")]);
        fixture.expect("x/a", sources);
        assert_eq!(
            fixture.admits("203.0.113.9", "x/a", 80),
            !sources.is_empty(),
            "{spec}"
        );
    }
}

#[test]
fn policy_types_decide_whether_ingress_is_restricted() {
    let egress = "egress: [{}]";
    let table = [
        ("{}", true),
        ("{policyTypes: null}", true),
        ("{policyTypes: []}", true),
        ("{policyTypes: [Ingress]}", true),
        ("{policyTypes: [Ingress, Egress]}", true),
        ("{policyTypes: [Egress, Ingress]}", true),
        ("{policyTypes: [Egress]}", false),
        // Rules of a direction outside policyTypes are ignored.
        ("{policyTypes: [Egress], ingress: []}", false),
        // A policy with egress rules and without types restricts both.
        (&format!("{{{egress}}}"), true),
        (&format!("{{policyTypes: [Egress], {egress}}}"), false),
    ];
    for (spec, restricts) in table {
        let fixture = Fixture::new(&[&format!("spec: {spec}")]);
        assert_eq!(!fixture.admits("y/a", "x/a", 80), restricts, "{spec}");
    }
}

#[test]
fn egress_is_not_enforced_and_reported() {
    let table = [
        ("{}", None),
        ("{egress: []}", None),
        ("{policyTypes: [Ingress], egress: [{}]}", None),
        (
            "{egress: [{}]}",
            Some("egress is left to the CNI and not enforced by the mesh; its ingress side is"),
        ),
        (
            "{policyTypes: [Egress]}",
            Some(
                "egress is left to the CNI and not enforced by the mesh; it restricts nothing here",
            ),
        ),
    ];
    for (spec, expected) in table {
        let diagnostics = Fixture::new(&[&format!("spec: {spec}")]).diagnostics;
        let message = diagnostics
            .first()
            .map(|diagnostic| diagnostic.message.as_str());
        assert_eq!(message, expected, "{spec}");
        assert!(diagnostics.iter().all(|p| p.code == "egress_not_enforced"));
    }
}

#[test]
fn policies_of_one_pod_add_up() {
    let from = |pod: &str| {
        format!(
            "spec: {{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{from: [{{podSelector: \
             {{matchLabels: {{pod: {pod}}}}}}}]}}]}}"
        )
    };
    let (b, c) = (from("b"), from("c"));
    Fixture::new(&[&b]).expect("x/a", "x/b");
    Fixture::new(&[&b, &c]).expect("x/a", "x/b x/c");
    Fixture::new(&[&b, "spec: {}"]).expect("x/a", "x/b");
    Fixture::new(&[&b, "spec: {ingress: [{}]}"]).expect("x/a", "x/* y/* z/*");
    // An egress-only policy neither restricts nor opens ingress.
    Fixture::new(&[&b, "spec: {policyTypes: [Egress]}"]).expect("x/a", "x/b");
    Fixture::new(&["spec: {policyTypes: [Egress]}"]).expect_open("x/a");
}

#[test]
fn denial_names_the_policies_of_the_pod() {
    let denial = |names: &[&str]| {
        let policies: Vec<String> = names
            .iter()
            .map(|name| format!("{{metadata: {{namespace: x, name: {name}}}, spec: {{}}}}"))
            .collect();
        let policies: Vec<&str> = policies.iter().map(String::as_str).collect();
        let fixture = Fixture::new(&policies);
        let denial = fixture.decide("y/a", "x/a", 80).expect_err("it is denied");
        denial.policy.to_string()
    };
    assert_eq!(
        denial(&["only-web"]),
        "NetworkPolicy: no ingress rule matched (x/only-web)"
    );
    assert_eq!(
        denial(&["a", "b"]),
        "NetworkPolicy: no ingress rule matched (x/a, x/b)"
    );
    assert_eq!(
        denial(&["a", "b", "c", "d", "e", "f"]),
        "NetworkPolicy: no ingress rule matched (x/a, x/b, x/c, x/d and 2 more)"
    );
}

#[test]
fn required_label_is_one_that_all_selected_pods_have() {
    let required = |selector: &str| {
        let (policy, _) = read_value(yaml(&format!("spec: {{podSelector: {selector}}}")));
        let label = policy.required_label();
        label.map(|(key, value)| format!("{key}={value}"))
    };
    assert_eq!(required("{}"), None);
    assert_eq!(
        required("{matchLabels: {app: web}}").as_deref(),
        Some("app=web")
    );
    let expression = |rest: &str| format!("{{matchExpressions: [{{key: app, {rest}}}]}}");
    assert_eq!(
        required(&expression("operator: In, values: [web]")).as_deref(),
        Some("app=web")
    );
    assert_eq!(
        required(&expression("operator: In, values: [web, db]")),
        None
    );
    assert_eq!(
        required(&expression("operator: NotIn, values: [web]")),
        None
    );
    assert_eq!(required(&expression("operator: Exists")), None);
    assert_eq!(required("{matchLabels: {app: 7}}"), None);
}
