//! The decisions of AuthorizationPolicy and PeerAuthentication, and their reports.

mod dry_run;
mod fields;
mod http;
mod invalid;
mod peer_authentication;
mod properties;
mod reports;
mod scopes;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde_json::{Value, json};
use spiffe::SpiffeId;

use super::*;
use crate::authorize::InboundConnection;
use crate::compile::compile;
use crate::model::{Model, Workload};
use crate::params::Params;
use crate::testing::{Doc, namespace, objects, params, pod};

/// The root namespace.
const ROOT: &str = "istio-system";

/// A model of some policies and a few pods: `shop/web`, `shop/db`, `bank/web` (of two versions) and
/// `istio-system/gate`.
pub(super) struct Fixture {
    pub(super) model: Model,
    pub(super) diagnostics: Vec<crate::Diagnostic>,
}

fn in_namespace(name: &str, namespace: &str, ip: &str) -> Doc {
    pod(name, ip)
        .set("metadata.namespace", namespace)
        .set("metadata.uid", format!("uid-{namespace}-{name}"))
        .ambient()
}

pub(super) fn pods() -> Vec<Doc> {
    vec![
        namespace("shop"),
        namespace("bank"),
        in_namespace("web", "shop", "10.0.0.1").label("version", "v1"),
        in_namespace("db", "shop", "10.0.0.2"),
        in_namespace("web", "bank", "10.0.0.3"),
        in_namespace("gate", ROOT, "10.0.0.4"),
        pod("plain", "10.0.0.5"),
    ]
}

/// A policy from the YAML of its spec.
pub(super) fn policy(kind: &str, name: &str, spec: &str) -> Doc {
    let (group, kind) = match kind {
        "NetworkPolicy" => ("networking.k8s.io/v1", kind),
        _ => ("security.istio.io/v1", kind),
    };
    let (namespace, name) = name.split_once('/').expect("namespace/name");
    let spec: Value = serde_yaml_ng::from_str(spec).expect("YAML");
    Doc(json!({"apiVersion": group, "kind": kind,
               "metadata": {"name": name, "namespace": namespace}, "spec": spec}))
}

pub(super) fn authz(name: &str, spec: &str) -> Doc {
    policy("AuthorizationPolicy", name, spec)
}

pub(super) fn fixture(policies: &[Doc]) -> Fixture {
    fixture_with(policies, &params())
}

pub(super) fn fixture_with(policies: &[Doc], params: &Params) -> Fixture {
    let docs: Vec<Doc> = pods().into_iter().chain(policies.iter().cloned()).collect();
    let (model, diagnostics) = compile(&objects(&docs), params);
    Fixture { model, diagnostics }
}

impl Fixture {
    /// The decision about a connection `<principal or -> <source ip> <port>` to a pod
    /// `namespace/name`.
    pub(super) fn decide(&self, pod: &str, connection: &str) -> Decision {
        let workload = self.workload(pod);
        let mut parts = connection.split(' ');
        let mut next = || parts.next().expect("three parts");
        let source = match next() {
            "-" => None,
            principal => Some(SpiffeId::new(format!("spiffe://{principal}")).expect("an id")),
        };
        let source_ip: IpAddr = next().parse().expect("an address");
        let port = next().parse().expect("a port");
        let source_workload = self.model.workload_by_ip(source_ip);
        self.model.authorize(
            workload,
            &InboundConnection {
                source_identity: source.as_ref(),
                source_ip,
                source_workload: source_workload.map(AsRef::as_ref),
                destination: SocketAddr::new(workload.ips[0], port),
            },
        )
    }

    pub(super) fn denial(&self, pod: &str, connection: &str) -> Option<String> {
        let denial = self.decide(pod, connection).denial;
        denial.map(|denial| denial.policy.to_string())
    }

    pub(super) fn allows(&self, pod: &str, connection: &str) -> bool {
        self.denial(pod, connection).is_none()
    }

    pub(super) fn workload(&self, pod: &str) -> &Workload {
        let (namespace, name) = pod.split_once('/').expect("namespace/name");
        self.model
            .workloads()
            .find(|w| *w.namespace == *namespace && *w.name == *name)
            .expect("the pod is in the model")
    }

    pub(super) fn report(&self, name: &str) -> &PolicyReport {
        let named =
            |r: &&Arc<PolicyReport>| format!("{}/{}", r.object.namespace, r.object.name) == name;
        self.model.policies().iter().find(named).expect("a report")
    }

    /// `code@field` of each message of a report.
    pub(super) fn messages(&self, name: &str) -> Vec<String> {
        let messages = &self.report(name).messages;
        messages
            .iter()
            .map(|m| format!("{}@{}", m.code, m.field))
            .collect()
    }
}

/// `shop/web` of this cluster, from its own address.
pub(super) const WEB: &str = "cluster.local/ns/shop/sa/web 10.0.0.1 8080";
/// `bank/web`.
pub(super) const BANK: &str = "cluster.local/ns/bank/sa/web 10.0.0.3 8080";
/// Plaintext.
pub(super) const PLAIN: &str = "- 192.0.2.7 8080";
