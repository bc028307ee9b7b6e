use serde_json::json;

use crate::Mode;
use crate::model::WorkloadType;
use crate::testing::{codes, compiled, model, namespace, node, pod, workload};

#[test]
fn pod_label_overrides_namespace_label_for_opt_in() {
    let cases = [
        // (namespace label, pod label, meshed)
        (None, None, false),
        (Some("ambient"), None, true),
        (Some("none"), None, false),
        (Some("ambient"), Some("none"), false),
        (None, Some("ambient"), true),
        (Some("none"), Some("ambient"), true),
        (Some("ambient"), Some("typo"), true),
        (Some("typo"), None, false),
    ];
    for (of_namespace, of_pod, meshed) in cases {
        let mut docs = [namespace("shop"), pod("web", "10.0.0.1")];
        if let Some(value) = of_namespace {
            docs[0] = docs[0].clone().label("istio.io/dataplane-mode", value);
        }
        if let Some(value) = of_pod {
            docs[1] = docs[1].clone().label("istio.io/dataplane-mode", value);
        }
        let model = model(&docs);
        let is = workload(&model, "web").is_meshed();
        assert_eq!(is, meshed, "namespace {of_namespace:?}, pod {of_pod:?}");
    }
}

#[test]
fn host_network_sidecar_and_excluded_pods_are_never_meshed() {
    let host = pod("host", "10.0.0.1")
        .ambient()
        .set("spec.hostNetwork", true);
    let sidecar = pod("old", "10.0.0.2")
        .ambient()
        .annotation("sidecar.istio.io/status", "{}");
    let system = pod("dns", "10.0.0.3")
        .ambient()
        .set("metadata.namespace", "kube-system");
    let (model, diagnostics) = compiled(&[host, sidecar, system]);
    for name in ["host", "old", "dns"] {
        assert_eq!(workload(&model, name).mode, Mode::Plain, "{name}");
    }
    assert_eq!(codes(&diagnostics), ["host_network@spec.hostNetwork"]);
}

#[test]
fn invalid_mode_label_is_reported_with_its_field() {
    let typo = pod("web", "10.0.0.1").label("istio.io/dataplane-mode", "ambeint");
    let (_, diagnostics) = compiled(&[typo]);
    assert_eq!(
        diagnostics[0].to_string(),
        "test.yaml#0: Pod shop/web: metadata.labels[istio.io/dataplane-mode]: bad_label_value: \
         \"ambeint\" is neither \"ambient\" nor \"none\""
    );
}

#[test]
fn finished_pod_is_left_out_and_its_address_free() {
    let ended = pod("job", "10.0.0.1").set("status.phase", "Succeeded");
    let failed = pod("crash", "10.0.0.1").set("status.phase", "Failed");
    let (model, diagnostics) = compiled(&[ended, failed, pod("web", "10.0.0.1")]);
    assert_eq!(model.workloads().len(), 1);
    assert_eq!(
        &*model
            .workload_by_ip("10.0.0.1".parse().unwrap())
            .unwrap()
            .name,
        "web"
    );
    assert!(diagnostics.is_empty());
}

#[test]
fn workload_has_identity_and_location() {
    let labelled = node("a", "eu", "eu-1").label("topology.istio.io/subzone", "rack7");
    let model = model(&[labelled, pod("web", "10.0.0.1").label("version", "v2")]);
    let web = workload(&model, "web");
    assert_eq!(web.uid.as_str(), "Kubernetes//Pod/shop/web/uid-web");
    assert_eq!(
        web.identity.to_string(),
        "spiffe://cluster.local/ns/shop/sa/web"
    );
    assert_eq!((&*web.locality.region, &*web.locality.zone), ("eu", "eu-1"));
    assert_eq!(&*web.locality.subzone, "rack7");
    assert_eq!((&*web.app, &*web.version), ("web", "v2"));
    assert_eq!(
        (&*web.canonical_name, &*web.canonical_revision),
        ("web", "v2")
    );
    assert!(web.health.ready && web.health.serving && !web.health.terminating);
}

#[test]
fn pod_without_service_account_has_the_default_one() {
    let mut bare = pod("web", "10.0.0.1");
    bare.0["spec"]
        .as_object_mut()
        .unwrap()
        .remove("serviceAccountName");
    let model = model(&[bare]);
    let identity = workload(&model, "web").identity.to_string();
    assert_eq!(identity, "spiffe://cluster.local/ns/shop/sa/default");
}

#[test]
fn names_that_could_forge_an_identity_make_no_workload() {
    let good = pod("web", "10.0.0.1");
    let bad = [
        good.clone().set("spec.serviceAccountName", "web/../admin"),
        good.clone().set("spec.serviceAccountName", "x/sa/admin"),
        good.clone().set("spec.serviceAccountName", ".."),
        good.clone().set("spec.serviceAccountName", "Admin"),
        good.clone().set("spec.serviceAccountName", "admin\u{0}"),
        good.clone().set("metadata.namespace", "shop/sa/admin"),
        good.clone().set("metadata.namespace", "shop.prod"),
        good.clone().set("metadata.namespace", "%2e%2e"),
        good.clone().set("metadata.name", "web/x"),
        good.clone().set("metadata.uid", "../../etc/passwd"),
        good.clone().set("metadata.uid", ""),
        good.set("spec.nodeName", "a b"),
    ];
    for doc in bad {
        let (model, diagnostics) = compiled(std::slice::from_ref(&doc));
        assert_eq!(model.workloads().len(), 0, "{doc:?}");
        assert!(!diagnostics.is_empty(), "{doc:?}");
        let refused = model.address_refusal("10.0.0.1".parse().unwrap());
        assert_eq!(
            refused.map(|r| r.code()),
            Some("invalid_workload"),
            "{doc:?}"
        );
    }
}

#[test]
fn two_pods_with_one_uid_are_both_left_out() {
    let twin = pod("twin", "10.0.0.2").set("metadata.uid", "uid-web");
    let (model, diagnostics) = compiled(&[pod("web", "10.0.0.1"), twin, pod("db", "10.0.0.3")]);
    assert_eq!(model.workloads().len(), 1);
    assert_eq!(
        codes(&diagnostics),
        ["duplicate_uid@metadata.uid", "duplicate_uid@metadata.uid"]
    );
    assert!(model.address_refusal("10.0.0.1".parse().unwrap()).is_some());
}

#[test]
fn owner_is_named_as_in_istio() {
    let owned = |kind: &str, owner: &str| {
        pod("web", "10.0.0.1").set(
            "metadata.ownerReferences",
            json!([{"apiVersion": "v1", "kind": "Other", "name": "not-me", "uid": "1"},
                   {"apiVersion": "v1", "kind": kind, "name": owner, "uid": "2",
                    "controller": true}]),
        )
    };
    let hashed = |doc: crate::testing::Doc| doc.label("pod-template-hash", "5d4f7");
    let cases = [
        (
            hashed(owned("ReplicaSet", "cart-5d4f7")),
            WorkloadType::Deployment,
            "cart",
        ),
        (
            hashed(owned("ReplicaSet", "cart-other")),
            WorkloadType::Pod,
            "cart-other",
        ),
        (
            owned("ReplicaSet", "cart-5d4f7"),
            WorkloadType::Pod,
            "cart-5d4f7",
        ),
        (owned("StatefulSet", "db"), WorkloadType::Pod, "db"),
        (owned("Job", "import"), WorkloadType::Job, "import"),
        (
            owned("Job", "backup-28934560"),
            WorkloadType::CronJob,
            "backup",
        ),
        (owned("Job", "backup-123"), WorkloadType::Job, "backup-123"),
        (pod("web", "10.0.0.1"), WorkloadType::Pod, "web"),
        (
            owned("Job", "import").label("service.istio.io/workload-name", "etl"),
            WorkloadType::Job,
            "etl",
        ),
    ];
    for (doc, kind, name) in cases {
        let model = model(std::slice::from_ref(&doc));
        let web = workload(&model, "web");
        assert_eq!(
            (web.workload_type, &*web.workload_name),
            (kind, name),
            "{doc:?}"
        );
    }
}

#[test]
fn canonical_names_come_from_labels_in_istios_order() {
    let mut doc = pod("web-1", "10.0.0.1");
    doc.0["metadata"]["labels"] = json!({});
    let steps = [
        ("", "", "web-1", "latest"),
        ("app", "a", "a", "latest"),
        ("app.kubernetes.io/name", "b", "b", "latest"),
        ("service.istio.io/canonical-name", "c", "c", "latest"),
        ("version", "1", "c", "1"),
        ("app.kubernetes.io/version", "2", "c", "2"),
        ("service.istio.io/canonical-revision", "3", "c", "3"),
    ];
    for (label, value, name, revision) in steps {
        if !label.is_empty() {
            doc = doc.label(label, value);
        }
        let model = model(std::slice::from_ref(&doc));
        let web = workload(&model, "web-1");
        assert_eq!(
            (&*web.canonical_name, &*web.canonical_revision),
            (name, revision),
            "{label}"
        );
    }
}

#[test]
fn probe_ports_are_those_of_probes_and_http_hooks() {
    let doc = pod("web", "10.0.0.1").set(
        "spec.containers.0",
        json!({
            "name": "main",
            "ports": [{"name": "http", "containerPort": 8080}],
            "livenessProbe": {"httpGet": {"port": "http"}},
            "readinessProbe": {"tcpSocket": {"port": "9090"}},
            "startupProbe": {"grpc": {"port": 7070}},
            "lifecycle": {
                "postStart": {"httpGet": {"port": 6060}},
                "preStop": {"httpGet": {"port": 8080, "host": "elsewhere"}},
            },
        }),
    );
    let doc = doc.set(
        "spec.initContainers",
        json!([
            {"name": "stays", "restartPolicy": "Always",
             "livenessProbe": {"httpGet": {"port": 5050}}},
            {"name": "ends", "livenessProbe": {"httpGet": {"port": 4040}}},
        ]),
    );
    let (model, diagnostics) = compiled(&[doc]);
    assert_eq!(
        workload(&model, "web").probe_ports,
        [5050, 6060, 7070, 8080, 9090]
    );
    assert!(diagnostics.is_empty());
}

#[test]
fn probe_of_a_missing_port_is_reported() {
    let doc = pod("web", "10.0.0.1").set(
        "spec.containers.0.livenessProbe",
        json!({"httpGet": {"port": "metrics"}, "tcpSocket": {"port": 70000}}),
    );
    let (model, diagnostics) = compiled(&[doc]);
    assert!(workload(&model, "web").probe_ports.is_empty());
    assert_eq!(
        codes(&diagnostics),
        [
            "bad_port@spec.containers[0].livenessProbe.port",
            "named_port_missing@spec.containers[0].livenessProbe.port"
        ]
    );
}
