//! Which workloads a policy applies to, and which of several policies decides.

use super::*;

const ALLOW_SHOP: &str = "rules: [{from: [{source: {namespaces: [shop]}}]}]";
const DENY_ALL: &str = "{action: DENY, rules: [{}]}";
const ALL: [&str; 4] = ["shop/web", "shop/db", "bank/web", "istio-system/gate"];

/// The pods that deny `BANK`.
fn denied(policies: &[Doc]) -> Vec<&'static str> {
    let fixture = fixture(policies);
    ALL.into_iter()
        .filter(|pod| !fixture.allows(pod, BANK))
        .collect()
}

#[test]
fn without_policies_everything_is_allowed() {
    let fixture = fixture(&[]);
    assert!(ALL.iter().all(|pod| fixture.allows(pod, PLAIN)));
    assert!(fixture.workload("shop/web").policies.is_empty());
}

#[test]
fn policy_applies_to_its_namespace_its_selector_or_the_mesh() {
    let selecting = |labels: &str| {
        format!("{{selector: {{matchLabels: {labels}}}, action: DENY, rules: [{{}}]}}")
    };
    let cases: [(&str, &str, &[&str]); 9] = [
        ("shop/p", "", &["shop/web", "shop/db"]),
        ("bank/p", "", &["bank/web"]),
        ("nowhere/p", "", &[]),
        ("istio-system/p", "", &ALL),
        ("shop/p", "{app: web}", &["shop/web"]),
        ("shop/p", "{app: web, version: v2}", &[]),
        ("bank/p", "{version: v1}", &[]),
        // In the root namespace a selector matches pods of all namespaces.
        ("istio-system/p", "{app: web}", &["shop/web", "bank/web"]),
        ("shop/p", "{}", &["shop/web", "shop/db"]),
    ];
    for (name, labels, expected) in cases {
        let spec = match labels {
            "" => DENY_ALL.to_owned(),
            labels => selecting(labels),
        };
        assert_eq!(denied(&[authz(name, &spec)]), expected, "{name} {labels}");
        assert_eq!(
            denied(&[authz(
                name,
                &spec.replace("DENY", "ALLOW").replace("{}]", "]")
            )]),
            expected
        );
    }
}

#[test]
fn root_namespace_is_configurable() {
    let mut params = params();
    params.root_namespace = "bank".into();
    let fixture = fixture_with(&[authz("bank/p", DENY_ALL)], &params);
    assert!(ALL.iter().all(|pod| !fixture.allows(pod, WEB)));
}

/// Three scopes times two actions: every pair of policies at one pod.
#[test]
fn deny_overrides_allow_and_allows_add_up_across_scopes() {
    let scopes = [
        ("istio-system/", ""),
        ("shop/", ""),
        ("shop/", "selector: {matchLabels: {app: db}}, "),
    ];
    let spec = |selector: &str, action: &str, namespace: &str| {
        format!(
            "{{{selector}action: {action}, rules: [{{from: [{{source: {{namespaces: [{namespace}]}}}}]}}]}}"
        )
    };
    for (first, a) in scopes {
        for (second, b) in scopes {
            let allow = authz(&format!("{first}a"), &spec(a, "ALLOW", "'*'"));
            let deny = authz(&format!("{second}b"), &spec(b, "DENY", "bank"));
            let fixture = fixture(&[allow.clone(), deny]);
            let denial = Some(format!("AuthorizationPolicy {second}b"));
            assert_eq!(fixture.denial("shop/db", BANK), denial);
            assert_eq!(fixture.denial("shop/db", WEB), None);

            let shop = authz(&format!("{first}a"), &spec(a, "ALLOW", "shop"));
            let bank = authz(&format!("{second}b"), &spec(b, "ALLOW", "bank"));
            let fixture = super::fixture(&[shop, bank]);
            assert!(fixture.allows("shop/db", WEB) && fixture.allows("shop/db", BANK));
            assert!(!fixture.allows("shop/db", PLAIN));
        }
    }
}

#[test]
fn allow_policy_of_another_scope_has_no_effect() {
    let fixture = fixture(&[authz("bank/p", ALLOW_SHOP)]);
    assert!(fixture.allows("shop/web", BANK) && !fixture.allows("bank/web", BANK));
}

#[test]
fn empty_spec_allows_nothing() {
    let mut without_spec = authz("shop/p", "{}");
    without_spec.0.as_object_mut().unwrap().remove("spec");
    for policy in [
        authz("shop/p", "{}"),
        authz("shop/p", "rules: []"),
        without_spec,
    ] {
        let fixture = fixture(&[policy]);
        assert_eq!(fixture.report("shop/p").state, PolicyState::Accepted);
        assert!(!fixture.allows("shop/web", WEB) && fixture.allows("bank/web", WEB));
    }
}

#[test]
fn denial_names_the_first_policy_by_scope_and_name() {
    let policies = [
        authz("shop/b", DENY_ALL),
        authz("shop/a", DENY_ALL),
        authz("istio-system/z", DENY_ALL),
    ];
    let name = |policies: &[Doc]| fixture(policies).denial("shop/web", WEB).unwrap();
    assert_eq!(name(&policies), "AuthorizationPolicy istio-system/z");
    assert_eq!(name(&policies[..2]), "AuthorizationPolicy shop/a");
}

/// Strict port, DENY rule, no matching ALLOW, no matching ingress rule: the order of the checks.
#[test]
fn checks_run_in_order_peer_deny_allow_network() {
    let strict = policy("PeerAuthentication", "shop/strict", "mtls: {mode: STRICT}");
    let deny = authz("shop/deny", DENY_ALL);
    let allow = authz("shop/allow", "{}");
    let network = policy(
        "NetworkPolicy",
        "shop/net",
        "{podSelector: {}, ingress: []}",
    );
    let mut policies = vec![network, allow, deny, strict];
    let mut names = Vec::new();
    while !policies.is_empty() {
        names.extend(fixture(&policies).denial("shop/web", PLAIN));
        policies.pop();
    }
    assert_eq!(
        names,
        [
            "PeerAuthentication shop/strict",
            "AuthorizationPolicy shop/deny",
            "AuthorizationPolicy: no ALLOW matched",
            "NetworkPolicy: no ingress rule matched (shop/net)",
        ]
    );
}

#[test]
fn disabled_network_policies_are_not_enforced() {
    let network = policy(
        "NetworkPolicy",
        "shop/net",
        "{podSelector: {}, ingress: []}",
    );
    let mut params = params();
    params.network_policy = false;
    let fixture = fixture_with(&[network], &params);
    assert!(fixture.allows("shop/web", PLAIN));
    let report = fixture.report("shop/net");
    assert_eq!(report.state, PolicyState::NotEnforcedHere);
    assert_eq!(fixture.messages("shop/net"), ["not_enforced@"]);
}

#[test]
fn workloads_with_the_same_policies_share_one_set() {
    let fixture = fixture(&[
        authz("istio-system/p", ALLOW_SHOP),
        authz("shop/q", ALLOW_SHOP),
        authz("shop/r", "{selector: {matchLabels: {app: db}}}"),
        authz("shop/s", "{selector: {matchLabels: {app: nobody}}}"),
    ]);
    let names = |pod: &str| {
        fixture
            .workload(pod)
            .policies
            .names()
            .collect::<Vec<_>>()
            .join(", ")
    };
    assert_eq!(
        names("shop/web"),
        "AuthorizationPolicy istio-system/p, AuthorizationPolicy shop/q"
    );
    assert_eq!(names("bank/web"), "AuthorizationPolicy istio-system/p");
    assert!(names("shop/db").ends_with("AuthorizationPolicy shop/r"));
    let same = |a: &str, b: &str| {
        fixture
            .workload(a)
            .policies
            .is_same(&fixture.workload(b).policies)
    };
    assert!(same("bank/web", "istio-system/gate"));
    assert!(!same("bank/web", "shop/web"));
}
