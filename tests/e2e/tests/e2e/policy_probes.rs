//! Every policy admits the kubelet's probes, and denies all other connections from nodes.

use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::input::SourceFile;
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::policy::connection::{Outcome, http_outcome};
use ambit_e2e::policy::telemetry::{Baseline, DENIALS_TOTAL, DENIED};
use ambit_e2e::programs::{PORT, nginx};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Location, Options};
use serde_json::json;

/// The port of the httpGet probe.
const HTTP: u16 = 8081;

/// The port of the tcpSocket probe.
const TCP: u16 = 8082;

/// Policies that each deny every connection without an identity: the name in a denial, the API version
/// and the rest of the manifest.
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
    let with_timing = |mut probe: serde_json::Value| {
        probe["periodSeconds"] = 1.into();
        // A denied probe fails at once; the timeout is for a busy machine.
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
        .container("readinessProbe", with_timing(ready))
        .container("livenessProbe", with_timing(live));
    let all = [
        manifest::two_nodes(),
        manifest::namespace("istio-system", None),
        manifest::namespace("in", Some("ambient")),
        pod.into(),
    ];
    Lab::up(manifest::all(all), Options::default())
}

#[test]
fn policies_admit_probes_and_deny_other_connections_from_nodes() -> Result<()> {
    let lab = lab()?;
    for (policy, api, rest) in POLICIES {
        let file = SourceFile::write(&lab, "p.yaml", format!("{{apiVersion: {api}, {rest}}}"))?;
        wait_synced(&lab)?;
        check_policy(&lab, policy).with_context(|| policy.to_owned())?;
        drop(file);
        wait_synced(&lab)?;
        let to = (lab.pod_ip("web", IpFamily::V4)?, PORT).into();
        let node = lab.node_ip("a", IpFamily::V4)?;
        let outcome = http_outcome(&lab, &Location::node("a"), to, node)?;
        ensure!(
            outcome == Outcome::Served,
            "{policy} is still enforced: {outcome:?}"
        );
    }
    Ok(())
}

fn check_policy(lab: &Lab, policy: &str) -> Result<()> {
    let baseline = Baseline::take(lab)?;
    wait_probes(lab)?;
    check_node_connections(lab, policy, &baseline)?;
    wait_probes(lab)
}

/// Waits for two more successful probes. The pod must be ready and must not have restarted.
fn wait_probes(lab: &Lab) -> Result<()> {
    let before = probe_count(lab)?;
    lab.wait_until("two more probes", Duration::from_secs(10), || {
        (probe_count(lab).ok()? >= before + 2).then_some(())
    })?;
    let status = lab.status()?;
    let pod = status.pod("web")?;
    ensure!(pod.ready && pod.restarts == 0, "{pod:?}");
    Ok(())
}

/// The number of readiness probes in nginx' log.
fn probe_count(lab: &Lab) -> Result<usize> {
    Ok(lab.pod_log("web")?.matches(" /ready ").count())
}

/// Only the pod's own node reaches the declared probe ports, and no node reaches another port.
fn check_node_connections(lab: &Lab, policy: &str, baseline: &Baseline) -> Result<()> {
    let mut denied = 0;
    for family in IpFamily::ALL {
        let pod = lab.pod_ip("web", family)?;
        for (node, port, expected) in [
            ("a", HTTP, Outcome::Served),
            ("a", TCP, Outcome::Served),
            ("a", PORT, Outcome::Reset),
            ("b", HTTP, Outcome::Reset),
            ("b", TCP, Outcome::Reset),
            ("b", PORT, Outcome::Reset),
        ] {
            let client = lab.node_ip(node, family)?;
            let outcome = http_outcome(lab, &Location::node(node), (pod, port).into(), client)?;
            ensure!(
                outcome == expected,
                "node {node} to port {port}, {family:?}: {outcome:?}"
            );
            denied += usize::from(expected == Outcome::Reset);
        }
    }
    let fields = [
        ("direction", "inbound"),
        ("reason", DENIED),
        ("policy", policy),
    ];
    access_log::wait(lab, "a", &fields)?;
    baseline.wait_counter(lab, DENIALS_TOTAL, &[("policy", policy)], denied)
}
