//! NetworkPolicy decisions in a cluster of nine pods: cases of Kubernetes' conformance suite, common
//! recipes, and every field by itself.

mod invalid;
mod ports;
mod properties;
mod recipes;
mod report;
mod scope;
mod selectors;
mod sources;

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use super::{NetworkPolicy, read};
use crate::diagnostic::Diagnostics;
use crate::objects::{Object, parse};
use crate::policy::Denial;
use crate::testing::{Doc, compiled, namespace, pod};
use crate::{Diagnostic, InboundConnection, Model, Workload};

/// Three namespaces `x`, `y` and `z` with the label `ns: <name>`, in each of them the pods `a`, `b`
/// and `c` with the label `pod: <name>` and the container ports `serve-80` and `serve-81`. Pod
/// `y/b` is 10.0.2.2 and fd00::2:2.
pub(super) struct Fixture {
    pub(super) model: Model,
    pub(super) diagnostics: Vec<Diagnostic>,
}

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 3] = ["a", "b", "c"];
pub(super) const PORTS: [u16; 2] = [80, 81];

/// All nine pods.
pub(super) fn everyone() -> impl Iterator<Item = String> {
    let of = |namespace: &'static str| PODS.iter().map(move |pod| format!("{namespace}/{pod}"));
    NAMESPACES.into_iter().flat_map(of)
}

pub(super) fn cluster() -> Vec<Doc> {
    let mut docs = Vec::new();
    for (n, ns) in (1..).zip(NAMESPACES) {
        docs.push(namespace(ns).label("ns", ns));
        for (p, name) in (1..).zip(PODS) {
            docs.push(
                pod(name, &format!("10.0.{n}.{p}"))
                    .set("metadata.namespace", ns)
                    .set("metadata.uid", format!("uid-{ns}-{name}"))
                    .set("metadata.labels", json!({"pod": name}))
                    .set(
                        "status.podIPs",
                        json!([{"ip": format!("10.0.{n}.{p}")}, {"ip": format!("fd00::{n}:{p}")}]),
                    )
                    .set(
                        "spec.containers.0.ports",
                        json!([{"name": "serve-80", "containerPort": 80},
                               {"name": "serve-81", "containerPort": 81}]),
                    ),
            );
        }
    }
    docs
}

impl Fixture {
    /// The cluster with these policies, each a YAML document without its `apiVersion` and `kind`,
    /// all valid.
    pub(super) fn new(policies: &[&str]) -> Self {
        Self::changed(policies, |_| {})
    }

    /// The same with a changed cluster.
    pub(super) fn changed(policies: &[&str], change: impl FnOnce(&mut Vec<Doc>)) -> Self {
        let mut docs = cluster();
        change(&mut docs);
        let policies = policies.iter().map(|text| yaml(text)).collect();
        let (fixture, errors) = Self::of(policies, &docs);
        assert!(errors.is_empty(), "{errors:?}");
        fixture
    }

    /// The cluster with these policies, some of which are invalid.
    pub(super) fn with_errors(policies: &[&str]) -> Self {
        let policies = policies.iter().map(|text| yaml(text)).collect();
        let (fixture, errors) = Self::of(policies, &cluster());
        assert!(!errors.is_empty());
        fixture
    }

    /// The cluster with these policies, and their errors. A policy without a name gets one of its
    /// own.
    pub(super) fn of(policies: Vec<Value>, docs: &[Doc]) -> (Self, Vec<String>) {
        let (mut docs, mut errors) = (docs.to_vec(), Vec::new());
        for (n, mut policy) in policies.into_iter().enumerate() {
            errors.extend(read_value(policy.clone()).1);
            if policy["metadata"]["name"] == "policy" {
                policy["metadata"]["name"] = format!("policy-{n}").into();
            }
            docs.push(Doc(policy));
        }
        let (model, diagnostics) = compiled(&docs);
        (Self { model, diagnostics }, errors)
    }

    pub(super) fn workload(&self, name: &str) -> &Workload {
        let (namespace, pod) = name.split_once('/').expect("<namespace>/<pod>");
        let found = self
            .model
            .workloads()
            .find(|w| *w.namespace == *namespace && *w.name == *pod);
        found.expect("the pod is in the model")
    }

    /// The decision about a connection from a pod or an address to a port of a pod.
    pub(super) fn decide(&self, from: &str, to: &str, port: u16) -> Result<(), Denial> {
        let workload = self.workload(to);
        let (source_workload, source_ip) = match from.parse::<IpAddr>() {
            Ok(ip) => (self.model.workload_by_ip(ip).map(|w| &**w), ip),
            Err(_) => (Some(self.workload(from)), self.workload(from).ips[0]),
        };
        let v6 = source_ip.to_canonical().is_ipv6();
        let connection = InboundConnection {
            source_identity: None,
            source_ip,
            source_workload,
            destination: SocketAddr::new(workload.ip(v6).expect("both families"), port),
        };
        match self.model.authorize(workload, &connection).denial {
            None => Ok(()),
            Some(denial) => Err(denial),
        }
    }

    pub(super) fn admits(&self, from: &str, to: &str, port: u16) -> bool {
        self.decide(from, to, port).is_ok()
    }

    /// Of the nine pods, those that reach this port of this pod; a pod always reaches itself, which
    /// is left out.
    pub(super) fn reach(&self, to: &str, port: u16) -> Vec<String> {
        let reach = |from: &String| from != to && self.admits(from, to, port);
        everyone().filter(reach).collect()
    }

    /// Exactly these sources reach the targets, on every port. Both are lists such as `x/b y/*`.
    pub(super) fn expect(&self, targets: &str, sources: &str) {
        for to in pods(targets) {
            for port in PORTS {
                self.expect_on(&to, port, sources);
            }
        }
    }

    pub(super) fn expect_on(&self, to: &str, port: u16, sources: &str) {
        let mut expected = pods(sources);
        expected.retain(|source| source != to);
        assert_eq!(self.reach(to, port), expected, "who reaches {to}:{port}");
    }

    /// These pods accept connections from all pods.
    pub(super) fn expect_open(&self, targets: &str) {
        self.expect(targets, "x/* y/* z/*");
    }
}

/// Spells out `x/*`.
fn pods(list: &str) -> Vec<String> {
    let mut pods = Vec::new();
    for entry in list.split_whitespace() {
        match entry.strip_suffix("/*") {
            Some(namespace) => pods.extend(PODS.map(|pod| format!("{namespace}/{pod}"))),
            None => pods.push(entry.to_owned()),
        }
    }
    pods
}

/// A NetworkPolicy; without a `metadata` of its own it is `x/policy`.
pub(super) fn yaml(text: &str) -> Value {
    let mut value: Value = serde_yaml_ng::from_str(text).expect("YAML");
    let base = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                      "metadata": {"namespace": "x", "name": "policy"}});
    for (key, default) in base.as_object().expect("an object") {
        if value.get(key).is_none() {
            value[key] = default.clone();
        }
    }
    value
}

/// The policy and its errors, as `code@field`.
pub(super) fn read_value(policy: Value) -> (NetworkPolicy, Vec<String>) {
    let parsed = parse(&"test.yaml".into(), policy.to_string().as_bytes());
    let [(Object::Policy(object), origin)] = &parsed.objects[..] else {
        panic!("{parsed:?}");
    };
    let mut found = Diagnostics::default();
    let policy = read(object, &mut found);
    let reference = parsed.objects[0].0.reference();
    let errors = found.into_vec().into_iter().filter(|d| !d.is_note());
    let diagnostics: Vec<_> = errors.map(|f| f.at(reference.clone(), origin)).collect();
    (policy, crate::testing::codes(&diagnostics))
}
