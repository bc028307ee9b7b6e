//! The cluster that is measured: many workloads and many policies, as manifests.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use mesh::objects::{Objects, parse};
use mesh::{Model, Params, Workload};
use serde_json::{Value, json};
use spiffe::TrustDomain;

/// Number of pods.
pub const WORKLOADS: usize = 1_000;
/// Number of policies, in a cluster that has any.
pub const POLICIES: usize = 10_000;
/// Number of pods that no policy selects.
pub const UNSELECTED: usize = 100;
/// The first pods are selected by exactly this many policies each. The last of a pod's policies by
/// name admits [`CLIENT`].
pub const SELECTED_BY: [usize; 3] = [1, 10, 100];
/// Application port of every pod.
pub const PORT: u16 = 8080;

const NAMESPACES: usize = 20;

/// The kind of the cluster's policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policies {
    /// No policies.
    None,
    /// [`POLICIES`] AuthorizationPolicies.
    Authorization,
    /// [`POLICIES`] NetworkPolicies.
    Network,
}

/// A pod of the cluster, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod(pub usize);

/// The pod that the policies of the first pods admit.
pub const CLIENT: Pod = Pod(SELECTED_BY.len());
/// A pod that they do not admit.
pub const OTHER_CLIENT: Pod = Pod(SELECTED_BY.len() + 1);

impl Pod {
    /// The pods that no policy selects.
    pub fn unselected() -> impl Iterator<Item = Pod> {
        (WORKLOADS - UNSELECTED..WORKLOADS).map(Pod)
    }

    /// The name of the pod, of its `app` label and of its service account.
    pub fn name(self) -> String {
        format!("app-{}", self.0)
    }

    /// The namespace of the pod.
    pub fn namespace(self) -> String {
        format!("team-{}", self.0 % NAMESPACES)
    }

    /// The address of the pod.
    pub fn ip(self) -> IpAddr {
        let [.., high, low] = (self.0 + 1).to_be_bytes();
        Ipv4Addr::new(10, 244, high, low).into()
    }

    /// The principal in AuthorizationPolicies: the identity without `spiffe://`.
    pub fn principal(self) -> String {
        format!("cluster.local/ns/{}/sa/{}", self.namespace(), self.name())
    }

    /// The workload in the model.
    ///
    /// # Panics
    ///
    /// If the model is of another cluster.
    pub fn workload(self, model: &Model) -> &Workload {
        let workload = model.workload_by_ip(self.ip());
        workload.expect("every pod of the cluster is in the model")
    }

    fn manifest(self) -> Value {
        let (name, namespace) = (self.name(), self.namespace());
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{name}"),
                         "labels": {"app": name, "version": "v1", "pod-template-hash": "7c5ddbdf54",
                                    "istio.io/dataplane-mode": "ambient"}},
            "spec": {"nodeName": format!("node-{}", self.0 % 10), "serviceAccountName": name,
                     "containers": [{"name": "main",
                                     "ports": [{"name": "http", "containerPort": PORT}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": self.ip()}],
                       "conditions": [{"type": "Ready", "status": "True"}]},
        })
    }
}

/// The manifests of the cluster as one file.
pub fn manifests(policies: Policies) -> String {
    let namespaces = (0..NAMESPACES).map(|n| {
        let name = Pod(n).namespace();
        json!({"apiVersion": "v1", "kind": "Namespace",
               "metadata": {"name": name, "labels": {"team": name}}})
    });
    let pods = (0..WORKLOADS).map(|n| Pod(n).manifest());
    let policies = selected_pods(policies)
        .into_iter()
        .enumerate()
        .filter_map(|(n, (pod, last))| policy(policies, n, pod, last));
    let mut text = String::new();
    for document in namespaces.chain(pods).chain(policies) {
        // Writing to a string cannot fail.
        let _ = write!(text, "---\n{document}\n");
    }
    text
}

/// The manifest of one more policy of this kind, which selects [`CLIENT`].
pub fn additional_policy(policies: Policies) -> Option<String> {
    policy(policies, POLICIES, CLIENT, false).map(|document| document.to_string())
}

fn policy(policies: Policies, n: usize, pod: Pod, admits_client: bool) -> Option<Value> {
    match policies {
        Policies::None => None,
        Policies::Authorization => Some(authorization(n, pod, admits_client)),
        Policies::Network => Some(network(n, pod, admits_client)),
    }
}

/// For each policy, the pod that it selects and whether it admits [`CLIENT`].
fn selected_pods(policies: Policies) -> Vec<(Pod, bool)> {
    if policies == Policies::None {
        return Vec::new();
    }
    let mut pods = Vec::with_capacity(POLICIES);
    for (n, count) in SELECTED_BY.into_iter().enumerate() {
        pods.extend((1..=count).map(|i| (Pod(n), i == count)));
    }
    let others = (CLIENT.0..WORKLOADS - UNSELECTED).cycle();
    let rest = POLICIES - pods.len();
    pods.extend(others.take(rest).map(|n| (Pod(n), false)));
    pods
}

/// A policy in one of three forms from Istio's guides: ALLOW by identity, ALLOW by namespace, DENY by
/// address and namespace. The policies of the first pods are all of the first form.
fn authorization(n: usize, pod: Pod, admits_client: bool) -> Value {
    let mut principals: Vec<String> = (0..4)
        .map(|i| Pod(OTHER_CLIENT.0 + 1 + (n + i * 37) % 500).principal())
        .collect();
    if admits_client {
        principals.push(CLIENT.principal());
    }
    let operation = json!([{"operation": {"ports": [PORT.to_string(), "9090"]}}]);
    let form = if pod.0 < SELECTED_BY.len() { 0 } else { n % 3 };
    let (action, from) = match form {
        0 => ("ALLOW", json!({"principals": principals})),
        1 => (
            "ALLOW",
            json!({"namespaces": [Pod(n).namespace(), "istio-system"]}),
        ),
        _ => (
            "DENY",
            json!({"notIpBlocks": ["10.0.0.0/8"], "notNamespaces": ["kube-*"]}),
        ),
    };
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": format!("policy-{n:05}"), "namespace": pod.namespace()},
        "spec": {"selector": {"matchLabels": {"app": pod.name()}}, "action": action,
                 "rules": [{"from": [{"source": from}], "to": operation}]},
    })
}

fn network(n: usize, pod: Pod, admits_client: bool) -> Value {
    let peer = |pod: Pod| {
        json!({"podSelector": {"matchLabels": {"app": pod.name()}},
               "namespaceSelector": {"matchLabels": {"team": pod.namespace()}}})
    };
    let mut peers: Vec<Value> = (0..4)
        .map(|i| peer(Pod(OTHER_CLIENT.0 + 1 + (n + i * 37) % 500)))
        .collect();
    if admits_client {
        peers.push(peer(CLIENT));
    }
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("policy-{n:05}"), "namespace": pod.namespace()},
        "spec": {"podSelector": {"matchLabels": {"app": pod.name()}},
                 "ingress": [{"from": peers, "ports": [{"port": "http"}, {"port": 9090}]}]},
    })
}

/// Parses manifests.
///
/// # Panics
///
/// If a manifest is invalid.
pub fn objects(manifests: &str) -> Objects {
    let parsed = parse(&"cluster.yaml".into(), manifests.as_bytes());
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors.first());
    assert!(parsed.ignored.is_empty(), "{:?}", parsed.ignored.first());
    let mut objects = Objects::default();
    for (object, origin) in parsed.objects {
        objects.insert(object, origin);
    }
    objects
}

/// The parameters of the cluster.
pub fn params() -> Params {
    let trust_domain = TrustDomain::new("cluster.local");
    Params::new(trust_domain.expect("the constant is a trust domain"))
}
