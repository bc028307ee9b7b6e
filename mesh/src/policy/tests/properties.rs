//! Properties of arbitrary policies (proptest).

use proptest::prelude::*;

use super::*;
use crate::objects::{Objects, parse};

const CONNECTIONS: [&str; 9] = [
    WEB,
    BANK,
    PLAIN,
    "cluster.local/ns/shop/sa/db 10.0.0.2 9090",
    "cluster.local/ns/bank/sa/web 10.0.0.3 9090",
    "other.org/ns/shop/sa/web 10.0.0.1 80",
    "cluster.local/workload/x fd00::1 8080",
    "- 10.0.0.5 9090",
    "- fd00::2 80",
];
const PODS: [&str; 4] = ["shop/web", "shop/db", "bank/web", "istio-system/gate"];

fn pick(choices: &'static [&'static str]) -> BoxedStrategy<Value> {
    prop::sample::select(choices)
        .prop_map(|text| serde_yaml_ng::from_str(text).expect("YAML"))
        .boxed()
}

fn list(choices: &'static [&'static str]) -> BoxedStrategy<Value> {
    prop::collection::vec(pick(choices), 1..3)
        .prop_map(Value::from)
        .boxed()
}

/// Some of these fields.
fn some(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let fields: Vec<_> = fields
        .into_iter()
        .map(|(key, value)| prop::option::weighted(0.4, value).prop_map(move |value| (key, value)))
        .collect();
    let object = |fields: Vec<(&str, Option<Value>)>| {
        let present = fields
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Value::Object(present.collect())
    };
    fields.prop_map(object).boxed()
}

const NAMESPACES: &[&str] = &["shop", "bank", "'*'", "'s*'"];
const PRINCIPALS: &[&str] = &[
    "cluster.local/ns/shop/sa/web",
    "'*'",
    "'*/sa/web'",
    "cluster.local/ns/bank/*",
];
const BLOCKS: &[&str] = &["10.0.0.1", "10.0.0.0/30", "fd00::/8", "0.0.0.0/0"];
const PORTS: &[&str] = &["'8080'", "'9090'", "'80'"];

fn rule() -> BoxedStrategy<Value> {
    let source = some(vec![
        ("principals", list(PRINCIPALS)),
        ("notPrincipals", list(PRINCIPALS)),
        ("namespaces", list(NAMESPACES)),
        ("notNamespaces", list(NAMESPACES)),
        ("ipBlocks", list(BLOCKS)),
        ("notIpBlocks", list(BLOCKS)),
        ("requestPrincipals", list(&["x"])),
    ]);
    let operation = some(vec![
        ("ports", list(PORTS)),
        ("notPorts", list(PORTS)),
        ("methods", list(&["GET"])),
    ]);
    let condition = prop_oneof![
        list(BLOCKS).prop_map(|values| json!({"key": "source.ip", "values": values})),
        list(NAMESPACES).prop_map(|values| json!({"key": "source.namespace", "notValues": values})),
        list(PORTS).prop_map(|values| json!({"key": "destination.port", "values": values})),
        Just(json!({"key": "connection.sni", "values": ["x"]})),
    ];
    let from = prop::collection::vec(source.prop_map(|source| json!({"source": source})), 1..3);
    let to = prop::collection::vec(operation.prop_map(|op| json!({"operation": op})), 1..3);
    some(vec![
        ("from", from.prop_map(Value::from).boxed()),
        ("to", to.prop_map(Value::from).boxed()),
        (
            "when",
            prop::collection::vec(condition, 1..3)
                .prop_map(Value::from)
                .boxed(),
        ),
    ])
}

fn selector() -> BoxedStrategy<Value> {
    pick(&[
        "{matchLabels: {app: db}}",
        "{matchLabels: {app: web}}",
        "{matchLabels: {version: v1}}",
    ])
}

/// A typical policy; it may be invalid (an empty match, ports without a selector).
fn any_policy() -> impl Strategy<Value = Doc> {
    let rules = prop::collection::vec(rule(), 1..3).prop_map(Value::from);
    let authorization = some(vec![("selector", selector())]);
    let authorization =
        (authorization, pick(&["ALLOW", "DENY"]), rules).prop_map(|(mut spec, action, rules)| {
            (spec["action"], spec["rules"]) = (action, rules);
            ("AuthorizationPolicy", spec)
        });
    let modes = || {
        pick(&[
            "{mode: STRICT}",
            "{mode: PERMISSIVE}",
            "{mode: DISABLE}",
            "{mode: UNSET}",
            "{}",
        ])
    };
    let ports = modes()
        .prop_map(|mode| json!({"8080": mode, "80": {"mode": "STRICT"}}))
        .boxed();
    let peer = some(vec![
        ("selector", selector()),
        ("mtls", modes()),
        ("portLevelMtls", ports),
    ]);
    let peer = peer.prop_map(|spec| ("PeerAuthentication", spec));
    let network = some(vec![(
        "ingress",
        pick(&[
            "[]",
            "[{}]",
            "[{ports: [{port: 8080}]}]",
            "[{from: [{podSelector: {}}]}]",
        ]),
    )]);
    let network = network.prop_map(|mut spec| {
        spec["podSelector"] = json!({});
        ("NetworkPolicy", spec)
    });
    let name = prop::sample::select(vec!["shop/a", "shop/b", "bank/a", "istio-system/a"]);
    (
        name,
        prop_oneof![4 => authorization, 2 => peer, 1 => network],
    )
        .prop_map(|(name, (kind, spec))| {
            let mut doc = policy(kind, name, "{}");
            doc.0["spec"] = spec;
            doc
        })
}

fn junk() -> BoxedStrategy<Value> {
    pick(&[
        "null",
        "''",
        "'*x*'",
        "5",
        "-1",
        "true",
        "[]",
        "{}",
        "[null]",
        "[[]]",
        "{a: b}",
        "[{}]",
        "x y",
        "[x y]",
        "99999999999",
    ])
}

/// Every position in a value, as JSON pointers.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            places(
                value,
                &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")),
                found,
            );
        }),
        Value::Array(items) => items.iter().enumerate().for_each(|(i, value)| {
            places(value, &format!("{at}/{i}"), found);
        }),
        _ => {}
    }
}

/// One field of the spec gets another value or another name.
fn mutilate(doc: &Doc, place: usize, junk: &Value, rename: bool) -> Doc {
    let mut doc = doc.clone();
    let mut found = Vec::new();
    places(&doc.0["spec"], "", &mut found);
    let pointer = &found[place % found.len()];
    let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
    let spec = &mut doc.0["spec"];
    match spec
        .pointer_mut(parent)
        .filter(|_| rename && !pointer.is_empty())
    {
        Some(Value::Object(fields)) => {
            let value = fields.remove(key).expect("it was found there");
            fields.insert(format!("{key}x"), value);
        }
        _ => *spec.pointer_mut(pointer).expect("it was found there") = junk.clone(),
    }
    doc
}

fn denials(fixture: &Fixture) -> Vec<bool> {
    let connections = PODS
        .iter()
        .flat_map(|pod| CONNECTIONS.iter().map(move |connection| (pod, connection)));
    connections
        .map(|(pod, connection)| !fixture.allows(pod, connection))
        .collect()
}

fn is_invalid(fixture: &Fixture, doc: &Doc) -> bool {
    let kind = doc.0["kind"].as_str().expect("it has a kind");
    let name = doc.0["metadata"]["name"].as_str().expect("it has a name");
    let namespace = doc.0["metadata"]["namespace"]
        .as_str()
        .expect("and a namespace");
    let mut reports = fixture.model.policies().iter();
    let this = |r: &&Arc<PolicyReport>| {
        (&*r.object.kind, &*r.object.namespace, &*r.object.name) == (kind, namespace, name)
    };
    reports
        .find(this)
        .is_some_and(|report| report.state == PolicyState::Invalid)
}

/// Whether every denial of the first is one of the second.
fn at_least(before: &[bool], after: &[bool]) -> bool {
    before
        .iter()
        .zip(after)
        .all(|(before, after)| !before || *after)
}

/// An error around the spec.
#[derive(Clone, Debug)]
struct Mutation {
    /// `None` to remove it.
    value: Option<Value>,
    field: &'static str,
    /// The namespace is still readable.
    keeps_namespace: bool,
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let junk =
        || prop::option::of(junk().prop_filter("it says nothing", |v| *v != json!({"a": "b"})));
    let of = |field, keeps_namespace| {
        move |value| Mutation {
            value,
            field,
            keeps_namespace,
        }
    };
    let version = pick(&["security.istio.io", "v1", "networking.k8s.io/v2", "x.io/v1"]);
    prop_oneof![
        version.prop_map(Some).prop_map(of("apiVersion", true)),
        junk().prop_map(of("apiVersion", true)),
        junk().prop_map(of("metadata.name", true)),
        pick(&["'A B'", "x/y"])
            .prop_map(Some)
            .prop_map(of("metadata.name", true)),
        pick(&["5", "[]", "{}", "'A'", "true"])
            .prop_map(Some)
            .prop_map(of("metadata.namespace", false)),
        pick(&["5", "[]", "x"])
            .prop_map(Some)
            .prop_map(of("metadata", false)),
        Just(Mutation {
            value: None,
            field: "kind",
            keeps_namespace: true
        }),
    ]
}

impl Mutation {
    fn of(&self, doc: &Doc) -> Doc {
        let mut doc = match (&self.value, self.field) {
            (_, "kind") => {
                let kind = doc.0["kind"]
                    .as_str()
                    .expect("it has one")
                    .to_ascii_lowercase();
                return doc.clone().set("kind", kind);
            }
            (Some(value), field) => return doc.clone().set(field, value.clone()),
            (None, _) => doc.clone(),
        };
        let (parent, key) = self.field.rsplit_once('.').unwrap_or(("", self.field));
        let parent = if parent.is_empty() {
            String::new()
        } else {
            format!("/{parent}")
        };
        let fields = doc.0.pointer_mut(&parent).and_then(Value::as_object_mut);
        fields.expect("it is an object").remove(key);
        doc
    }
}

/// A daemon that starts with these policies, one of which may be unreadable.
fn read_fixture(others: &[Doc], target: &Doc) -> Fixture {
    let plain = in_namespace("plain", "default", "10.0.0.9");
    let docs: Vec<Doc> = pods()
        .into_iter()
        .chain([plain])
        .chain(others.iter().cloned())
        .collect();
    let text = crate::testing::text(&docs) + &crate::testing::text(std::slice::from_ref(target));
    let parsed = parse(&"p.yaml".into(), text.as_bytes());
    let mut objects = Objects::default();
    for (object, origin) in parsed.objects.into_iter().chain(parsed.placeholders) {
        objects.insert(object, origin);
    }
    let (model, diagnostics) = compile(&objects, &params());
    Fixture { model, diagnostics }
}

fn named(doc: Doc, name: &str) -> Doc {
    doc.set("metadata.name", name)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn adding_an_invalid_policy_allows_nothing_new(
        others in prop::collection::vec(any_policy(), 0..4),
        target in any_policy(), place in any::<usize>(), junk in junk(), rename: bool,
    ) {
        let before = fixture(&others);
        let invalid = named(mutilate(&target, place, &junk, rename), "new");
        let mut docs = others;
        docs.push(invalid.clone());
        let after = fixture(&docs);
        if is_invalid(&after, &invalid) {
            prop_assert!(at_least(&denials(&before), &denials(&after)), "{}", invalid.0);
        }
    }

    /// A policy with one field made invalid still denies what it denied before.
    #[test]
    fn making_one_field_invalid_allows_nothing_new(
        others in prop::collection::vec(any_policy(), 0..3),
        target in any_policy(), place in any::<usize>(), junk in junk(), rename: bool,
    ) {
        let target = named(target, "target");
        let changed = mutilate(&target, place, &junk, rename);
        let with = |doc: &Doc| fixture(&others.iter().chain([doc]).cloned().collect::<Vec<_>>());
        let (before, after) = (with(&target), with(&changed));
        // A policy that was invalid before stays invalid with another selector.
        if !is_invalid(&before, &target) && is_invalid(&after, &changed) {
            prop_assert!(at_least(&denials(&before), &denials(&after)), "{} -> {}", target.0, changed.0);
        }
    }

    /// The same for the envelope, as long as the kind or the group identifies a policy.
    #[test]
    fn making_the_envelope_invalid_allows_nothing_new(
        others in prop::collection::vec(any_policy(), 0..3),
        target in any_policy(), mutation in mutation(), namespaced: bool,
    ) {
        let mut target = named(target, "target");
        if !namespaced {
            target = target.set("metadata.namespace", "default");
        }
        let changed = mutation.of(&target);
        let (before, after) = (read_fixture(&others, &target), read_fixture(&others, &changed));
        if !is_invalid(&before, &target) && mutation.keeps_namespace {
            prop_assert!(
                at_least(&denials(&before), &denials(&after)), "{} -> {}", target.0, changed.0
            );
        }
        // The namespace is unknown: the placeholder denies `default`, the namespace of `plain`.
        let denies_default = !after.allows("default/plain", PLAIN);
        prop_assert!(mutation.keeps_namespace || denies_default, "{}", changed.0);
        let errors = after.model.policies().iter().filter(|r| r.state == PolicyState::Invalid);
        prop_assert!(errors.count() > 0, "not reported: {}", changed.0);
    }

    /// The order of policies in the files has no effect.
    #[test]
    fn order_of_policies_does_not_change_the_decision(
        docs in prop::collection::vec(any_policy(), 0..6), turn in 0..6usize, reverse: bool,
    ) {
        let docs: Vec<Doc> = docs.into_iter().enumerate().map(|(i, doc)| named(doc, &format!("p{i}"))).collect();
        let mut turned = docs.clone();
        turned.rotate_left(turn % docs.len().max(1));
        if reverse {
            turned.reverse();
        }
        let (one, other) = (fixture(&docs), fixture(&turned));
        prop_assert_eq!(&one.model, &other.model);
        for pod in PODS {
            for connection in CONNECTIONS {
                prop_assert_eq!(one.decide(pod, connection), other.decide(pod, connection));
            }
        }
    }

    #[test]
    fn any_spec_can_be_evaluated(kind in 0..3usize, spec in any_value(), meta in any_value()) {
        let kind = ["AuthorizationPolicy", "PeerAuthentication", "NetworkPolicy"][kind];
        let mut doc = policy(kind, "shop/p", "{}");
        doc.0["spec"] = spec;
        doc.0["metadata"]["annotations"] = meta;
        let fixture = fixture(&[doc]);
        denials(&fixture);
        for report in fixture.model.policies() {
            prop_assert!(serde_json::to_string(&**report).is_ok());
        }
    }

    #[test]
    fn any_text_can_be_read(text in "[ \\-:{}\\[\\]a-z'\"*&\n]{0,200}") {
        let head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: ";
        let parsed = parse(&"p.yaml".into(), format!("{head}{text}").as_bytes());
        let mut objects = Objects::default();
        for (object, origin) in parsed.objects {
            objects.insert(object, origin);
        }
        compile(&objects, &params());
    }
}

/// Any structure of meaningful keys and values.
fn any_value() -> impl Strategy<Value = Value> {
    let words = pick(&[
        "ALLOW",
        "DENY",
        "STRICT",
        "shop",
        "'*'",
        "10.0.0.0/8",
        "'8080'",
        "source.ip",
        "null",
        "5",
        "true",
        "1.5",
        "''",
    ]);
    words.prop_recursive(5, 40, 4, |inner| {
        let keys = prop::sample::select(vec![
            "selector",
            "matchLabels",
            "action",
            "rules",
            "from",
            "to",
            "when",
            "source",
            "operation",
            "ports",
            "key",
            "values",
            "notValues",
            "principals",
            "namespaces",
            "ipBlocks",
            "mtls",
            "mode",
            "portLevelMtls",
            "8080",
            "targetRefs",
            "podSelector",
            "ingress",
            "app",
            "methods",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(keys, inner, 0..4).prop_map(|fields| {
                Value::Object(
                    fields
                        .into_iter()
                        .map(|(key, value)| (key.to_owned(), value))
                        .collect(),
                )
            }),
        ]
    })
}
