//! Which objects, errors and placeholders a file yields.

use std::sync::Arc;

use super::*;

fn read(text: &str) -> Parsed {
    parse(&Arc::from("f.yaml"), text.as_bytes())
}

fn names(parsed: &Parsed) -> Vec<String> {
    parsed
        .objects
        .iter()
        .map(|(object, _)| object.reference().to_string())
        .collect()
}

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n";

#[test]
fn file_holds_any_number_of_documents() {
    let text = format!(
        "# first\n---\n{WEB}---\n\n--- # nothing\n---\n{}...\n",
        WEB.replace("web", "db")
    );
    let parsed = read(&text);
    assert_eq!(names(&parsed), ["Service shop/web", "Service shop/db"]);
    assert_eq!(parsed.objects[1].1.document, 1);
    assert!(parsed.errors.is_empty() && parsed.ignored.is_empty());
}

#[test]
fn syntax_error_affects_only_its_document() {
    let text = format!("{WEB}---\nkind: [\n--- \n{}", WEB.replace("web", "db"));
    let parsed = read(&text);
    assert_eq!(names(&parsed), ["Service shop/web", "Service shop/db"]);
    let [error] = &parsed.errors[..] else {
        panic!("{:?}", parsed.errors)
    };
    assert_eq!((error.origin.document, error.code), (1, "yaml_syntax"));
    assert!(
        error.message.contains("line 5") || error.message.contains("line 6"),
        "{error}"
    );
}

#[test]
fn invalid_value_is_reported_with_object_and_field() {
    let parsed = read(&format!(
        "{WEB}spec: {{ports: [{{port: 80}}, {{port: http}}]}}\n"
    ));
    let text = parsed.errors[0].to_string();
    assert!(
        text.starts_with("f.yaml#0: Service shop/web: spec.ports[1].port: bad_field: "),
        "{text}"
    );
}

#[test]
fn duplicate_key_is_a_syntax_error() {
    let parsed = read("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  name: b\n");
    assert_eq!(parsed.errors[0].code, "yaml_syntax");
    assert!(parsed.objects.is_empty());
}

#[test]
fn kinds_are_recognised_by_their_full_api_version() {
    let parsed = read("apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\n");
    assert_eq!(parsed.ignored[0].code, "unknown_kind");
    let parsed = read("apiVersion: v2\nkind: Pod\nmetadata: {name: web}\n");
    assert_eq!(parsed.ignored[0].code, "unknown_kind");
}

#[test]
fn policy_kind_that_is_not_enforced_is_reported() {
    let kinds = [
        ("security.istio.io/v1", "RequestAuthentication"),
        ("cilium.io/v2", "CiliumNetworkPolicy"),
        ("crd.projectcalico.org/v1", "NetworkPolicy"),
        ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy"),
    ];
    for (version, kind) in kinds {
        let parsed = read(&format!(
            "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\n"
        ));
        let [diagnostic] = &parsed.ignored[..] else {
            panic!("{kind}")
        };
        assert_eq!(diagnostic.code, "unsupported_kind");
        assert!(diagnostic.message.contains("NOT enforced"), "{diagnostic}");
    }
}

#[test]
fn policy_with_invalid_content_is_still_a_policy() {
    let policies = [
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: x, labels: [1]}\nspec: 5",
        "apiVersion: security.istio.io/v9\nkind: PeerAuthentication\nmetadata: {name: x, namespace: shop, annotations: {a: 1}}",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: x, creationTimestamp: soon}\nspec: []",
    ];
    for text in policies {
        let parsed = read(text);
        assert_eq!(parsed.objects.len(), 1, "{:?}", parsed.errors);
        let Object::Policy(policy) = &parsed.objects[0].0 else {
            panic!("{text}")
        };
        assert_eq!(policy.metadata.name.as_deref(), Some("x"));
        assert!(!policy.diagnostics().is_empty());
    }
}

/// The policies and placeholders of a file, as `Kind namespace/name`.
fn policies(text: &str) -> Vec<String> {
    let parsed = read(text);
    let all = parsed.objects.iter().chain(&parsed.placeholders);
    let policies = all.filter(|(object, _)| matches!(object, Object::Policy(_)));
    policies.map(|(o, _)| o.reference().to_string()).collect()
}

#[test]
fn policy_without_a_usable_name_gets_a_placeholder() {
    let cases = [
        ("{name: [x], namespace: shop}", "shop/(unnamed, f.yaml#0)"),
        (
            "{name: Deny_All, namespace: shop}",
            "shop/(unnamed, f.yaml#0)",
        ),
        (
            "{generateName: x-, namespace: shop}",
            "shop/(unnamed, f.yaml#0)",
        ),
        ("{}", "default/(unnamed, f.yaml#0)"),
        ("{name: x, namespace: 5}", "default/(unnamed, f.yaml#0)"),
        ("{name: x, namespace: Shop}", "default/(unnamed, f.yaml#0)"),
        ("x", "default/(unnamed, f.yaml#0)"),
        ("[]", "default/(unnamed, f.yaml#0)"),
    ];
    for kind in ["AuthorizationPolicy", "PeerAuthentication", "NetworkPolicy"] {
        for (metadata, name) in cases {
            let text = format!("apiVersion: v1\nkind: {kind}\nmetadata: {metadata}");
            let parsed = read(&text);
            assert_eq!(policies(&text), [format!("{kind} {name}")], "{text}");
            assert!(parsed.objects.is_empty(), "{text}");
            let [error] = &parsed.errors[..] else {
                panic!("{text}: {:?}", parsed.errors)
            };
            assert!(error.field.starts_with("metadata"), "{error}");
            assert_eq!(error.object, None, "the object is unknown");
        }
    }
}

#[test]
fn policy_is_recognised_by_a_misspelt_kind_or_version() {
    let cases = [
        (
            "security.istio.io",
            "AuthorizationPolicy",
            "AuthorizationPolicy",
        ),
        (
            "security.istio.io/v7",
            "authorizationpolicy",
            "AuthorizationPolicy",
        ),
        ("v1", "PeerAuthentication", "PeerAuthentication"),
        (
            "security.istoi.io/v1",
            "PEERAUTHENTICATION",
            "PeerAuthentication",
        ),
        ("''", "AuthorizationPolicy", "AuthorizationPolicy"),
        ("5", "AuthorizationPolicy", "AuthorizationPolicy"),
        ("networking.k8s.io", "networkPolicy", "NetworkPolicy"),
        ("apps/v1", "NetworkPolicy", "NetworkPolicy"),
        // The group has no other kind.
        (
            "security.istio.io/v1",
            "AuthorisationPolicy",
            "AuthorizationPolicy",
        ),
        ("security.istio.io/v1", "''", "AuthorizationPolicy"),
    ];
    for (version, kind, expected) in cases {
        let text = format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}");
        assert_eq!(policies(&text), [format!("{expected} default/x")], "{text}");
    }
    let by_spec = [
        ("security.istio.io/v1", "mtls", "PeerAuthentication"),
        ("networking.k8s.io/v1", "podSelector", "NetworkPolicy"),
    ];
    for (version, field, expected) in by_spec {
        let text = format!(
            "apiVersion: {version}\nkind: Polcy\nmetadata: {{name: x}}\nspec: {{{field}: {{}}}}"
        );
        assert_eq!(policies(&text), [format!("{expected} default/x")], "{text}");
    }
}

#[test]
fn kinds_of_other_products_are_ignored_and_reported() {
    let cases = [
        ("policy.linkerd.io/v1alpha1", "AuthorizationPolicy"),
        ("policy.linkerd.io", "authorizationpolicy"),
        ("projectcalico.org/v3", "NetworkPolicy"),
        ("crd.projectcalico.org/v1", "NetworkPolicyList"),
        ("crd.antrea.io/v1beta1", "NetworkPolicy"),
        ("security.istio.io/v1", "RequestAuthentication"),
        ("networking.k8s.io/v1", "Ingress"),
    ];
    for (version, kind) in cases {
        let text = format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}");
        assert_eq!(policies(&text), [""; 0], "{text}");
        assert_eq!(read(&text).ignored.len(), 1, "{text}");
    }
}

#[test]
fn items_of_a_policy_list_are_read() {
    let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicyList\nmetadata: {resourceVersion: '1'}\nitems:\n\
                - metadata: {name: a, namespace: shop}\n\
                - {apiVersion: security.istio.io/v1beta1, kind: AuthorizationPolicy, metadata: {name: b}}\n\
                - {kind: List, items: [{kind: NetworkPolicy, metadata: {name: c}}]}\n- 5\n";
    let found = [
        "AuthorizationPolicy shop/a",
        "AuthorizationPolicy default/b",
        "NetworkPolicy default/c",
        "AuthorizationPolicy default/(unnamed, f.yaml#0 items[3])",
    ];
    assert_eq!(policies(text), found);
    assert_eq!(
        policies("kind: peerauthenticationlist\nitems: {}\n"),
        ["PeerAuthentication default/(unnamed, f.yaml#0)"]
    );
    // A document without a kind may hold a policy.
    assert_eq!(
        policies("- {kind: NetworkPolicy, metadata: {name: x, namespace: shop}}"),
        ["NetworkPolicy shop/x"]
    );
}

#[test]
fn each_policy_of_a_file_that_is_not_utf8_gets_a_placeholder() {
    let text = b"kind: AuthorizationPolicy\nmetadata: {name: a}\n---\n\xff\n---\nkind: NetworkPolicy\nmetadata: {name: b}\n";
    let found = parse(&Arc::from("f.yaml"), text).placeholders;
    let names: Vec<_> = found
        .iter()
        .map(|(o, _)| o.reference().to_string())
        .collect();
    assert_eq!(
        names,
        ["AuthorizationPolicy default/a", "NetworkPolicy default/b"]
    );
}

#[test]
fn numeric_and_boolean_keys_become_strings() {
    let head = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x}\n";
    let keys = |spec: &str| match &read(&format!("{head}{spec}")).objects[..] {
        [(Object::Policy(policy), _)] => {
            let ports = policy.document["spec"]["portLevelMtls"].as_object();
            ports.unwrap().keys().cloned().collect::<Vec<_>>()
        }
        _ => panic!("{spec}"),
    };
    assert_eq!(
        keys("spec: {portLevelMtls: {9090: {}, \"80\": {}, true: {}}}"),
        ["80", "9090", "true"]
    );
    let twice = read(&format!(
        "{head}spec: {{portLevelMtls: {{80: {{}}, \"80\": {{}}}}}}"
    ));
    assert_eq!(twice.errors[0].code, "yaml_syntax");
}

#[test]
fn items_of_a_list_are_read() {
    let text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Namespace\n  metadata: {name: shop}\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: web, labels: [1]}\n- {kind: List, apiVersion: v1}\n";
    let parsed = read(text);
    assert_eq!(names(&parsed), ["Namespace shop"]);
    assert_eq!(parsed.errors[0].field, "items[1].metadata.labels");
    assert_eq!(parsed.errors.len(), 2);
}

#[test]
fn json_is_read_as_yaml() {
    let parsed = read(r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"a"}}"#);
    assert_eq!(names(&parsed), ["Node a"]);
}

#[test]
fn document_without_kind_or_version_or_name_is_an_error() {
    for text in [
        "name: x",
        "- 1",
        "hello",
        "apiVersion: v1\nmetadata: {name: x}",
        "kind: Pod",
    ] {
        assert_eq!(read(text).errors[0].code, "missing_field", "{text}");
    }
    let parsed = read("apiVersion: v1\nkind: Pod\nmetadata: {labels: {a: b}}\n");
    assert_eq!(parsed.errors[0].field, "metadata.name");
}

#[test]
fn file_that_is_not_utf8_is_a_syntax_error() {
    let parsed = parse(&Arc::from("f.yaml"), b"kind: \xff");
    assert_eq!(parsed.errors[0].code, "yaml_syntax");
}

#[test]
fn alias_bomb_and_deep_nesting_are_syntax_errors() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..30 {
        let last = format!("*a{}", i - 1);
        text += &format!("a{i}: &a{i} [{}]\n", [&*last; 10].join(", "));
    }
    assert_eq!(read(&text).errors[0].code, "yaml_syntax");
    let deep = "[".repeat(100_000);
    assert_eq!(read(&deep).errors[0].code, "yaml_syntax");
}

#[test]
fn control_characters_in_a_message_are_escaped() {
    let parsed =
        read("apiVersion: v1\nkind: \"Pod\\nroot: all fine\"\nmetadata: {name: \"x\\ny\"}\n");
    let text = parsed.ignored[0].to_string();
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn first_origin_of_a_duplicate_counts_in_any_reading_order() {
    let one = |file: &str, port: u16| {
        let text = format!("{WEB}spec: {{ports: [{{port: {port}}}]}}\n");
        parse(&Arc::from(file), text.as_bytes()).objects.remove(0)
    };
    let origins = [one("a.yaml", 1), one("b.yaml", 2), one("c.yaml", 3)];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0], [1, 0, 2]] {
        let mut objects = Objects::default();
        for i in order {
            let (object, origin) = origins[i].clone();
            objects.insert(object, origin);
        }
        let kept = objects.services.values().next().unwrap();
        assert_eq!(&*kept.origin.file, "a.yaml");
        let mut files: Vec<_> = objects
            .diagnostics()
            .map(|d| (d.code, d.origin.file))
            .collect();
        files.sort();
        let twice = "duplicate_object";
        assert_eq!(files, [(twice, "b.yaml".into()), (twice, "c.yaml".into())]);
    }
}
