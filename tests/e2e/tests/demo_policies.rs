//! The policies that the README puts on the demo's cluster do what it says.

use std::path::Path;
use std::time::Duration;

use ambit_e2e::settle::caught_up;
use anyhow::{Result, ensure};
use lab::{Lab, Options};

/// curl's code for a connection that was reset while it waited for an answer.
const RESET: i32 = 56;

/// The log is written beside the traffic.
const LOGGED: Duration = Duration::from_secs(5);

/// In the access log of the server's node.
const DENIAL: &str = "policy=\"PeerAuthentication istio-system/default\"";

/// What curl got from a pod, and its exit code.
fn ask(lab: &Lab, pod: &str) -> Result<(String, i32)> {
    let curl = ["curl", "-s", "-4", "--max-time", "5", "http://web.shop"];
    let output = lab.exec(pod, &curl)?;
    Ok((output.stdout, output.code))
}

#[test]
fn only_the_client_reaches_the_server() -> Result<()> {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy");
    let lab = Lab::up(deploy.join("demo").as_path(), Options::default())?;
    for pod in ["shop/client", "default/outside"] {
        let (answer, code) = ask(&lab, pod)?;
        ensure!(code == 0, "{pod} before: {code} {answer}");
    }
    lab.apply(deploy.join("policies").as_path())?;
    caught_up(&lab)?;
    let (answer, code) = ask(&lab, "shop/client")?;
    ensure!(
        code == 0 && answer.starts_with("web answers"),
        "{code} {answer}"
    );
    let (answer, code) = ask(&lab, "default/outside")?;
    ensure!(code == RESET && answer.is_empty(), "{code} {answer}");
    lab.wait_until("the denial names its policy", LOGGED, || {
        let log = lab.daemon_log("b").ok()?;
        log.contains(DENIAL).then_some(())
    })
}
