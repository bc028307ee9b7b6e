//! Updates of the store: changes, kept allocations, load counters.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::testing::{Doc, compiled, namespace, node, pod, service, slice, workload};

fn apply(store: &Store, docs: &[Doc]) -> Changes {
    let (model, diagnostics) = compiled(docs);
    store.apply(model, diagnostics)
}

fn names(uids: &[WorkloadUid]) -> Vec<&str> {
    uids.iter()
        .map(|uid| uid.as_str().split('/').nth(4).unwrap())
        .collect()
}

fn fixture() -> Vec<Doc> {
    let mut docs = vec![
        namespace("shop"),
        node("a", "eu", "eu-1"),
        service("web", "10.1.0.1"),
    ];
    docs.extend([
        pod("web-1", "10.0.0.1"),
        pod("web-2", "10.0.0.2"),
        pod("db", "10.0.0.3"),
    ]);
    docs
}

#[test]
fn changes_list_added_removed_and_changed_entries() {
    let store = Store::new();
    let changes = apply(&store, &fixture());
    assert_eq!(names(&changes.added), ["db", "web-1", "web-2"]);
    assert_eq!(changes.services.len(), 1);
    assert_eq!((changes.nodes.len(), changes.namespaces.len()), (1, 1));

    let mut docs = fixture();
    docs[3] = pod("web-1", "10.0.0.1").not_ready();
    docs.remove(4);
    docs.push(pod("new", "10.0.0.4"));
    let changes = apply(&store, &docs);
    assert_eq!(names(&changes.added), ["new"]);
    assert_eq!(names(&changes.removed), ["web-2"]);
    assert_eq!(names(&changes.changed), ["web-1"]);
    assert_eq!(changes.services.len(), 1, "its endpoints changed");
    assert!(changes.nodes.is_empty() && changes.namespaces.is_empty());
}

#[test]
fn recreated_pod_is_removed_and_added() {
    let store = Store::new();
    apply(&store, &fixture());
    let mut docs = fixture();
    docs[5] = pod("db", "10.0.0.3").set("metadata.uid", "second");
    let changes = apply(&store, &docs);
    assert_eq!(
        (names(&changes.added), names(&changes.removed)),
        (vec!["db"], vec!["db"])
    );
    assert!(changes.changed.is_empty());
}

#[test]
fn unchanged_entries_are_the_same_allocation() {
    let store = Store::new();
    apply(&store, &fixture());
    let old = store.model();
    let mut docs = fixture();
    docs.push(pod("new", "10.0.0.9"));
    apply(&store, &docs);
    let new = store.model();
    let ip = "10.0.0.1".parse().unwrap();
    assert!(Arc::ptr_eq(
        old.workload_by_ip(ip).unwrap(),
        new.workload_by_ip(ip).unwrap()
    ));
    let web = |model: &Model| model.service("shop", "web").unwrap().clone();
    assert!(Arc::ptr_eq(&web(&old), &web(&new)));
    assert!(Arc::ptr_eq(old.node("a").unwrap(), new.node("a").unwrap()));
}

#[test]
fn every_lookup_of_a_workload_returns_the_same_allocation() {
    let store = Store::new();
    apply(&store, &fixture());
    let mut docs = fixture();
    docs[3] = pod("web-1", "10.0.0.1").not_ready();
    apply(&store, &docs);
    let model = store.model();
    let by_ip = model.workload_by_ip("10.0.0.1".parse().unwrap()).unwrap();
    let by_uid = model.workload(&by_ip.uid).unwrap();
    let service = model.service_by_vip("10.1.0.1".parse().unwrap()).unwrap();
    let by_service = service
        .endpoints
        .iter()
        .find_map(|e| e.workload().filter(|w| *w == by_ip));
    assert!(Arc::ptr_eq(by_ip, by_uid) && Arc::ptr_eq(by_ip, by_service.unwrap()));
    assert!(Arc::ptr_eq(service, model.service("shop", "web").unwrap()));
}

#[test]
fn load_counter_survives_updates() {
    let external = |zone| {
        slice(
            "x",
            "out",
            json!([{"addresses": ["203.0.113.1"], "zone": zone}]),
        )
    };
    let docs = |ready: bool, zone| {
        let db = pod("db", "10.0.0.3");
        let db = if ready { db } else { db.not_ready() };
        [db, service("out", "10.1.0.2"), external(zone)]
    };
    let store = Store::new();
    apply(&store, &docs(true, "z1"));
    let model = store.model();
    let bare = |model: &Model| {
        model.service("shop", "out").unwrap().endpoints[0]
            .load()
            .clone()
    };
    let _leases = [workload(&model, "db").load.lease(), bare(&model).lease()];
    apply(&store, &docs(false, "z2"));
    let model = store.model();
    assert_eq!(
        (workload(&model, "db").load.active(), bare(&model).active()),
        (1, 1)
    );
    assert!(
        !workload(&model, "db").health.ready,
        "the workload is updated"
    );
}

#[test]
fn unchanged_model_notifies_no_subscriber() {
    let store = Store::new();
    let mut version = store.subscribe();
    apply(&store, &fixture());
    assert!(version.has_changed().unwrap());
    version.mark_unchanged();
    let before = store.model();
    assert!(apply(&store, &fixture()).is_empty());
    assert!(!version.has_changed().unwrap());
    assert!(Arc::ptr_eq(&before, &store.model()));
}

#[test]
fn diagnostics_are_part_of_the_model() {
    let store = Store::new();
    let changes = apply(&store, &[service("web", "10.1.0.1")]);
    assert!(changes.diagnostics_changed);
    assert_eq!(
        store.load().diagnostics()[0].code,
        "service_without_endpoints"
    );
}

#[test]
fn added_and_removed_refusals_are_changes() {
    let store = Store::new();
    let duplicate = [pod("web", "10.0.0.1"), pod("duplicate", "10.0.0.1")];
    assert!(apply(&store, &duplicate).refusals_changed);
    assert!(apply(&store, &duplicate[..1]).refusals_changed);
    assert!(
        store
            .load()
            .workload_by_ip("10.0.0.1".parse().unwrap())
            .is_some()
    );
}

#[test]
fn snapshot_does_not_change() {
    let store = Store::new();
    apply(&store, &fixture());
    let snapshot = store.load();
    apply(&store, &[]);
    assert_eq!(snapshot.workloads().len(), 3);
    assert_eq!(store.load().workloads().len(), 0);
}

fn policy(port: &str) -> Doc {
    Doc(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "deny", "namespace": "shop"},
        "spec": {"action": "DENY", "selector": {"matchLabels": {"app": "web"}},
                 "rules": [{"to": [{"operation": {"ports": [port]}}]}]},
    }))
}

#[test]
fn changed_policy_changes_the_workloads_it_selects() {
    let store = Store::new();
    apply(&store, &fixture());
    let mut version = store.subscribe();
    let mut docs = fixture();
    docs.push(policy("80"));
    let changes = apply(&store, &docs);
    assert!(version.has_changed().unwrap());
    version.mark_unchanged();
    assert_eq!(names(&changes.changed), ["web-1", "web-2"]);
    assert_eq!(changes.policies.len(), 1);

    docs[6] = policy("81");
    let changes = apply(&store, &docs);
    assert_eq!(names(&changes.changed), ["web-1", "web-2"]);
    assert_eq!(changes.policies.len(), 1);
    assert!(version.has_changed().unwrap());
    version.mark_unchanged();

    let before = store.model();
    assert!(
        apply(&store, &docs).is_empty(),
        "read again, it says the same"
    );
    assert!(!version.has_changed().unwrap());
    assert!(Arc::ptr_eq(&before, &store.model()));

    let changes = apply(&store, &docs[..6]);
    assert_eq!((changes.policies.len(), changes.changed.len()), (1, 2));
    assert!(version.has_changed().unwrap());
}

#[test]
fn policy_without_selected_workloads_is_a_change() {
    let store = Store::new();
    apply(&store, &fixture());
    let mut docs = fixture();
    docs.push(policy("80").set("spec.selector.matchLabels.app", "nobody"));
    let changes = apply(&store, &docs);
    assert!(changes.changed.is_empty() && !changes.is_empty());
    assert_eq!(
        changes.policies[0].to_string(),
        "AuthorizationPolicy shop/deny"
    );
    assert_eq!(store.load().policies().len(), 1);
}

#[test]
fn changed_labels_of_pods_and_namespaces_are_changes() {
    let store = Store::new();
    let mut docs = fixture();
    docs.push(policy("80"));
    apply(&store, &docs);
    docs[0] = namespace("shop").label("team", "a");
    assert_eq!(apply(&store, &docs).namespaces.len(), 1);
    docs[5] = pod("db", "10.0.0.3").label("app", "web");
    let changes = apply(&store, &docs);
    assert_eq!(names(&changes.changed), ["db"]);
    let model = store.load();
    assert!(
        !workload(&model, "db").policies.is_empty(),
        "the policy selects it now"
    );
}

#[test]
fn entries_unaffected_by_a_policy_are_the_same_allocation() {
    let store = Store::new();
    let mut docs = fixture();
    docs.push(policy("80"));
    apply(&store, &docs);
    let old = store.model();
    docs.push(
        policy("80")
            .set("metadata.name", "other")
            .set("spec.selector.matchLabels.app", "db"),
    );
    apply(&store, &docs);
    let new = store.model();
    let ip = "10.0.0.1".parse().unwrap();
    assert!(Arc::ptr_eq(
        old.workload_by_ip(ip).unwrap(),
        new.workload_by_ip(ip).unwrap()
    ));
    assert!(Arc::ptr_eq(&old.policies()[0], &new.policies()[0]));
}
