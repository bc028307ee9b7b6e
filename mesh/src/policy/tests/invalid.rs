//! Invalid AuthorizationPolicies never widen access.

use super::*;

/// A rule that matches `shop`, made invalid in one place, and the error. `true` if the valid rest as
/// DENY still allows `BANK`.
const RULES: [(&str, &str, bool); 49] = [
    (
        "from: [{source: {namespaces: [shop], future: [x]}}]",
        "unknown_field@spec.rules[0].from[0].source.future",
        true,
    ),
    (
        "from: [{source: {namespaces: [shop]}, future: 1}]",
        "unknown_field@spec.rules[0].from[0].future",
        true,
    ),
    (
        "{from: [{source: {namespaces: [shop]}}], future: {}}",
        "unknown_field@spec.rules[0].future",
        true,
    ),
    (
        "from: [{source: {Namespaces: [shop]}}]",
        "unknown_field@spec.rules[0].from[0].source.Namespaces",
        false,
    ),
    (
        "from: [{source: {namespaces: shop}}]",
        "bad_field@spec.rules[0].from[0].source.namespaces",
        false,
    ),
    (
        "from: [{source: {namespaces: null}}]",
        "bad_field@spec.rules[0].from[0].source.namespaces",
        false,
    ),
    (
        "from: [{source: {namespaces: []}}]",
        "empty_match@spec.rules[0].from[0].source.namespaces",
        false,
    ),
    (
        "from: [{source: {namespaces: [5]}}]",
        "bad_field@spec.rules[0].from[0].source.namespaces[0]",
        false,
    ),
    (
        "from: [{source: {namespaces: ['']}}]",
        "bad_value@spec.rules[0].from[0].source.namespaces[0]",
        false,
    ),
    (
        "from: [{source: {namespaces: ['s*p']}}]",
        "bad_value@spec.rules[0].from[0].source.namespaces[0]",
        false,
    ),
    (
        "from: [{source: {namespaces: [Shop]}}]",
        "bad_value@spec.rules[0].from[0].source.namespaces[0]",
        false,
    ),
    (
        "from: [{source: {namespaces: [shop, 'a b']}}]",
        "bad_value@spec.rules[0].from[0].source.namespaces[1]",
        false,
    ),
    (
        "from: [{source: {}}]",
        "empty_match@spec.rules[0].from[0].source",
        false,
    ),
    (
        "from: [{source: null}]",
        "bad_field@spec.rules[0].from[0].source",
        false,
    ),
    (
        "from: [{source: shop}]",
        "bad_field@spec.rules[0].from[0].source",
        false,
    ),
    (
        "from: [{}]",
        "bad_field@spec.rules[0].from[0].source",
        false,
    ),
    ("from: [null]", "bad_field@spec.rules[0].from[0]", false),
    ("from: []", "empty_match@spec.rules[0].from", false),
    ("from: null", "bad_field@spec.rules[0].from", false),
    (
        "from: {source: {namespaces: [shop]}}",
        "bad_field@spec.rules[0].from",
        false,
    ),
    (
        "from: [{source: {principals: ['spiffe://cluster.local/ns/shop/sa/web']}}]",
        "bad_value@spec.rules[0].from[0].source.principals[0]",
        false,
    ),
    (
        "from: [{source: {principals: ['cluster.local/ns/*/sa/web']}}]",
        "bad_value@spec.rules[0].from[0].source.principals[0]",
        false,
    ),
    (
        "from: [{source: {principals: ['cluster.local/ns/shop/sa/web ']}}]",
        "bad_value@spec.rules[0].from[0].source.principals[0]",
        false,
    ),
    (
        "from: [{source: {principals: ['cluster.local/ns/shop/sa/']}}]",
        "bad_value@spec.rules[0].from[0].source.principals[0]",
        false,
    ),
    (
        "from: [{source: {namespaces: [shop-]}}]",
        "bad_value@spec.rules[0].from[0].source.namespaces[0]",
        false,
    ),
    (
        "from: [{source: {ipBlocks: [10.0.0.1/33]}}]",
        "bad_value@spec.rules[0].from[0].source.ipBlocks[0]",
        false,
    ),
    (
        "from: [{source: {ipBlocks: [10.0.0]}}]",
        "bad_value@spec.rules[0].from[0].source.ipBlocks[0]",
        false,
    ),
    (
        "from: [{source: {ipBlocks: [10.0.0.1, garbage]}}]",
        "bad_value@spec.rules[0].from[0].source.ipBlocks[1]",
        false,
    ),
    // Valid negated values stay excluded.
    (
        "from: [{source: {notIpBlocks: [garbage, 10.0.0.3]}}]",
        "bad_value@spec.rules[0].from[0].source.notIpBlocks[0]",
        true,
    ),
    (
        "from: [{source: {notIpBlocks: [garbage]}}]",
        "bad_value@spec.rules[0].from[0].source.notIpBlocks[0]",
        false,
    ),
    (
        "from: [{source: {serviceAccounts: ['web*']}}]",
        "bad_value@spec.rules[0].from[0].source.serviceAccounts[0]",
        false,
    ),
    (
        "from: [{source: {serviceAccounts: [shop/a/b]}}]",
        "bad_value@spec.rules[0].from[0].source.serviceAccounts[0]",
        false,
    ),
    (
        "from: [{source: {serviceAccounts: [/web]}}]",
        "bad_value@spec.rules[0].from[0].source.serviceAccounts[0]",
        false,
    ),
    (
        "from: [{source: {serviceAccounts: [web], namespaces: [shop]}}]",
        "bad_field@spec.rules[0].from[0].source",
        false,
    ),
    (
        "from: [{source: {trustDomains: [a/b]}}]",
        "bad_value@spec.rules[0].from[0].source.trustDomains[0]",
        false,
    ),
    (
        "from: [{source: {requestPrincipals: ['']}}]",
        "bad_value@spec.rules[0].from[0].source.requestPrincipals[0]",
        false,
    ),
    (
        "to: [{operation: {ports: [8080]}}]",
        "bad_field@spec.rules[0].to[0].operation.ports[0]",
        false,
    ),
    (
        "to: [{operation: {ports: ['70000']}}]",
        "bad_value@spec.rules[0].to[0].operation.ports[0]",
        false,
    ),
    (
        "to: [{operation: {ports: ['0']}}]",
        "bad_value@spec.rules[0].to[0].operation.ports[0]",
        false,
    ),
    (
        "to: [{operation: {ports: ['+80']}}]",
        "bad_value@spec.rules[0].to[0].operation.ports[0]",
        false,
    ),
    (
        "to: [{operation: {ports: [http]}}]",
        "bad_value@spec.rules[0].to[0].operation.ports[0]",
        false,
    ),
    (
        "to: [{operation: {methods: GET}}]",
        "bad_field@spec.rules[0].to[0].operation.methods",
        false,
    ),
    (
        "when: [{key: source.namespace, value: [shop]}]",
        "unknown_field@spec.rules[0].when[0].value,empty_match@spec.rules[0].when[0]",
        false,
    ),
    (
        "when: [{key: source.namespace}]",
        "empty_match@spec.rules[0].when[0]",
        false,
    ),
    (
        "when: [{key: source.port, values: ['1']}]",
        "unknown_attribute@spec.rules[0].when[0].key",
        false,
    ),
    (
        "when: [{values: [shop]}]",
        "bad_field@spec.rules[0].when[0].key",
        false,
    ),
    (
        "when: [{key: destination.port, values: [x]}]",
        "bad_value@spec.rules[0].when[0].values[0]",
        false,
    ),
    ("when: []", "empty_match@spec.rules[0].when", false),
    (
        "when: [source.namespace]",
        "bad_field@spec.rules[0].when[0]",
        false,
    ),
];

#[test]
fn invalid_allow_rule_never_matches_and_invalid_deny_constraint_is_ignored() {
    for (rule, error, allows_bank) in RULES {
        let rule = rule
            .strip_prefix('{')
            .and_then(|r| r.strip_suffix('}'))
            .unwrap_or(rule);
        let allow = fixture(&[authz("shop/p", &format!("{{rules: [{{{rule}}}, {{}}]}}"))]);
        let deny = fixture(&[authz(
            "shop/p",
            &format!("{{action: DENY, rules: [{{{rule}}}]}}"),
        )]);
        for connection in [WEB, BANK, PLAIN] {
            assert!(
                !allow.allows("shop/db", connection),
                "ALLOW {rule}: {connection}"
            );
        }
        assert!(!deny.allows("shop/db", WEB), "DENY {rule}");
        assert_eq!(deny.allows("shop/db", BANK), allows_bank, "DENY {rule}");
        for fixture in [&allow, &deny] {
            assert_eq!(
                fixture.report("shop/p").state,
                PolicyState::Invalid,
                "{rule}"
            );
            assert_eq!(fixture.messages("shop/p").join(","), error, "{rule}");
            assert!(fixture.allows("bank/web", WEB), "{rule}");
        }
    }
}

#[test]
fn invalid_allow_policy_does_not_affect_other_allow_policies() {
    let bad = authz("shop/bad", "rules: [{from: [{source: {ipBlocks: [x]}}]}]");
    let good = authz(
        "shop/good",
        "rules: [{from: [{source: {namespaces: [shop]}}]}]",
    );
    let fixture = fixture(&[bad, good]);
    assert!(fixture.allows("shop/db", WEB) && !fixture.allows("shop/db", BANK));
}

/// A policy that would let everything in, changed as a whole: it denies everything, of the pods
/// `shop/web`, `shop/db` and `bank/web` those that are listed.
#[test]
fn wholly_invalid_policy_denies_everything_it_selects() {
    let both: &[&str] = &["shop/web", "shop/db"];
    let one: &[&str] = &["shop/db"];
    let cases: [(&str, &[&str], &str); 27] = [
        (
            "{action: DNEY, rules: [{from: [{source: {namespaces: [x]}}]}]}",
            both,
            "unknown_action@spec.action",
        ),
        (
            "{action: deny, rules: []}",
            both,
            "unknown_action@spec.action",
        ),
        (
            "{action: 1, rules: [{}]}",
            both,
            "unknown_action@spec.action",
        ),
        (
            "{action: null, rules: [{}]}",
            both,
            "unknown_action@spec.action",
        ),
        (
            "{action: LOG, selector: {matchLabels: {app: db}}}",
            one,
            "unknown_action@spec.action",
        ),
        ("{action: DENY}", both, "empty_match@spec.rules"),
        ("{action: DENY, rules: []}", both, "empty_match@spec.rules"),
        ("{action: DENY, rules: null}", both, "bad_field@spec.rules"),
        (
            "{action: DENY, rules: {from: []}}",
            both,
            "bad_field@spec.rules",
        ),
        (
            "{action: DENY, rules: [null]}",
            both,
            "bad_field@spec.rules[0]",
        ),
        (
            "{action: DENY, rules: [x]}",
            both,
            "bad_field@spec.rules[0]",
        ),
        (
            "{rules: [{}], future: 1}",
            both,
            "unknown_field@spec.future",
        ),
        (
            "{action: DENY, rules: [{from: [{source: {namespaces: [x]}}]}], future: 1}",
            both,
            "unknown_field@spec.future",
        ),
        (
            "{rules: [{}], provider: {name: x}}",
            both,
            "bad_field@spec.provider",
        ),
        (
            "{rules: [{}], selector: {matchLabels: {app: db}, matchExpressions: []}}",
            both,
            "unknown_field@spec.selector.matchExpressions",
        ),
        (
            "{rules: [{}], selector: {matchLabels: {app: 5}}}",
            both,
            "bad_field@spec.selector.matchLabels.app",
        ),
        (
            "{rules: [{}], selector: {matchLabels: {app: 'd*'}}}",
            both,
            "bad_label@spec.selector.matchLabels.app",
        ),
        (
            "{rules: [{}], selector: app=db}",
            both,
            "bad_field@spec.selector",
        ),
        (
            "{rules: [{}], selector: null}",
            both,
            "bad_field@spec.selector",
        ),
        (
            "{rules: [{}], targetRefs: []}",
            both,
            "bad_field@spec.targetRefs",
        ),
        (
            "{rules: [{}], targetRefs: [{}]}",
            both,
            "bad_field@spec.targetRefs[0].kind,bad_field@spec.targetRefs[0].name",
        ),
        (
            "{rules: [{}], targetRefs: [{kind: Service, name: x, foo: 1}]}",
            both,
            "unknown_field@spec.targetRefs[0].foo",
        ),
        (
            "{rules: [{}], targetRefs: [{kind: Service, name: x}, {kind: Service, name: ''}]}",
            both,
            "bad_field@spec.targetRefs[1].name",
        ),
        (
            "{rules: [{}], targetRefs: [{kind: 5, name: x}]}",
            both,
            "bad_field@spec.targetRefs[0].kind",
        ),
        (
            "{rules: [{}], targetRef: {name: x}}",
            both,
            "bad_field@spec.targetRef.kind",
        ),
        (
            "{rules: [{}], targetRef: {kind: Service, name: x}, targetRefs: []}",
            both,
            "bad_field@spec.targetRefs",
        ),
        (
            "{rules: [{}], selector: {matchLabels: {app: db}}, targetRefs: [{kind: Service, name: x}]}",
            one,
            "selector_and_target@spec.selector",
        ),
    ];
    for (spec, denied, error) in cases {
        let fixture = fixture(&[authz("shop/p", spec)]);
        let found: Vec<&str> = ["shop/web", "shop/db", "bank/web"]
            .into_iter()
            .filter(|pod| !fixture.allows(pod, WEB))
            .collect();
        assert_eq!(found, denied, "{spec}");
        assert_eq!(
            fixture.report("shop/p").state,
            PolicyState::Invalid,
            "{spec}"
        );
        assert_eq!(fixture.messages("shop/p").join(","), error, "{spec}");
    }
}

/// A DENY rule that never matches would only look like protection.
#[test]
fn value_that_can_never_match_is_an_error() {
    let verdicts = [
        ("cluster.local/ns/shop/sa/web", true),
        ("cluster.local/workload/x", true),
        ("CLUSTER.local/ns/shop/sa/web", true),
        ("*", true),
        ("*/sa/web", true),
        ("*web", true),
        ("*/ns/shop/sa/web", true),
        ("*p/sa/web", true),
        ("cluster.local/*", true),
        ("cluster.*", true),
        ("cluster.local/ns/*", true),
        ("cluster.local/ns/sho*", true),
        ("cluster.local/ns/shop/*", true),
        ("cluster.local/ns/shop/sa/w*", true),
        ("cluster.local", false),
        ("web", false),
        ("ns/shop/sa/web", false),
        ("/ns/shop/sa/web", false),
        ("/ns/*", false),
        ("cluster.local//ns/shop/sa/web", false),
        ("cluster.local/ns/shop/sa/web/", false),
        ("cluster.local/ns//sa/web", false),
        ("cluster.local/../sa/web", false),
        ("cluster.local/ns/./*", false),
        ("cluster.local/ns/Shop/sa/web", false),
        ("cluster.local/ns/shop/sa/Web", false),
        ("cluster.local/ns/Shop/*", false),
        ("cluster.local/ns/Sh*", false),
        ("cluster.local/ns/shop/sa/W*", false),
        ("*/", false),
        ("*//web", false),
        ("*/sa/Web", false),
        ("*Shop/sa/web", false),
    ];
    for (principal, good) in verdicts {
        let source = format!("[{{source: {{principals: ['{principal}']}}}}]");
        let fixture = fixture(&[authz(
            "shop/p",
            &format!("{{action: DENY, rules: [{{from: {source}}}]}}"),
        )]);
        let state = fixture.report("shop/p").state;
        assert_eq!(state == PolicyState::Accepted, good, "{principal}");
        assert!(good || !fixture.allows("shop/db", BANK), "{principal}");
    }
    for (namespace, good) in [
        ("s*", true),
        ("*-x", true),
        ("shop", true),
        ("-*", false),
        ("*-", false),
    ] {
        let rule = format!("rules: [{{from: [{{source: {{namespaces: ['{namespace}']}}}}]}}]");
        let fixture = fixture(&[authz("shop/p", &rule)]);
        let state = fixture.report("shop/p").state;
        assert_eq!(state == PolicyState::Accepted, good, "{namespace}");
    }
}

#[test]
fn invalid_selector_in_the_root_namespace_selects_the_mesh() {
    let fixture = fixture(&[authz("istio-system/p", "{rules: [{}], selector: 5}")]);
    assert!(
        ["shop/web", "bank/web", "istio-system/gate"]
            .iter()
            .all(|pod| !fixture.allows(pod, WEB))
    );
}

#[test]
fn envelope_of_a_policy_is_checked() {
    let open = || authz("shop/p", "rules: [{}]");
    let deny = || {
        authz(
            "shop/p",
            "{action: DENY, rules: [{to: [{operation: {ports: ['9']}}]}]}",
        )
    };
    let cases: [(Doc, &str, bool); 11] = [
        (
            open().set("apiVersion", "security.istio.io/v2"),
            "unknown_version@apiVersion",
            true,
        ),
        // In another version the constraints may mean something else.
        (
            deny().set("apiVersion", "security.istio.io/v1alpha1"),
            "unknown_version@apiVersion",
            true,
        ),
        (
            deny().set("apiVersion", "security.istio.io"),
            "unknown_version@apiVersion",
            true,
        ),
        (
            deny().set("apiVersion", Value::Null),
            "unknown_version@apiVersion",
            true,
        ),
        (
            deny().set("kind", "authorizationpolicy"),
            "bad_kind@kind",
            true,
        ),
        (open().set("rules", json!([])), "unknown_field@rules", true),
        (
            deny().set("selector", json!({})),
            "unknown_field@selector",
            false,
        ),
        (
            open().set("metadata.annotations", json!([])),
            "bad_field@metadata.annotations",
            true,
        ),
        (
            open().set("metadata.creationTimestamp", "soon"),
            "bad_field@metadata.creationTimestamp",
            true,
        ),
        (open().set("spec", Value::Null), "bad_field@spec", true),
        (open().set("spec", json!("allow")), "bad_field@spec", true),
    ];
    for (doc, error, denied) in cases {
        let fixture = fixture(std::slice::from_ref(&doc));
        assert_eq!(!fixture.allows("shop/db", WEB), denied, "{}", doc.0);
        assert_eq!(fixture.report("shop/p").state, PolicyState::Invalid);
        assert_eq!(fixture.messages("shop/p"), [error], "{}", doc.0);
    }
}

/// A policy whose DENY action may be misspelt, together with one that allows everything.
#[test]
fn possibly_misspelt_action_denies() {
    let open = authz("shop/open", "rules: [{}]");
    let lost = [
        authz("shop/p", "{actoin: DENY, rules: [{}]}"),
        authz("shop/p", "rules: [{}]").set("action", "DENY"),
        authz("shop/p", "{}").set("spec", Value::Null),
        authz("shop/p", "{}").set("spec", json!([{"action": "DENY"}])),
    ];
    for lost in lost {
        let fixture = fixture(&[open.clone(), lost.clone()]);
        assert!(!fixture.allows("shop/db", WEB), "{}", lost.0);
        assert_eq!(fixture.report("shop/p").action, "Deny");
    }
    let mut renamed = authz("shop/p", "{}").set("specs", json!({"action": "DENY"}));
    renamed.0.as_object_mut().unwrap().remove("spec");
    assert!(!fixture(&[open.clone(), renamed]).allows("shop/db", WEB));
    // An unknown field that cannot be an action does not affect other policies.
    let future = authz("shop/p", "{rules: [{}], future: [1]}");
    assert!(fixture(&[open, future]).allows("shop/db", WEB));
}

#[test]
fn both_api_versions_are_equal() {
    let doc = authz("shop/p", "rules: [{}]").set("apiVersion", "security.istio.io/v1beta1");
    let fixture = fixture(&[doc]);
    assert_eq!(fixture.report("shop/p").state, PolicyState::Accepted);
    assert!(fixture.allows("shop/db", PLAIN));
}
