use super::*;

const BASE: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Node, metadata: {name: b}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {selector: {app: web}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {containers: [{name: c, command: [x]}]}}
";

fn apply(cluster: &mut Cluster, yaml: &str) -> Result<Created> {
    let mut created = Created::default();
    for object in manifest::parse(yaml)? {
        cluster.put(object, &|| "0123abcd-uid".to_owned(), &mut created)?;
    }
    Ok(created)
}

fn base() -> Cluster {
    let mut cluster = Cluster::new("t");
    apply(&mut cluster, BASE).unwrap();
    cluster
}

fn key(namespace: &str, name: &str) -> Key {
    (namespace.to_owned(), name.to_owned())
}

#[test]
fn created_objects_are_reported_once() {
    let mut cluster = Cluster::new("t");
    let created = apply(&mut cluster, BASE).unwrap();
    assert_eq!(created.nodes, ["a", "b"]);
    assert_eq!(created.pods, [key("shop", "web")]);
    assert_eq!(apply(&mut cluster, BASE).unwrap(), Created::default());
}

#[test]
fn pod_has_addresses_of_its_node_and_the_default_account() {
    let cluster = base();
    let pod = &cluster.pods[&key("shop", "web")];
    assert_eq!(pod.node, "a");
    assert_eq!(
        pod.ips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.244.1.2", "fd00:10:244:1::2"]
    );
    assert_eq!(pod.netns, "ambit-t-pod-shop.web-0123abcd");
    assert_eq!(pod.spec().service_account_name.as_deref(), Some("default"));
    assert!(cluster.meshed(pod));
}

#[test]
fn fixed_address_is_free_after_its_pod_is_removed() {
    let mut cluster = base();
    let fixed = "{apiVersion: v1, kind: Pod, metadata: {name: x, annotations: {lab.ambit.dev/ip: 10.244.1.2}},
                  spec: {nodeName: a, containers: [{name: c, command: [x]}]}}";
    let error = format!("{:#}", apply(&mut cluster, fixed).unwrap_err());
    assert!(
        error.contains("10.244.1.2 is taken by pod shop/web"),
        "{error}"
    );
    cluster.remove_pod(&key("shop", "web"));
    apply(&mut cluster, fixed).unwrap();
    assert_eq!(
        cluster.pods[&key("default", "x")].ips[0].to_string(),
        "10.244.1.2"
    );
}

#[test]
fn references_to_missing_objects_are_refused() {
    let pod = |spec: &str, ns: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p, namespace: {ns}}}, spec: {{containers: [{{name: c, command: [x]}}]{spec}}}}}"
        )
    };
    for (yaml, reason) in [
        (pod("", "nowhere"), "there is no namespace nowhere"),
        (
            pod(", serviceAccountName: nobody", "shop"),
            "there is no service account shop/nobody",
        ),
        (pod(", nodeName: c", "shop"), "there is no node c"),
    ] {
        let error = format!("{:#}", apply(&mut base(), &yaml).unwrap_err());
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn running_pod_can_change_labels_but_not_its_spec() {
    let mut cluster = base();
    apply(
        &mut cluster,
        &BASE.replace("labels: {app: web}}", "labels: {app: other}}"),
    )
    .unwrap();
    let labels = cluster.pods[&key("shop", "web")]
        .object
        .metadata
        .labels
        .clone()
        .unwrap();
    assert_eq!(labels["app"], "other");
    assert!(apply(&mut cluster, &BASE.replace("command: [x]", "command: [y]")).is_err());
}

#[test]
fn updated_service_keeps_its_address() {
    let mut cluster = base();
    let before = service::cluster_ips(&cluster.services[&key("shop", "web")]);
    apply(&mut cluster, &BASE.replace("port: 80", "port: 81")).unwrap();
    assert_eq!(
        service::cluster_ips(&cluster.services[&key("shop", "web")]),
        before
    );
}

#[test]
fn labels_are_set_and_removed() {
    let mut cluster = base();
    let off = BTreeMap::from([("istio.io/dataplane-mode".to_owned(), None)]);
    cluster.label("namespace", "shop", &off).unwrap();
    assert!(!cluster.meshed(&cluster.pods[&key("shop", "web")]));
    let on = BTreeMap::from([(
        "istio.io/dataplane-mode".to_owned(),
        Some("ambient".to_owned()),
    )]);
    cluster.label("Pod", "web", &on).unwrap();
    assert!(cluster.meshed(&cluster.pods[&key("shop", "web")]));
    assert!(cluster.label("Pod", "nobody", &on).is_err());
}

#[test]
fn deleted_namespace_deletes_its_objects() {
    let mut cluster = base();
    cluster.remove_pod(&key("shop", "web"));
    cluster.delete("Namespace", "shop").unwrap();
    assert!(
        !cluster
            .files()
            .unwrap()
            .keys()
            .any(|file| file.contains("shop"))
    );
}

#[test]
fn each_object_has_one_file() {
    let files = base().files().unwrap();
    for name in [
        "node.a.yaml",
        "namespace.shop.yaml",
        "serviceaccount.shop.default.yaml",
        "service.shop.web.yaml",
        "endpointslice.shop.web-ipv4-0.yaml",
        "pod.shop.web.yaml",
    ] {
        assert!(files.contains_key(name), "{name} in {:?}", files.keys());
    }
}
