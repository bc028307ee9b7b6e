//! Builders for short manifests. They produce JSON, which is also YAML, one document per object.

use serde_json::{Map, Value, json};

/// Joins several manifests to one.
pub fn all<T: Into<String>>(manifests: impl IntoIterator<Item = T>) -> String {
    manifests
        .into_iter()
        .map(Into::into)
        .collect::<Vec<String>>()
        .join("\n---\n")
}

/// A node in a zone.
pub fn node(name: &str, zone: &str) -> String {
    let labels =
        json!({"topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": zone});
    let node =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}});
    node.to_string()
}

/// Nodes `a` and `b`, in zones `za` and `zb`.
pub fn two_nodes() -> String {
    all([node("a", "za"), node("b", "zb")])
}

/// A namespace; `mode` is the value of its `istio.io/dataplane-mode` label.
pub fn namespace(name: &str, mode: Option<&str>) -> String {
    let labels: Map<String, Value> = mode
        .map(|mode| ("istio.io/dataplane-mode".to_owned(), mode.into()))
        .into_iter()
        .collect();
    let metadata = json!({"name": name, "labels": labels});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}).to_string()
}

/// A service account.
pub fn service_account(namespace: &str, name: &str) -> String {
    let metadata = json!({"namespace": namespace, "name": name});
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}).to_string()
}

/// A Pod with one container, which runs `sleep` unless [`Pod::runs`] sets a command.
#[derive(Debug, Clone)]
pub struct Pod(Value);

impl Pod {
    /// Creates a pod with the label `app` and the service account of its own name, so that its identity
    /// is unique.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": namespace, "name": name, "labels": {"app": name}},
            "spec": {
                "serviceAccountName": name,
                "terminationGracePeriodSeconds": 1,
                "containers": [{"name": "main", "command": ["sleep", "inf"], "ports": []}],
            },
        }))
    }

    /// Sets the node.
    #[must_use]
    pub fn on(self, node: &str) -> Self {
        self.set("/spec", "nodeName", node)
    }

    /// Sets the command of the container.
    #[must_use]
    pub fn runs(self, command: Vec<String>) -> Self {
        self.set("/spec/containers/0", "command", command)
    }

    /// Sets a label.
    #[must_use]
    pub fn label(self, key: &str, value: &str) -> Self {
        self.set("/metadata/labels", key, value)
    }

    /// Adds a container port, which may have a name.
    #[must_use]
    pub fn port(mut self, name: Option<&str>, number: u16) -> Self {
        let mut port = json!({"containerPort": number});
        if let (Some(name), Some(port)) = (name, port.as_object_mut()) {
            port.insert("name".to_owned(), name.into());
        }
        if let Some(ports) = self
            .0
            .pointer_mut("/spec/containers/0/ports")
            .and_then(Value::as_array_mut)
        {
            ports.push(port);
        }
        self
    }

    /// Sets a field of the container, such as `readinessProbe`.
    #[must_use]
    pub fn container(self, field: &str, value: Value) -> Self {
        self.set("/spec/containers/0", field, value)
    }

    /// Sets a field of `spec`.
    #[must_use]
    pub fn spec(self, field: &str, value: impl Into<Value>) -> Self {
        self.set("/spec", field, value)
    }

    /// Sets a field of `metadata`.
    #[must_use]
    pub fn metadata(self, field: &str, value: impl Into<Value>) -> Self {
        self.set("/metadata", field, value)
    }

    fn set(mut self, at: &str, field: &str, value: impl Into<Value>) -> Self {
        if let Some(object) = self.0.pointer_mut(at).and_then(Value::as_object_mut) {
            object.insert(field.to_owned(), value.into());
        }
        self
    }
}

impl From<Pod> for String {
    /// The pod and its service account, without which Kubernetes rejects the pod.
    fn from(pod: Pod) -> Self {
        let text = |at: &str| {
            pod.0
                .pointer(at)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let account = service_account(
            text("/metadata/namespace"),
            text("/spec/serviceAccountName"),
        );
        all([account, pod.0.to_string()])
    }
}

/// A dual-stack Service with one port.
#[derive(Debug, Clone)]
pub struct Service(Value);

impl Service {
    /// Creates a service of the pods with the label `app: <name>`. The target port is a number or the
    /// name of a container port.
    pub fn new(namespace: &str, name: &str, port: u16, target: impl Into<Value>) -> Self {
        let target: Value = target.into();
        Self(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": namespace, "name": name},
            "spec": {
                "selector": {"app": name},
                "ipFamilyPolicy": "PreferDualStack",
                "ports": [{"name": "main", "protocol": "TCP", "port": port, "targetPort": target}],
            },
        }))
    }

    /// Makes the service headless.
    #[must_use]
    pub fn headless(self) -> Self {
        self.spec("clusterIP", "None")
    }

    /// Selects the pods with this value of the label `app`.
    #[must_use]
    pub fn selecting(self, app: &str) -> Self {
        self.spec("selector", json!({"app": app}))
    }

    /// Removes the selector, for endpoints that a test applies itself.
    #[must_use]
    pub fn without_selector(mut self) -> Self {
        if let Some(spec) = self.0.pointer_mut("/spec").and_then(Value::as_object_mut) {
            spec.remove("selector");
        }
        self
    }

    /// Sets a field of `spec`.
    #[must_use]
    pub fn spec(mut self, field: &str, value: impl Into<Value>) -> Self {
        if let Some(spec) = self.0.pointer_mut("/spec").and_then(Value::as_object_mut) {
            spec.insert(field.to_owned(), value.into());
        }
        self
    }
}

impl From<Service> for String {
    fn from(service: Service) -> Self {
        service.0.to_string()
    }
}

/// An EndpointSlice of a service with one ready address and one port named `main`.
pub fn endpoint_slice(
    namespace: &str,
    service: &str,
    address: std::net::IpAddr,
    port: u16,
) -> String {
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let name = format!("{service}-{}", family.to_lowercase());
    let labels = json!({"kubernetes.io/service-name": service});
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "addressType": family,
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "main", "protocol": "TCP", "port": port}],
    })
    .to_string()
}
