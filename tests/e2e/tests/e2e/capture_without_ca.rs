//! An authority that is down when a pod joins, or when its daemon starts again: the pod is captured all the same, so
//! that nothing leaves it in clear and STRICT holds; what needs a certificate fails and says so, and works as soon as
//! there is one.

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

/// To capture a pod that is there, or to hear of a certificate once the authority is back.
const SOON: Duration = Duration::from_secs(10);

/// The pods that join, on node `a`.
const JOINING: [&str; 2] = ["shop/client", "shop/server"];

/// `client` and `server` of node `a` have not joined; `web` on node `b` has.
fn up() -> Result<Lab> {
    let plain = |name: &str| {
        Pod::new("shop", name)
            .on("a")
            .label("istio.io/dataplane-mode", "none")
            .runs(server(name))
            .into()
    };
    let manifests = [
        manifest::two_nodes(),
        namespace("shop", Some("ambient")),
        namespace("wild", None),
        plain("client"),
        plain("server"),
        Pod::new("shop", "web").on("b").runs(server("web")).into(),
        Pod::new("wild", "stranger")
            .on("b")
            .runs(server("stranger"))
            .into(),
        STRICT.to_owned(),
    ];
    let options = Options {
        identity: IdentitySource::Ca,
        ..Options::default()
    };
    Lab::up(manifest::all(manifests), options)
}

fn ask(lab: &Lab, from: &str, to: &str, marker: &str) -> Result<String> {
    let to = url(lab.pod_ip(to, IpFamily::V4)?, PORT);
    let header = format!("X-Marker: {marker}");
    Ok(curl(lab, &Location::pod(from), &to, &["-H", &header])?.body)
}

/// What the daemon of node `a` says of a pod: its state and the reason.
fn state(lab: &Lab, pod: &str) -> Option<(String, String)> {
    let (dump, status) = (lab.config_dump("a").ok()?, lab.status().ok()?);
    let uid = status.pod(pod).ok()?.workload_uid("Kubernetes");
    let state = dump.get("workloadState")?.get(uid)?;
    let text = |key: &str| state.get(key).and_then(Value::as_str).unwrap_or_default();
    Some((text("state").to_owned(), text("reason").to_owned()))
}

fn captured(lab: &Lab, pod: &str) -> bool {
    let rules = lab.exec(pod, &["nft", "list", "table", "inet", "ambit"]);
    rules.is_ok_and(|rules| rules.stdout.contains("redirect to :15001"))
}

/// Both pods are captured and have no certificate: nothing of theirs is in clear on the bridge, what is in clear does
/// not reach them, and what needs no certificate works.
fn closed_but_for_what_needs_no_certificate(lab: &Lab, bridge: &Capture) -> Result<()> {
    for pod in JOINING {
        lab.wait_until(&format!("{pod} to be captured"), SOON, || {
            let (state, reason) = state(lab, pod)?;
            let waits = state == "pending" && reason.starts_with("cert_pending");
            (waits && captured(lab, pod)).then_some(())
        })
        .with_context(|| format!("it is {:?}", state(lab, pod)))?;
    }
    ensure!(
        ask(lab, "shop/client", "shop/web", MARKER).is_err(),
        "a connection through the mesh without a certificate"
    );
    let unproven = [
        ("direction", "outbound"),
        ("src.workload", "client"),
        ("dst.workload", "web"),
        ("reason", "cert_pending"),
    ];
    access_log::wait(lab, "a", &unproven)?;
    ensure!(
        bridge.occurrences(MARKER)? == 0,
        "the client has spoken in clear"
    );
    ensure!(
        ask(lab, "wild/stranger", "shop/server", "knock").is_err(),
        "STRICT does not hold"
    );
    let denied = [
        ("direction", "inbound"),
        ("dst.workload", "server"),
        ("reason", "policy_denied"),
        ("policy", "PeerAuthentication shop/default"),
    ];
    access_log::wait(lab, "a", &denied)?;
    let outside = ask(lab, "shop/client", "wild/stranger", "out")?;
    ensure!(outside.ends_with("stranger"), "{outside:?}");
    Ok(())
}

fn works_again(lab: &Lab, bridge: &Capture) -> Result<()> {
    for pod in JOINING {
        lab.wait_workload_state(pod, Some("enrolled"), SOON)?;
    }
    let answer = ask(lab, "shop/client", "shop/web", MARKER)?;
    ensure!(answer.ends_with("web"), "{answer:?}");
    let answer = ask(lab, "shop/web", "shop/server", MARKER)?;
    ensure!(answer.ends_with("server"), "{answer:?}");
    ensure!(
        bridge.occurrences(MARKER)? == 0,
        "something was seen in clear"
    );
    Ok(())
}

#[test]
fn a_pod_that_joins_while_the_authority_is_down_is_closed_at_once_and_works_when_it_is_back()
-> Result<()> {
    let lab = up()?;
    let open = ask(&lab, "wild/stranger", "shop/server", "knock")?;
    ensure!(open.ends_with("server"), "{open:?}");
    lab.kill_ca()?;
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    for pod in JOINING {
        lab.label("Pod", pod, &[AMBIENT])?;
    }
    closed_but_for_what_needs_no_certificate(&lab, &bridge)?;
    let waiting = [("state", "pending")];
    metrics::wait(&lab, "a", "ambit_enrolment_pods", &waiting, 2.0)?;
    lab.start_ca()?;
    works_again(&lab, &bridge)
}

#[test]
fn a_daemon_that_starts_while_the_authority_is_down_serves_what_needs_no_certificate() -> Result<()>
{
    let lab = up()?;
    for pod in JOINING {
        lab.label("Pod", pod, &[AMBIENT])?;
        lab.wait_workload_state(pod, Some("enrolled"), SOON)?;
    }
    lab.kill_ca()?;
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    lab.kill_daemon("a")?;
    lab.start_daemon("a")
        .context("a daemon without an authority is not ready")?;
    closed_but_for_what_needs_no_certificate(&lab, &bridge)?;
    lab.start_ca()?;
    works_again(&lab, &bridge)
}
