//! Builders of Kubernetes objects for tests, and helpers to compile them.

use serde_json::{Value, json};
use spiffe::TrustDomain;

use crate::objects::{Objects, parse};
use crate::{Diagnostic, Model, Params, Workload, compile};

/// One object as a document.
#[derive(Clone, Debug)]
pub(crate) struct Doc(pub(crate) Value);

impl Doc {
    /// Sets a field by its path, `metadata.labels.app`; dots within a key are written `~`.
    pub(crate) fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut at = &mut self.0;
        for key in path.split('.') {
            let key = key.replace('~', ".");
            at = match key.parse::<usize>() {
                Ok(index) => &mut at[index],
                Err(_) => &mut at[key],
            };
        }
        *at = value.into();
        self
    }

    pub(crate) fn label(self, key: &str, value: &str) -> Self {
        self.set(&format!("metadata.labels.{}", key.replace('.', "~")), value)
    }

    pub(crate) fn annotation(self, key: &str, value: &str) -> Self {
        self.set(
            &format!("metadata.annotations.{}", key.replace('.', "~")),
            value,
        )
    }

    pub(crate) fn ambient(self) -> Self {
        self.label("istio.io/dataplane-mode", "ambient")
    }

    pub(crate) fn not_ready(self) -> Self {
        self.set("status.conditions.0.status", "False")
    }

    pub(crate) fn terminating(self) -> Self {
        self.set("metadata.deletionTimestamp", "2026-01-01T00:00:00Z")
    }
}

pub(crate) fn namespace(name: &str) -> Doc {
    Doc(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
}

pub(crate) fn node(name: &str, region: &str, zone: &str) -> Doc {
    Doc(json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {
            "topology.kubernetes.io/region": region, "topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.1"},
                                 {"type": "Hostname", "address": name}]},
    }))
}

/// A ready pod in namespace `shop` on node `a`, with the label `app: <name without its number>`.
pub(crate) fn pod(name: &str, ip: &str) -> Doc {
    let app = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
    Doc(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"),
                     "labels": {"app": app}},
        "spec": {"nodeName": "a", "serviceAccountName": app, "containers": [
            {"name": "main", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}],
                   "conditions": [{"type": "Ready", "status": "True"}]},
    }))
}

/// Service `shop/<name>` of port 80 for the pods with the label `app: <name>`.
pub(crate) fn service(name: &str, vip: &str) -> Doc {
    Doc(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": vip, "clusterIPs": [vip], "selector": {"app": name},
                 "ports": [{"name": "http", "port": 80, "targetPort": 8080}]},
    }))
}

/// A slice of service `shop/<service>` with these endpoints.
pub(crate) fn slice(name: &str, service: &str, endpoints: Value) -> Doc {
    Doc(json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop",
                     "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": endpoints,
    }))
}

pub(crate) fn params() -> Params {
    Params::new(TrustDomain::new("cluster.local").expect("a constant"))
}

pub(crate) fn text(docs: &[Doc]) -> String {
    docs.iter().map(|doc| format!("---\n{}\n", doc.0)).collect()
}

pub(crate) fn objects(docs: &[Doc]) -> Objects {
    let parsed = parse(&"test.yaml".into(), text(docs).as_bytes());
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    let mut objects = Objects::default();
    parsed
        .objects
        .into_iter()
        .for_each(|(object, origin)| objects.insert(object, origin));
    objects
}

pub(crate) fn compiled(docs: &[Doc]) -> (Model, Vec<Diagnostic>) {
    compile(&objects(docs), &params())
}

pub(crate) fn model(docs: &[Doc]) -> Model {
    compiled(docs).0
}

/// `code@field` of each diagnostic.
pub(crate) fn codes(diagnostics: &[Diagnostic]) -> Vec<String> {
    diagnostics
        .iter()
        .map(|p| format!("{}@{}", p.code, p.field))
        .collect()
}

/// The workload of this name, in any namespace.
pub(crate) fn workload<'a>(model: &'a Model, name: &str) -> &'a Workload {
    model
        .workloads()
        .find(|w| *w.name == *name)
        .expect("the workload is in the model")
}
