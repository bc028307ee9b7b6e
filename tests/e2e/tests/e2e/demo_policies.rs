//! The policies that the README puts on the demo's cluster do what it says.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Options, Output};

/// The log is written beside the traffic.
const LOGGED: Duration = Duration::from_secs(5);

/// In the access log of the server's node.
const DENIAL: &str = "policy=\"PeerAuthentication istio-system/default\"";

/// curl in a pod. Verbose, because the reset may come while it waits for an answer or while it still
/// connects: its exit code differs, but either way it says that the peer reset the connection.
fn ask(lab: &Lab, pod: &str) -> Result<Output> {
    let curl = ["curl", "-sv", "-4", "--max-time", "5", "http://web.shop"];
    lab.exec(pod, &curl)
}

/// `lab apply`, as the README has it: when it returns, the policies hold.
fn apply(lab: &Lab, manifests: &Path) -> Result<()> {
    let built = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release");
    let folder = std::env::var_os("AMBIT_BIN_DIR").unwrap_or_else(|| built.into());
    let mut command = Command::new(Path::new(&folder).join("lab"));
    command.args(["--name", lab.name(), "apply"]).arg(manifests);
    let output = command.output().context("the lab command")?;
    ensure!(output.status.success(), "lab apply: {output:?}");
    Ok(())
}

#[test]
fn only_the_client_reaches_the_server() -> Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let lab = Lab::up(deploy.join("demo").as_path(), Options::default())?;
    for pod in ["shop/client", "default/outside"] {
        let asked = ask(&lab, pod)?;
        ensure!(asked.success(), "{pod} before: {asked:?}");
    }
    apply(&lab, &deploy.join("policies"))?;
    let client = ask(&lab, "shop/client")?;
    let answered = client.success() && client.stdout.starts_with("web answers");
    ensure!(answered, "the client: {client:?}");
    let outside = ask(&lab, "default/outside")?;
    let reset = outside.stderr.to_lowercase().contains("reset by peer");
    ensure!(reset && outside.stdout.is_empty(), "outside: {outside:?}");
    lab.wait_until("the denial names its policy", LOGGED, || {
        let log = lab.daemon_log("b").ok()?;
        log.contains(DENIAL).then_some(())
    })
}
