//! Properties of arbitrary NetworkPolicies (proptest).

use std::net::IpAddr;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{Fixture, PORTS, cluster, everyone, read_value, yaml};

/// Few names, labels and blocks, so that they often match. Absent, null and empty values are generated
/// everywhere, whether or not the API server distinguishes them.
fn any_selector() -> impl Strategy<Value = Value> {
    let key = prop_oneof![Just("pod"), Just("ns"), Just("other")];
    let value = prop_oneof![Just("a"), Just("b"), Just("x"), Just("y")];
    let labels = prop::collection::btree_map(key.clone(), value.clone(), 0..2);
    let expression =
        (key, 0..4u8, prop::collection::vec(value, 1..3)).prop_map(|(key, operator, values)| {
            match operator {
                0 => json!({"key": key, "operator": "In", "values": values}),
                1 => json!({"key": key, "operator": "NotIn", "values": values}),
                2 => json!({"key": key, "operator": "Exists"}),
                _ => json!({"key": key, "operator": "DoesNotExist", "values": []}),
            }
        });
    let expressions = prop::collection::vec(expression, 0..2);
    (labels, expressions, any::<[bool; 2]>()).prop_map(|(labels, expressions, [one, two])| {
        let mut selector = json!({});
        if one {
            selector["matchLabels"] = json!(labels);
        }
        if two {
            selector["matchExpressions"] = json!(expressions);
        }
        selector
    })
}

fn any_peer() -> impl Strategy<Value = Value> {
    let block = prop_oneof![
        Just(json!({"cidr": "10.0.0.0/16"})),
        Just(json!({"cidr": "10.0.0.0/16", "except": ["10.0.2.0/24", "10.0.1.1/32"]})),
        Just(json!({"cidr": "10.0.3.2/32", "except": []})),
        Just(json!({"cidr": "0.0.0.0/0", "except": ["203.0.113.0/24"]})),
        Just(json!({"cidr": "fd00::/16", "except": ["fd00::2:0/112"]})),
    ];
    prop_oneof![
        any_selector().prop_map(|pods| json!({"podSelector": pods})),
        any_selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (any_selector(), any_selector()).prop_map(|(pods, namespaces)| {
            json!({"podSelector": pods, "namespaceSelector": namespaces, "ipBlock": null})
        }),
        block.prop_map(|block| json!({"ipBlock": block})),
    ]
}

fn any_port() -> impl Strategy<Value = Value> {
    let port = prop_oneof![
        Just(json!({})),
        Just(json!({"port": 80})),
        Just(json!({"port": 81})),
        Just(json!({"port": 79, "endPort": 80})),
        Just(json!({"port": "serve-80"})),
        Just(json!({"port": "serve-81"})),
        Just(json!({"port": "none"})),
    ];
    let protocol = prop_oneof![Just(None), Just(Some("TCP")), Just(Some("UDP"))];
    (port, protocol).prop_map(|(mut port, protocol)| {
        if let Some(protocol) = protocol {
            port["protocol"] = json!(protocol);
        }
        port
    })
}

fn any_policy() -> impl Strategy<Value = Value> {
    let list = |items: Vec<Value>, absent: bool| match absent && items.is_empty() {
        true => Value::Null,
        false => json!(items),
    };
    let from = prop::collection::vec(any_peer(), 0..3);
    let ports = prop::collection::vec(any_port(), 0..3);
    let rule = (from, ports, any::<bool>()).prop_map(move |(from, ports, absent)| {
        json!({"from": list(from, absent), "ports": list(ports, absent)})
    });
    let types = prop_oneof![
        4 => Just(None),
        2 => Just(Some(json!(["Ingress"]))),
        1 => Just(Some(json!([]))),
        1 => Just(Some(json!(["Egress"]))),
        1 => Just(Some(json!(["Egress", "Ingress"]))),
    ];
    let namespace = prop_oneof![Just("x"), Just("y")];
    let rules = prop::collection::vec(rule, 0..3);
    (namespace, any_selector(), types, rules).prop_map(|(namespace, pods, types, rules)| {
        let mut spec = json!({"podSelector": pods, "ingress": rules});
        if let Some(types) = types {
            spec["policyTypes"] = types;
        }
        let mut policy = yaml("{}");
        policy["metadata"]["namespace"] = namespace.into();
        policy["spec"] = spec;
        policy
    })
}

/// A literal, slow implementation of the Kubernetes definition. Shares only the documents with the code
/// under test.
mod reference {
    use super::*;

    pub(super) struct Pod {
        pub(super) namespace: String,
        pub(super) name: String,
    }

    impl Pod {
        fn labels(&self) -> Map<String, Value> {
            Map::from_iter([("pod".to_owned(), json!(self.name))])
        }

        fn namespace_labels(&self) -> Map<String, Value> {
            Map::from_iter([("ns".to_owned(), json!(self.namespace))])
        }
    }

    fn list(value: &Value) -> Vec<Value> {
        value.as_array().cloned().unwrap_or_default()
    }

    fn selects(selector: &Value, labels: &Map<String, Value>) -> bool {
        let pairs = selector["matchLabels"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        let all_labels = pairs
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value));
        all_labels
            && list(&selector["matchExpressions"]).iter().all(|e| {
                let label = labels.get(e["key"].as_str().expect("a key"));
                let listed = label.is_some_and(|label| list(&e["values"]).contains(label));
                match e["operator"].as_str() {
                    Some("In") => listed,
                    Some("NotIn") => !listed,
                    Some("Exists") => label.is_some(),
                    _ => label.is_none(),
                }
            })
    }

    fn in_block(block: &Value, ip: IpAddr) -> bool {
        let (network, length) = block
            .as_str()
            .and_then(|b| b.split_once('/'))
            .expect("a block");
        let bits = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => format!("4{:032b}", ip.to_bits()),
            IpAddr::V6(ip) => format!("6{:0128b}", ip.to_bits()),
        };
        let length: usize = length.parse().expect("a length");
        let network = bits(network.parse().expect("an address"));
        bits(ip)[..=length.min(bits(ip).len() - 1)] == network[..=length]
    }

    fn peer_is(peer: &Value, policy_namespace: &str, pod: Option<&Pod>, ip: IpAddr) -> bool {
        if peer["ipBlock"].is_object() {
            let block = &peer["ipBlock"];
            let excepted = list(&block["except"]).iter().any(|hole| in_block(hole, ip));
            return in_block(&block["cidr"], ip) && !excepted;
        }
        let Some(pod) = pod else { return false };
        let (pods, namespaces) = (&peer["podSelector"], &peer["namespaceSelector"]);
        let namespace_matches = match namespaces.is_null() {
            true => pod.namespace == policy_namespace,
            false => selects(namespaces, &pod.namespace_labels()),
        };
        namespace_matches && (pods.is_null() || selects(pods, &pod.labels()))
    }

    fn port_is(entry: &Value, port: u16) -> bool {
        if !matches!(entry["protocol"].as_str(), None | Some("TCP")) {
            return false;
        }
        match &entry["port"] {
            Value::Null => true,
            Value::String(name) => *name == format!("serve-{port}"),
            number => {
                let first = number.as_u64().expect("a number");
                let last = entry["endPort"].as_u64().unwrap_or(first);
                (first..=last).contains(&u64::from(port))
            }
        }
    }

    pub(super) fn admits(
        policies: &[Value],
        from: Option<&Pod>,
        ip: IpAddr,
        to: &Pod,
        port: u16,
    ) -> bool {
        if from.is_some_and(|from| from.name == to.name && from.namespace == to.namespace) {
            return true;
        }
        let selecting: Vec<&Value> = policies
            .iter()
            .filter(|policy| {
                let types = list(&policy["spec"]["policyTypes"]);
                let ingress = types.is_empty() || types.contains(&json!("Ingress"));
                ingress
                    && policy["metadata"]["namespace"] == to.namespace.as_str()
                    && selects(&policy["spec"]["podSelector"], &to.labels())
            })
            .collect();
        selecting.is_empty()
            || selecting.iter().any(|policy| {
                list(&policy["spec"]["ingress"]).iter().any(|rule| {
                    let (peers, ports) = (list(&rule["from"]), list(&rule["ports"]));
                    let own = policy["metadata"]["namespace"]
                        .as_str()
                        .expect("a namespace");
                    (peers.is_empty() || peers.iter().any(|peer| peer_is(peer, own, from, ip)))
                        && (ports.is_empty() || ports.iter().any(|entry| port_is(entry, port)))
                })
            })
    }
}

/// Every pod by both of its addresses, and two addresses without a pod.
fn sources(fixture: &Fixture) -> Vec<(Option<reference::Pod>, IpAddr)> {
    let mut sources = Vec::new();
    for name in everyone() {
        for ip in &fixture.workload(&name).ips {
            sources.push((Some(reference_pod(&name)), *ip));
        }
    }
    for outside in ["203.0.113.9", "2001:db8::9"] {
        sources.push((None, outside.parse().expect("an address")));
    }
    sources
}

fn reference_pod(name: &str) -> reference::Pod {
    let (namespace, name) = name.split_once('/').expect("<namespace>/<pod>");
    reference::Pod {
        namespace: namespace.into(),
        name: name.into(),
    }
}

/// For each source, pod and port, whether the fixture admits it.
fn verdicts(fixture: &Fixture) -> Vec<(String, bool)> {
    let mut verdicts = Vec::new();
    for (_, ip) in sources(fixture) {
        for to in everyone() {
            for port in PORTS {
                let case = format!("{ip} to {to}:{port}");
                verdicts.push((case, fixture.admits(&ip.to_string(), &to, port)));
            }
        }
    }
    verdicts
}

/// An error at any place of a policy: an additional field, or a value of any kind instead of another.
/// Some yield another valid policy.
fn with_error(policy: &Value, place: usize, junk: &Value, add: bool) -> Value {
    let mut policy = policy.clone();
    let mut pointers = Vec::new();
    collect(&policy["spec"], "/spec".to_owned(), &mut pointers);
    let pointer = &pointers[place % pointers.len()];
    let value = policy.pointer_mut(pointer).expect("it was collected");
    match value {
        Value::Object(fields) if add => {
            fields.insert("future".into(), junk.clone());
        }
        Value::Array(items) if add => items.push(junk.clone()),
        value => *value = junk.clone(),
    }
    policy
}

fn collect(value: &Value, pointer: String, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                collect(value, format!("{pointer}/{key}"), found);
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                collect(value, format!("{pointer}/{index}"), found);
            }
        }
        _ => {}
    }
    found.push(pointer);
}

fn any_junk() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!(true)),
        Just(json!(0)),
        Just(json!(-1)),
        Just(json!(1.5)),
        Just(json!(70000)),
        Just(json!("")),
        Just(json!("x")),
        Just(json!("10.0.0.0/99")),
        Just(json!("ALLOW")),
        Just(json!([])),
        Just(json!([null])),
        Just(json!([{}])),
        Just(json!({})),
        Just(json!({"matchLabels": {"pod": "a"}})),
        Just(json!({"cidr": "0.0.0.0/0"})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn decision_equals_the_reference_definition(policies in prop::collection::vec(any_policy(), 0..5)) {
        let (fixture, errors) = Fixture::of(policies.clone(), &cluster());
        prop_assert!(errors.is_empty(), "{errors:?}");
        for (from, ip) in sources(&fixture) {
            for to in everyone() {
                for port in PORTS {
                    let expected = reference::admits(
                        &policies, from.as_ref(), ip, &reference_pod(&to), port);
                    let found = fixture.admits(&ip.to_string(), &to, port);
                    prop_assert_eq!(found, expected, "{} to {}:{}", ip, to, port);
                }
            }
        }
    }

    #[test]
    fn adding_an_invalid_policy_admits_nothing_new(
        policies in prop::collection::vec(any_policy(), 0..4),
        more in any_policy(),
        place in any::<usize>(),
        junk in any_junk(),
        add in any::<bool>(),
    ) {
        let more = with_error(&more, place, &junk, add);
        let (_, errors) = read_value(more.clone());
        prop_assume!(!errors.is_empty());
        let (before, _) = Fixture::of(policies.clone(), &cluster());
        let (after, _) = Fixture::of([policies, vec![more]].concat(), &cluster());
        for ((case, before), (_, after)) in verdicts(&before).into_iter().zip(verdicts(&after)) {
            prop_assert!(before || !after, "{} was refused and is admitted", case);
        }
    }

    #[test]
    fn policy_that_becomes_invalid_admits_nothing_new(
        others in prop::collection::vec(any_policy(), 0..3),
        policy in any_policy(),
        place in any::<usize>(),
        junk in any_junk(),
        add in any::<bool>(),
    ) {
        let worse = with_error(&policy, place, &junk, add);
        let (_, errors) = read_value(worse.clone());
        prop_assume!(!errors.is_empty());
        let (before, _) = Fixture::of([others.clone(), vec![policy]].concat(), &cluster());
        let (after, _) = Fixture::of([others, vec![worse]].concat(), &cluster());
        let mut verdicts = verdicts(&before).into_iter().zip(verdicts(&after));
        prop_assert!(
            verdicts.all(|((_, before), (_, after))| before || !after),
            "something is admitted that was refused"
        );
    }

    #[test]
    fn order_of_policies_does_not_change_the_decision(
        policies in prop::collection::vec(any_policy(), 1..4),
    ) {
        let (fixture, _) = Fixture::of(policies.clone(), &cluster());
        let mut reversed = policies;
        reversed.reverse();
        let (other, _) = Fixture::of(reversed, &cluster());
        prop_assert_eq!(verdicts(&fixture), verdicts(&other));
    }
}
