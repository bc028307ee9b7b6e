//! NetworkPolicies in the model: together with other policies, disabled, and reported.

use std::net::SocketAddr;

use serde_json::json;

use super::{Fixture, cluster, yaml};
use crate::policy::{PolicyReport, PolicyState};
use crate::testing::{Doc, objects, params};
use crate::{InboundConnection, Model, Params, compile};

fn model(policies: &[Doc], params: &Params) -> Model {
    let docs = [&cluster()[..], policies].concat();
    compile(&objects(&docs), params).0
}

/// The denial of a connection from `y/a` to port 80 of `x/a` with the identity of its source.
fn denial(model: &Model) -> Option<String> {
    let find = |namespace: &str| {
        let mut workloads = model.workloads();
        workloads.find(|w| *w.namespace == *namespace && *w.name == *"a")
    };
    let (from, to) = (find("y").expect("y/a"), find("x").expect("x/a"));
    let connection = InboundConnection {
        source_identity: Some(&from.identity),
        source_ip: from.ips[0],
        source_workload: Some(from),
        destination: SocketAddr::new(to.ips[0], 80),
    };
    let decision = model.authorize(to, &connection);
    decision.denial.map(|denial| denial.policy.to_string())
}

fn report<'a>(model: &'a Model, name: &str) -> &'a PolicyReport {
    let mut reports = model.policies().iter();
    let found = reports.find(|report| *report.object.name == *name);
    found.expect("every policy has a report")
}

fn named(name: &str, spec: &str) -> Doc {
    Doc(yaml(&format!(
        "{{metadata: {{namespace: x, name: {name}}}, spec: {spec}}}"
    )))
}

fn authorization(action: &str) -> Doc {
    Doc(json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "authorization", "namespace": "x"},
        "spec": {"action": action,
                 "rules": [{"from": [{"source": {"namespaces": ["y"]}}]}]},
    }))
}

#[test]
fn authorization_and_network_policies_must_both_admit() {
    let closed = named("closed", "{}");
    let open = named("open", "{ingress: [{}]}");
    let closed_names = "NetworkPolicy: no ingress rule matched (x/closed)";
    let table = [
        (vec![authorization("ALLOW"), open.clone()], None),
        (
            vec![authorization("ALLOW"), closed.clone()],
            Some(closed_names),
        ),
        (
            vec![authorization("DENY"), open],
            Some("AuthorizationPolicy x/authorization"),
        ),
        (
            vec![authorization("DENY"), closed],
            Some("AuthorizationPolicy x/authorization"),
        ),
    ];
    for (policies, expected) in table {
        assert_eq!(denial(&model(&policies, &params())).as_deref(), expected);
    }
}

#[test]
fn disabled_network_policies_restrict_nothing_and_are_reported() {
    let off = Params {
        network_policy: false,
        ..params()
    };
    let policies = [named("closed", "{}"), named("invalid", "{ingress: 7}")];
    assert!(denial(&model(&policies, &params())).is_some());
    let model = model(&policies, &off);
    assert_eq!(denial(&model), None);
    for name in ["closed", "invalid"] {
        let report = report(&model, name);
        assert_eq!(report.state, PolicyState::NotEnforcedHere, "{name}");
        assert!(report.messages.iter().any(|m| m.code == "not_enforced"));
        assert!(report.selects.is_empty());
    }
}

#[test]
fn report_has_the_state_of_the_policy() {
    let policies = [
        named("fine", "{podSelector: {matchLabels: {pod: a}}}"),
        named("invalid", "{ingress: [{from: [{ipBlock: {cidr: x}}]}]}"),
        named("outgoing", "{policyTypes: [Egress]}"),
        named("both", "{ingress: [{}], egress: [{}]}"),
    ];
    // Reports list meshed workloads only.
    let meshed: Vec<Doc> = cluster()
        .into_iter()
        .map(|doc| match doc.0["kind"] == "Pod" {
            true => doc.ambient(),
            false => doc,
        })
        .collect();
    let model = compile(&objects(&[&meshed[..], &policies].concat()), &params()).0;
    let table = [
        ("fine", PolicyState::Accepted, vec![], 1),
        (
            "invalid",
            PolicyState::Invalid,
            vec!["bad_cidr@spec.ingress[0].from[0].ipBlock.cidr"],
            3,
        ),
        (
            "outgoing",
            PolicyState::NotEnforcedHere,
            vec!["egress_not_enforced@spec.egress"],
            0,
        ),
        (
            "both",
            PolicyState::Accepted,
            vec!["egress_not_enforced@spec.egress"],
            3,
        ),
    ];
    for (name, state, messages, selects) in table {
        let report = report(&model, name);
        assert_eq!(report.state, state, "{name}");
        let found = report.messages.iter();
        let found: Vec<String> = found.map(|m| format!("{}@{}", m.code, m.field)).collect();
        assert_eq!(found, messages, "{name}");
        assert_eq!(report.selects.len(), selects, "{name}");
    }
}

#[test]
fn error_is_a_diagnostic_with_object_and_field() {
    let fixture = Fixture::with_errors(&["spec: {ingress: [{ports: [{port: 0}]}]}"]);
    let diagnostic = fixture.diagnostics.first().expect("a diagnostic");
    assert_eq!(
        diagnostic.to_string(),
        "test.yaml#12: NetworkPolicy x/policy-0: spec.ingress[0].ports[0].port: bad_port: 0 is not \
         a port (1 to 65535)"
    );
}
