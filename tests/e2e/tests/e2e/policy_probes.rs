//! The kubelet's probes go on under every policy, and no other connection of the node's does.

use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::input::SourceFile;
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::policy::connection::{Outcome, http_outcome};
use ambit_e2e::policy::telemetry::{Baseline, DENIED};
use ambit_e2e::programs::{PORT, nginx};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Location, Options};
use serde_json::json;

/// The port of the httpGet probe.
const HTTP: u16 = 8081;

/// The port of the tcpSocket probe.
const TCP: u16 = 8082;

/// Each of these alone refuses all that has no identity.
const POLICIES: [(&str, &str, &str); 3] = [
    (
        "PeerAuthentication istio-system/default",
        "security.istio.io/v1",
        "kind: PeerAuthentication, metadata: {namespace: istio-system, name: default}, spec: {mtls: {mode: STRICT}}",
    ),
    (
        "AuthorizationPolicy: no ALLOW matched",
        "security.istio.io/v1",
        "kind: AuthorizationPolicy, metadata: {namespace: in, name: allow-nothing}, spec: {}",
    ),
    (
        "NetworkPolicy: no ingress rule matched (in/default-deny)",
        "networking.k8s.io/v1",
        "kind: NetworkPolicy, metadata: {namespace: in, name: default-deny}, \
         spec: {podSelector: {}, policyTypes: [Ingress]}",
    ),
];

/// A pod on node `a` with a probe of each kind, and a port without one.
fn lab() -> Result<Lab> {
    let every = |probe: serde_json::Value| {
        let mut probe = probe;
        probe["periodSeconds"] = 1.into();
        // Probes that are refused fail at once; a busy machine may be late with an answer.
        probe["timeoutSeconds"] = 5.into();
        probe["failureThreshold"] = 3.into();
        probe
    };
    let ready = json!({"httpGet": {"port": "health", "path": "/ready"}});
    let live = json!({"tcpSocket": {"port": TCP}});
    let pod = Pod::new("in", "web")
        .on("a")
        .runs(nginx(&[PORT, HTTP, TCP], "$remote_addr"))
        .port(None, PORT)
        .port(Some("health"), HTTP)
        .container("readinessProbe", every(ready))
        .container("livenessProbe", every(live));
    let all = [
        manifest::two_nodes(),
        manifest::namespace("istio-system", None),
        manifest::namespace("in", Some("ambient")),
        pod.into(),
    ];
    Lab::up(manifest::all(all), Options::default())
}

/// Requests for this path that nginx has answered.
fn answered(lab: &Lab, path: &str) -> Result<usize> {
    Ok(lab.pod_log("web")?.matches(path).count())
}

#[test]
fn probes_succeed_under_every_policy_and_other_ports_are_closed_to_the_node() -> Result<()> {
    let lab = lab()?;
    for (policy, api, rest) in POLICIES {
        let file = SourceFile::write(&lab, "p.yaml", format!("{{apiVersion: {api}, {rest}}}"))?;
        wait_synced(&lab)?;
        let baseline = Baseline::take(&lab)?;
        goes_on(&lab).with_context(|| policy.to_owned())?;
        refuses(&lab, policy, &baseline).with_context(|| policy.to_owned())?;
        goes_on(&lab).with_context(|| policy.to_owned())?;
        drop(file);
        wait_synced(&lab)?;
        let to = (lab.pod_ip("web", IpFamily::V4)?, PORT).into();
        let node = lab.node_ip("a", IpFamily::V4)?;
        let seen = http_outcome(&lab, &Location::node("a"), to, node)?;
        ensure!(
            seen == Outcome::Answered,
            "{policy} is still there: {seen:?}"
        );
    }
    Ok(())
}

/// Probes are made and answered from now on, and the pod is as ready as it was.
fn goes_on(lab: &Lab) -> Result<()> {
    let before = answered(lab, " /ready ")?;
    lab.wait_until("two more probes", Duration::from_secs(10), || {
        (answered(lab, " /ready ").ok()? >= before + 2).then_some(())
    })?;
    let status = lab.status()?;
    let pod = status.pod("web")?;
    ensure!(pod.ready && pod.restarts == 0, "{pod:?}");
    Ok(())
}

/// The pod's own node reaches the declared probe ports; another node does not, nor does either
/// reach another port.
fn refuses(lab: &Lab, policy: &str, baseline: &Baseline) -> Result<()> {
    let mut denied = 0;
    for family in IpFamily::ALL {
        let pod = lab.pod_ip("web", family)?;
        for (node, port, wanted) in [
            ("a", HTTP, Outcome::Answered),
            ("a", TCP, Outcome::Answered),
            ("a", PORT, Outcome::Reset),
            ("b", HTTP, Outcome::Reset),
            ("b", TCP, Outcome::Reset),
            ("b", PORT, Outcome::Reset),
        ] {
            let client = lab.node_ip(node, family)?;
            let seen = http_outcome(lab, &Location::node(node), (pod, port).into(), client)?;
            ensure!(
                seen == wanted,
                "node {node} to {port}, {family:?}: {seen:?}"
            );
            denied += usize::from(wanted == Outcome::Reset);
        }
    }
    let told = [
        ("direction", "inbound"),
        ("reason", DENIED),
        ("policy", policy),
    ];
    access_log::wait(lab, "a", &told)?;
    baseline.wait_counter(
        lab,
        "ambit_policy_denials_total",
        &[("policy", policy)],
        denied,
    )
}
