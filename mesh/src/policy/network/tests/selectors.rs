//! Label selectors in podSelector of the spec, podSelector of a peer and namespaceSelector.

use super::{Fixture, read_value, yaml};

/// The pods of namespace `x` that a selector selects; the same in all three fields.
fn selected(selector: &str) -> String {
    let pods = Fixture::new(&[&format!("spec: {{podSelector: {selector}}}")]);
    let restricted: Vec<&str> = ["a", "b", "c"]
        .into_iter()
        .filter(|pod| !pods.admits("y/a", &format!("x/{pod}"), 80))
        .collect();
    let peers = format!("spec: {{ingress: [{{from: [{{podSelector: {selector}}}]}}]}}");
    let peers = Fixture::new(&[&peers]);
    for pod in ["a", "b", "c"] {
        let admitted = ["x/a", "x/b"].iter().all(|to| {
            let from = format!("x/{pod}");
            from == *to || peers.admits(&from, to, 80)
        });
        assert_eq!(
            admitted,
            restricted.contains(&pod),
            "{pod} as a peer: {selector}"
        );
    }
    let namespaces = selector
        .replace("pod", "ns")
        .replace("[a", "[x")
        .replace("b]", "y]");
    let namespaces = namespaces.replace(": a}", ": x}").replace(": b}", ": y}");
    let policy = format!("spec: {{ingress: [{{from: [{{namespaceSelector: {namespaces}}}]}}]}}");
    let fixture = Fixture::new(&[&policy]);
    for (pod, namespace) in [("a", "x"), ("b", "y"), ("c", "z")] {
        let admitted = fixture.admits(&format!("{namespace}/b"), "x/a", 80);
        assert_eq!(
            admitted,
            restricted.contains(&pod),
            "{namespace}: {namespaces}"
        );
    }
    restricted.join(" ")
}

#[test]
fn each_operator_selects_as_in_kubernetes() {
    let table = [
        ("{}", "a b c"),
        ("{matchLabels: null}", "a b c"),
        ("{matchLabels: {}, matchExpressions: []}", "a b c"),
        ("{matchLabels: {pod: a}}", "a"),
        ("{matchLabels: {other: a}}", ""),
        ("{matchLabels: {pod: a, other: a}}", ""),
        (
            "{matchExpressions: [{key: pod, operator: In, values: [a]}]}",
            "a",
        ),
        (
            "{matchExpressions: [{key: pod, operator: In, values: [a, b]}]}",
            "a b",
        ),
        (
            "{matchExpressions: [{key: other, operator: In, values: [a, b]}]}",
            "",
        ),
        (
            "{matchExpressions: [{key: pod, operator: NotIn, values: [a, b]}]}",
            "c",
        ),
        (
            "{matchExpressions: [{key: other, operator: NotIn, values: [a]}]}",
            "a b c",
        ),
        (
            "{matchExpressions: [{key: pod, operator: Exists}]}",
            "a b c",
        ),
        ("{matchExpressions: [{key: other, operator: Exists}]}", ""),
        (
            "{matchExpressions: [{key: pod, operator: Exists, values: []}]}",
            "a b c",
        ),
        (
            "{matchExpressions: [{key: pod, operator: DoesNotExist}]}",
            "",
        ),
        (
            "{matchExpressions: [{key: other, operator: DoesNotExist}]}",
            "a b c",
        ),
        (
            "{matchLabels: {pod: a}, matchExpressions: [{key: pod, operator: In, values: [a, b]}]}",
            "a",
        ),
        (
            "{matchLabels: {pod: a}, matchExpressions: [{key: pod, operator: NotIn, values: [a]}]}",
            "",
        ),
        (
            "{matchExpressions: [{key: pod, operator: Exists}, {key: pod, operator: NotIn, values: [a]}]}",
            "b c",
        ),
    ];
    for (selector, expected) in table {
        assert_eq!(selected(selector), expected, "{selector}");
    }
}

#[test]
fn invalid_label_keys_and_values_are_errors() {
    let legal = [
        "{matchLabels: {app.kubernetes.io/name: web}}",
        "{matchLabels: {a: ''}}",
        "{matchLabels: {A_b.c-D: 1.2_3-x}}",
        "{matchExpressions: [{key: example.com/x, operator: In, values: ['', v1]}]}",
    ];
    for selector in legal {
        let (_, errors) = read_value(yaml(&format!("spec: {{podSelector: {selector}}}")));
        assert!(errors.is_empty(), "{selector}: {errors:?}");
    }
    let long = "x".repeat(64);
    let illegal = [
        "{matchLabels: {'': a}}",
        "{matchLabels: {'a b': a}}",
        "{matchLabels: {'-a': a}}",
        "{matchLabels: {'a/': a}}",
        "{matchLabels: {'/a': a}}",
        "{matchLabels: {'a/b/c': a}}",
        "{matchLabels: {'Example.com/a': a}}",
        "{matchLabels: {'a..b/c': a}}",
        "{matchLabels: {a: 'b c'}}",
        "{matchLabels: {a: b-}}",
        "{matchLabels: {a: 'ü'}}",
        &format!("{{matchLabels: {{{long}: a}}}}"),
        &format!("{{matchLabels: {{a: {long}}}}}"),
        "{matchExpressions: [{key: a, operator: NotIn, values: ['b c']}]}",
    ];
    for selector in illegal {
        let (policy, errors) = read_value(yaml(&format!("spec: {{podSelector: {selector}}}")));
        assert_eq!(errors.len(), 1, "{selector}: {errors:?}");
        assert!(errors[0].starts_with("bad_label@"), "{errors:?}");
        assert!(policy.selects_all(), "{selector}");
    }
}
