//! Which endpoint of a service is chosen.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::*;
use crate::testing::node;

/// How many of `count` connections each pod gets; `keep_open` keeps their leases.
fn connect(model: &Model, source: &str, count: usize, keep_open: bool) -> BTreeMap<String, usize> {
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut counts, mut open) = (BTreeMap::new(), Vec::new());
    for _ in 0..count {
        let vip = "10.1.0.1:80".parse().unwrap();
        let decision = route(model, workload(model, source), vip, &[], &mut rng);
        let name = line(&decision).split(' ').nth(1).unwrap().to_owned();
        *counts.entry(name).or_insert(0) += 1;
        if keep_open {
            open.push(decision);
        }
    }
    counts
}

fn names(counts: &BTreeMap<String, usize>) -> Vec<&str> {
    counts.keys().map(String::as_str).collect()
}

fn three() -> Vec<Doc> {
    let mut docs = vec![service("web", "10.1.0.1"), client()];
    docs.extend((1..=3).map(|i| pod(&format!("web-{i}"), &format!("10.0.0.{i}"))));
    docs
}

#[test]
fn open_connections_are_spread_evenly() {
    let counts = connect(&model(&three()), "client", 300, true);
    assert_eq!(counts.len(), 3);
    assert!(
        counts.values().all(|count| (95..=105).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn short_connections_are_spread_at_random() {
    let counts = connect(&model(&three()), "client", 3000, false);
    assert!(
        counts.values().all(|count| (800..=1200).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn more_loaded_endpoint_of_two_is_never_chosen() {
    let mut docs = three();
    docs.pop();
    let model = model(&docs);
    let _busy = workload(&model, "web-1").load.lease();
    assert_eq!(names(&connect(&model, "client", 50, false)), ["web-2"]);
}

#[test]
fn dropped_route_releases_its_lease() {
    let model = model(&three());
    let decision = decide(&model, "10.0.0.1:8080", &[]);
    assert_eq!(workload(&model, "web-1").load.active(), 1);
    drop(decision);
    assert_eq!(workload(&model, "web-1").load.active(), 0);
}

#[test]
fn client_with_affinity_keeps_its_endpoint() {
    let web = service("web", "10.1.0.1").set("spec.sessionAffinity", "ClientIP");
    let clients = |docs: &mut Vec<Doc>| {
        docs.extend((1..=40).map(|i| pod(&format!("c{i}"), &format!("10.0.1.{i}")).ambient()));
    };
    let mut docs = three();
    docs[0] = web;
    clients(&mut docs);
    let all = model(&docs);
    let choice = |model: &Model, i: usize| {
        let counts = connect(model, &format!("c{i}"), 5, true);
        assert_eq!(counts.len(), 1, "one client, one endpoint: {counts:?}");
        counts.into_keys().next().unwrap()
    };
    let before: Vec<String> = (1..=40).map(|i| choice(&all, i)).collect();
    assert_eq!(
        before.iter().collect::<BTreeSet<_>>().len(),
        3,
        "clients are spread"
    );

    docs.retain(|doc| doc.0["metadata"]["name"] != "web-2");
    let fewer = model(&docs);
    for (i, before) in before.iter().enumerate() {
        let now = choice(&fewer, i + 1);
        assert!(
            now == *before || before == "web-2",
            "only clients of the lost endpoint move"
        );
    }
}

/// A replaced daemon must not move its clients: the endpoint of a client is the same in every build.
#[test]
fn affinity_is_the_same_in_every_build() {
    let mut docs = three();
    docs[0] = service("web", "10.1.0.1").set("spec.sessionAffinity", "ClientIP");
    assert_eq!(
        names(&connect(&model(&docs), "client", 5, false)),
        ["web-2"]
    );
}

#[test]
fn terminating_endpoints_serve_only_while_no_ready_one_exists() {
    let (ready, serving) = (
        pod("web-1", "10.0.0.1"),
        pod("web-2", "10.0.0.2").terminating(),
    );
    let failed = pod("web-3", "10.0.0.3").terminating().not_ready();
    let not_ready = pod("web-4", "10.0.0.4").not_ready();
    let base = [
        service("web", "10.1.0.1"),
        client(),
        serving,
        failed,
        not_ready,
    ];
    let with_ready = model(&[&base[..], &[ready]].concat());
    assert_eq!(names(&connect(&with_ready, "client", 50, false)), ["web-1"]);
    assert_eq!(
        names(&connect(&model(&base), "client", 50, false)),
        ["web-2"]
    );
    let tried = [EndpointKey::Workload(
        workload(&with_ready, "web-1").uid.clone(),
    )];
    let line = line(&decide(&with_ready, "10.1.0.1:80", &tried));
    assert_eq!(
        line, "none endpoints_exhausted for web",
        "not the terminating one, although the ready one was tried"
    );
}

#[test]
fn nearest_endpoints_are_preferred_and_the_next_nearest_a_fallback() {
    let nodes = [
        node("a", "eu", "eu-1"),
        node("b", "eu", "eu-1"),
        node("c", "eu", "eu-2"),
        node("d", "us", "us-1"),
    ];
    let on = |name: &str, last: u8, node: &str| {
        pod(name, &format!("10.0.0.{last}")).set("spec.nodeName", node)
    };
    let pods = [
        on("web-1", 1, "a"),
        on("web-2", 2, "b"),
        on("web-3", 3, "c"),
        on("web-4", 4, "d"),
    ];
    let cases: [(&str, usize, &[&str]); 9] = [
        ("PreferSameNode", 0, &["web-1"]),
        ("PreferSameNode", 1, &["web-2"]),
        ("PreferSameNode", 2, &["web-3"]),
        ("PreferSameNode", 3, &["web-4"]),
        ("PreferSameZone", 0, &["web-1", "web-2"]),
        ("PreferClose", 1, &["web-2"]),
        ("PreferSameZone", 2, &["web-3"]),
        ("PreferSameZone", 3, &["web-4"]),
        ("", 0, &["web-1", "web-2", "web-3", "web-4"]),
    ];
    for (distribution, gone, expected) in cases {
        let web = service("web", "10.1.0.1").set("spec.trafficDistribution", distribution);
        let model = model(&[&nodes[..], &pods[gone..], &[web, client()]].concat());
        let counts = connect(&model, "client", 100, false);
        assert_eq!(
            names(&counts),
            expected,
            "{distribution} without the first {gone}"
        );
    }
}

#[test]
fn unknown_localities_make_no_difference() {
    let mut docs = three();
    docs[0] = service("web", "10.1.0.1").set("spec.trafficDistribution", "PreferSameZone");
    assert_eq!(connect(&model(&docs), "client", 100, false).len(), 3);
}

#[test]
fn endpoint_without_a_pod_is_preferred_in_the_clients_zone() {
    let endpoints = json!([{"addresses": ["203.0.113.1"], "zone": "eu-1"},
                           {"addresses": ["203.0.113.2"], "zone": "eu-2"}]);
    let web = service("web", "10.1.0.1").set("spec.trafficDistribution", "PreferSameZone");
    let docs = [
        node("a", "eu", "eu-1"),
        web,
        slice("x", "web", endpoints),
        client(),
    ];
    let decision = decide(&model(&docs), "10.1.0.1:80", &[]);
    assert_eq!(line(&decision), "plain - 203.0.113.1:8080 for web");
}
