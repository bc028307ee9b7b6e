//! Capture while the certificate authority is down: a pod that joins, and a pod whose daemon starts, is
//! captured all the same. It sends no plaintext and STRICT holds. Connections that need a certificate
//! fail with a reason, and succeed once the authority is back.

use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::capture::{MARKER, server};
use ambit_e2e::manifest::{self, Pod, namespace};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, url};
use anyhow::{Context, Result, ensure};
use lab::{Capture, IdentitySource, IpFamily, Lab, Location, Options};
use serde_json::Value;

const STRICT: &str = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
                      metadata: {namespace: shop, name: default}, spec: {mtls: {mode: STRICT}}}";

const AMBIENT: (&str, Option<&str>) = ("istio.io/dataplane-mode", Some("ambient"));

/// Limit for the capture of a pod, and for its certificate once the authority is back.
const DEADLINE: Duration = Duration::from_secs(10);

/// The joining pods, on node `a`.
const JOINING: [&str; 2] = ["shop/client", "shop/server"];

/// `client` and `server` on node `a` are not in the mesh yet; `web` on node `b` is.
fn up() -> Result<Lab> {
    let unmeshed = |name: &str| {
        Pod::new("shop", name)
            .on("a")
            .label("istio.io/dataplane-mode", "none")
            .runs(server(name))
            .into()
    };
    let manifests = [
        manifest::two_nodes(),
        namespace("shop", Some("ambient")),
        namespace("outside", None),
        unmeshed("client"),
        unmeshed("server"),
        Pod::new("shop", "web").on("b").runs(server("web")).into(),
        Pod::new("outside", "pod")
            .on("b")
            .runs(server("outside-pod"))
            .into(),
        STRICT.to_owned(),
    ];
    let options = Options {
        identity: IdentitySource::Ca,
        ..Options::default()
    };
    Lab::up(manifest::all(manifests), options)
}

fn request(lab: &Lab, from: &str, to: &str, marker: &str) -> Result<String> {
    let to = url(lab.pod_ip(to, IpFamily::V4)?, PORT);
    let header = format!("X-Marker: {marker}");
    Ok(curl(lab, &Location::pod(from), &to, &["-H", &header])?.body)
}

/// State and reason of a pod in the dump of node `a`'s daemon.
fn workload_state(lab: &Lab, pod: &str) -> Option<(String, String)> {
    let (dump, status) = (lab.config_dump("a").ok()?, lab.status().ok()?);
    let uid = status.pod(pod).ok()?.workload_uid("Kubernetes");
    let state = dump.get("workloadState")?.get(uid)?;
    let text = |key: &str| state.get(key).and_then(Value::as_str).unwrap_or_default();
    Some((text("state").to_owned(), text("reason").to_owned()))
}

fn is_captured(lab: &Lab, pod: &str) -> bool {
    let rules = lab.exec(pod, &["nft", "list", "table", "inet", "ambit"]);
    rules.is_ok_and(|rules| rules.stdout.contains("redirect to :15001"))
}

/// Both pods are captured without a certificate: they send no plaintext to the mesh, receive none, and
/// reach destinations outside the mesh.
fn check_without_certificate(lab: &Lab, bridge: &Capture) -> Result<()> {
    for pod in JOINING {
        lab.wait_until(&format!("{pod} to be captured"), DEADLINE, || {
            let (state, reason) = workload_state(lab, pod)?;
            let is_waiting = state == "pending" && reason.starts_with("cert_pending");
            (is_waiting && is_captured(lab, pod)).then_some(())
        })
        .with_context(|| format!("its state is {:?}", workload_state(lab, pod)))?;
    }
    ensure!(
        request(lab, "shop/client", "shop/web", MARKER).is_err(),
        "a request through the mesh succeeded without a certificate"
    );
    let pending = [
        ("direction", "outbound"),
        ("src.workload", "client"),
        ("dst.workload", "web"),
        ("reason", "cert_pending"),
    ];
    access_log::wait(lab, "a", &pending)?;
    ensure!(
        bridge.occurrences(MARKER)? == 0,
        "the client sent plaintext"
    );
    ensure!(
        request(lab, "outside/pod", "shop/server", "plaintext").is_err(),
        "STRICT admitted plaintext"
    );
    let denied = [
        ("direction", "inbound"),
        ("dst.workload", "server"),
        ("reason", "policy_denied"),
        ("policy", "PeerAuthentication shop/default"),
    ];
    access_log::wait(lab, "a", &denied)?;
    let outside = request(lab, "shop/client", "outside/pod", "egress")?;
    ensure!(outside.ends_with("outside-pod"), "{outside:?}");
    Ok(())
}

fn check_recovery(lab: &Lab, bridge: &Capture) -> Result<()> {
    for pod in JOINING {
        lab.wait_workload_state(pod, Some("enrolled"), DEADLINE)?;
    }
    let response = request(lab, "shop/client", "shop/web", MARKER)?;
    ensure!(response.ends_with("web"), "{response:?}");
    let response = request(lab, "shop/web", "shop/server", MARKER)?;
    ensure!(response.ends_with("server"), "{response:?}");
    ensure!(bridge.occurrences(MARKER)? == 0, "plaintext on the bridge");
    Ok(())
}

#[test]
fn pod_that_joins_without_ca_fails_closed_until_the_ca_is_back() -> Result<()> {
    let lab = up()?;
    let open = request(&lab, "outside/pod", "shop/server", "plaintext")?;
    ensure!(open.ends_with("server"), "{open:?}");
    lab.kill_ca()?;
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    for pod in JOINING {
        lab.label("Pod", pod, &[AMBIENT])?;
    }
    check_without_certificate(&lab, &bridge)?;
    let pending = [("state", "pending")];
    metrics::wait(&lab, "a", "ambit_enrolment_pods", &pending, 2.0)?;
    lab.start_ca()?;
    check_recovery(&lab, &bridge)
}

#[test]
fn daemon_that_starts_without_ca_is_ready_and_serves_egress() -> Result<()> {
    let lab = up()?;
    for pod in JOINING {
        lab.label("Pod", pod, &[AMBIENT])?;
        lab.wait_workload_state(pod, Some("enrolled"), DEADLINE)?;
    }
    lab.kill_ca()?;
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    lab.kill_daemon("a")?;
    lab.start_daemon("a")
        .context("the daemon is not ready without the authority")?;
    check_without_certificate(&lab, &bridge)?;
    lab.start_ca()?;
    check_recovery(&lab, &bridge)
}
