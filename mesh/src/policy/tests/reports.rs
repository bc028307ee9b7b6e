//! Policy reports and their form in the config dump.

use super::*;

#[test]
fn report_lists_the_selected_workloads() {
    let fixture = fixture(&[
        authz("istio-system/mesh", "{}"),
        authz("shop/all", "{}"),
        authz("shop/one", "selector: {matchLabels: {app: db}}"),
        authz("istio-system/webs", "selector: {matchLabels: {app: web}}"),
        authz("shop/none", "selector: {matchLabels: {app: x}}"),
        policy("PeerAuthentication", "bank/strict", "mtls: {mode: STRICT}"),
    ]);
    let selects = |name: &str| {
        let uids = fixture.report(name).selects.iter();
        uids.map(|uid| {
            uid.as_str()
                .split('/')
                .skip(3)
                .take(2)
                .collect::<Vec<_>>()
                .join("/")
        })
        .collect::<Vec<_>>()
    };
    // `shop/plain` is not in the mesh: nothing is enforced there.
    assert_eq!(
        selects("istio-system/mesh"),
        ["bank/web", "istio-system/gate", "shop/db", "shop/web"]
    );
    assert_eq!(selects("shop/all"), ["shop/db", "shop/web"]);
    assert_eq!(selects("shop/one"), ["shop/db"]);
    assert_eq!(selects("istio-system/webs"), ["bank/web", "shop/web"]);
    assert!(selects("shop/none").is_empty());
    assert_eq!(selects("bank/strict"), ["bank/web"]);
    let scope = |name: &str| fixture.report(name).scope;
    assert_eq!(scope("istio-system/mesh"), PolicyScope::Global);
    assert_eq!(scope("shop/all"), PolicyScope::Namespace);
    assert_eq!(scope("shop/one"), PolicyScope::WorkloadSelector);
}

#[test]
fn reports_are_sorted_by_kind_namespace_and_name() {
    let fixture = fixture(&[
        policy("PeerAuthentication", "a/a", "{}"),
        authz("b/a", "{}"),
        policy("NetworkPolicy", "a/a", "{podSelector: {}}"),
        authz("a/z", "{}"),
    ]);
    let names: Vec<String> = fixture
        .model
        .policies()
        .iter()
        .map(|r| r.object.to_string())
        .collect();
    let expected = [
        "AuthorizationPolicy a/z",
        "AuthorizationPolicy b/a",
        "NetworkPolicy a/a",
        "PeerAuthentication a/a",
    ];
    assert_eq!(names, expected);
}

/// Istio's names, so that its tools can read the dump.
#[test]
fn rules_are_dumped_in_the_shape_of_istio_ztunnel() {
    let spec = "{action: DENY, rules: [
        {from: [{source: {principals: ['*/sa/a', 'x/ns/*', '*'], notNamespaces: [b]}}]},
        {from: [{source: {principals: ['a/b', '*/sa/a'], ipBlocks: [10.0.0.1]}}],
         to: [{operation: {ports: ['80'], notPorts: ['81']}}, {operation: {paths: [/x]}}]},
        {to: [{operation: {paths: [/x]}}]},
        {when: [{key: destination.ip, values: ['fd00::/8']}]},
        {}]}";
    let dump = serde_json::to_value(fixture(&[authz("shop/p", spec)]).report("shop/p")).unwrap();
    let expected = json!([
        [[{"principals": [{"Suffix": "/sa/a"}, {"Prefix": "x/ns/"}, {"Presence": []}],
           "notNamespaces": [{"Exact": "b"}]}]],
        [[{"destinationPorts": [80], "notDestinationPorts": [81]}],
         [{"principals": [{"Exact": "a/b"}, {"Suffix": "/sa/a"}], "sourceIps": ["10.0.0.1/32"]}]],
        // In Istio's ztunnel an empty match matches nothing.
        [[{}]],
        [[{"destinationIps": ["fd00::/8"]}]],
        [],
    ]);
    assert_eq!(dump["rules"], expected);
    let rest = json!({
        "kind": "AuthorizationPolicy", "namespace": "shop", "name": "p", "scope": "Namespace",
        "action": "Deny", "dryRun": false, "state": "accepted"
    });
    for (key, value) in rest.as_object().unwrap() {
        assert_eq!(&dump[key], value, "{key}");
    }
}

#[test]
fn policy_errors_and_notes_are_diagnostics_of_their_file() {
    let fixture = fixture(&[
        authz("shop/bad", "action: NO"),
        authz(
            "shop/http",
            "rules: [{to: [{operation: {methods: [GET]}}]}]",
        ),
    ]);
    let codes = crate::testing::codes(&fixture.diagnostics);
    assert!(
        codes.contains(&"unknown_action@spec.action".to_owned()),
        "{codes:?}"
    );
    assert!(
        codes.contains(&"http_attributes@spec.rules".to_owned()),
        "{codes:?}"
    );
}
