//! The demo policies of the README have the effect that it describes.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Options, Output};

/// Limit for the log line of a denial. The log is written asynchronously.
const LOG_DEADLINE: Duration = Duration::from_secs(5);

/// The policy of the denial in the access log of the server's node.
const DENIAL_POLICY: &str = "policy=\"PeerAuthentication istio-system/default\"";

/// Sends a request to the demo server from a pod. curl runs with -v, because the reset may arrive
/// while it connects or while it waits for the response: the exit codes differ, the -v text does not.
fn request(lab: &Lab, pod: &str) -> Result<Output> {
    let curl = ["curl", "-sv", "-4", "--max-time", "5", "http://web.shop"];
    lab.exec(pod, &curl)
}

/// Runs `lab apply` as in the README. The policies are enforced when it returns.
fn apply(lab: &Lab, manifests: &Path) -> Result<()> {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release");
    let folder = std::env::var_os("AMBIT_BIN_DIR").unwrap_or_else(|| built.into());
    let mut command = Command::new(Path::new(&folder).join("lab"));
    command.args(["--name", lab.name(), "apply"]).arg(manifests);
    let output = command.output().context("run the lab command")?;
    ensure!(output.status.success(), "lab apply: {output:?}");
    Ok(())
}

#[test]
fn demo_policies_admit_only_the_client() -> Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let lab = Lab::up(deploy.join("demo").as_path(), Options::default())?;
    for pod in ["shop/client", "default/outside"] {
        let response = request(&lab, pod)?;
        ensure!(response.success(), "{pod} without policies: {response:?}");
    }
    apply(&lab, &deploy.join("policies"))?;
    let client = request(&lab, "shop/client")?;
    let is_served = client.success() && client.stdout.starts_with("web answers");
    ensure!(is_served, "the client: {client:?}");
    let outside = request(&lab, "default/outside")?;
    let is_reset = outside.stderr.to_lowercase().contains("reset by peer");
    ensure!(
        is_reset && outside.stdout.is_empty(),
        "outside: {outside:?}"
    );
    lab.wait_until(
        "the denial with its policy in the access log",
        LOG_DEADLINE,
        || {
            let log = lab.daemon_log("b").ok()?;
            log.contains(DENIAL_POLICY).then_some(())
        },
    )
}
