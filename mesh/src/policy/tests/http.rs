//! Rules with HTTP attributes, which connections do not have (Istio's conversion for ztunnel).

use super::*;

#[test]
fn allow_rule_with_http_attributes_is_left_out() {
    let http = [
        "{to: [{operation: {methods: [GET]}}]}",
        "{to: [{operation: {ports: ['8080'], paths: [/a]}}]}",
        "{to: [{operation: {hosts: [a]}}, {operation: {ports: ['8080']}}]}",
        "{from: [{source: {namespaces: [shop], requestPrincipals: ['*']}}]}",
        "{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}",
        "{when: [{key: 'request.headers[x]', values: [a]}]}",
        "{from: [{source: {namespaces: [shop]}}], when: [{key: connection.sni, notValues: [a]}]}",
        "{when: [{key: remote.ip, values: [10.0.0.1]}]}",
        "{when: [{key: 'request.auth.claims[iss]', values: [a]}]}",
        "{to: [{operation: {notHosts: [a]}}]}",
        "{to: [{operation: {notMethods: [a]}}]}",
        "{to: [{operation: {notPaths: [a]}}]}",
        "{from: [{source: {notRequestPrincipals: [a]}}]}",
        "{from: [{source: {notRemoteIpBlocks: [10.0.0.1]}}]}",
    ];
    for rule in http {
        let alone = fixture(&[authz("shop/p", &format!("rules: [{rule}]"))]);
        assert!(!alone.allows("shop/db", WEB), "{rule}");
        assert_eq!(
            alone.report("shop/p").state,
            PolicyState::Accepted,
            "{rule}"
        );
        assert_eq!(
            alone.messages("shop/p"),
            ["http_attributes@spec.rules"],
            "{rule}"
        );
        let with_other = format!("rules: [{rule}, {{from: [{{source: {{namespaces: [bank]}}}}]}}]");
        let with_other = fixture(&[authz("shop/p", &with_other)]);
        assert!(
            !with_other.allows("shop/db", WEB) && with_other.allows("shop/db", BANK),
            "{rule}"
        );
    }
}

/// A rule of a DENY policy, what it denies, and whether it is reported to deny nothing.
#[test]
fn deny_rule_applies_without_its_http_attributes() {
    let cases: [(&str, &[&str], bool); 10] = [
        // Fields of one source or operation are ANDed: without one the rest denies more.
        (
            "{from: [{source: {namespaces: [shop], requestPrincipals: [a]}}]}",
            &[WEB],
            false,
        ),
        (
            "{to: [{operation: {ports: ['8080'], methods: [GET]}}]}",
            &[WEB, BANK, PLAIN],
            false,
        ),
        (
            "{from: [{source: {principals: ['*'], requestPrincipals: [a], namespaces: [bank]}}], to: [{operation: {ports: ['8080']}}]}",
            &[BANK],
            false,
        ),
        // An alternative of HTTP attributes only is left out.
        (
            "{to: [{operation: {methods: [GET]}}, {operation: {ports: ['8080']}}]}",
            &[WEB, BANK, PLAIN],
            false,
        ),
        // A clause of HTTP attributes only never matches, and neither does its rule.
        ("{to: [{operation: {methods: [GET]}}]}", &[], true),
        (
            "{from: [{source: {requestPrincipals: [a]}}], to: [{operation: {paths: [/a], methods: [b]}}]}",
            &[],
            true,
        ),
        (
            "{from: [{source: {namespaces: [shop]}}], to: [{operation: {hosts: [a]}}]}",
            &[],
            true,
        ),
        (
            "{when: [{key: source.namespace, values: [shop]}, {key: connection.sni, values: [a]}]}",
            &[],
            true,
        ),
        (
            "{when: [{key: 'request.headers[x]', values: [a]}]}",
            &[],
            true,
        ),
        (
            "{when: [{key: source.namespace, values: [shop]}]}",
            &[WEB],
            false,
        ),
    ];
    for (rule, denied, nothing) in cases {
        let fixture = fixture(&[authz(
            "shop/p",
            &format!("{{action: DENY, rules: [{rule}]}}"),
        )]);
        let found: Vec<&str> = [WEB, BANK, PLAIN]
            .into_iter()
            .filter(|connection| !fixture.allows("shop/db", connection))
            .collect();
        assert_eq!(found, denied, "{rule}");
        let report = fixture.report("shop/p");
        assert_eq!(report.state, PolicyState::Accepted);
        let is_reported = report
            .messages
            .iter()
            .any(|m| m.message.contains("REFUSES NOTHING"));
        assert_eq!(is_reported, nothing, "{rule}");
    }
}

#[test]
fn policy_for_a_waypoint_or_authorizer_is_reported_as_not_enforced() {
    let policies = [
        (
            "{targetRefs: [{kind: Service, name: web}], action: DENY, rules: [{}]}",
            "not_enforced@spec.targetRefs",
        ),
        (
            "{targetRef: {kind: Gateway, name: web}, rules: []}",
            "not_enforced@spec.targetRefs",
        ),
        (
            "{action: CUSTOM, provider: {name: x}, rules: [{}]}",
            "not_enforced@spec.action",
        ),
        ("{action: AUDIT, rules: [{}]}", "not_enforced@spec.action"),
    ];
    for (spec, message) in policies {
        let fixture = fixture(&[authz("shop/p", spec)]);
        assert!(fixture.allows("shop/db", PLAIN), "{spec}");
        let report = fixture.report("shop/p");
        assert_eq!(report.state, PolicyState::NotEnforcedHere, "{spec}");
        assert!(report.selects.is_empty());
        assert!(
            fixture.messages("shop/p").contains(&message.to_owned()),
            "{spec}"
        );
        assert!(
            fixture
                .diagnostics
                .iter()
                .any(|p| p.message.contains("NOT enforced"))
        );
    }
}
