//! Nothing is left behind, whoever dies.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lab::{Lab, Location, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For what comes at once, but on a busy machine.
const SOON: Duration = Duration::from_secs(15);

const MANIFESTS: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, command: [sleep, infinity]}]}}
";

/// Every lab that starts sweeps what dead ones left, so a test that looks at what a dead one left must
/// be alone until it has looked.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed has nothing to say about the next one.
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(name: &str) -> Options {
    let bin_dir = Path::new(env!("CARGO_BIN_EXE_lab"))
        .parent()
        .map(Into::into);
    Options {
        bin_dir,
        name: Some(name.to_owned()),
        ..Options::without_daemons()
    }
}

/// What a lab of this name has on the machine.
fn traces(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (dir, prefix) in [
        ("/run/netns", format!("ambit-{name}-")),
        ("/etc/netns", format!("ambit-{name}-")),
        ("/run/ambit-lab", name.to_owned()),
    ] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let named =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        found.extend(named.map(|entry| entry.path()));
    }
    found
}

/// Whether a process runs; one that has ended and waits to be reaped does not.
fn alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn pid_in_pod(lab: &Lab) -> String {
    let netns = lab.netns(&Location::pod("p")).unwrap();
    let first = || {
        let pids = Command::new("ip")
            .args(["netns", "pids", &netns])
            .output()
            .ok()?;
        String::from_utf8(pids.stdout)
            .ok()?
            .lines()
            .next()
            .map(str::to_owned)
    };
    lab.wait_until("the pod's process", SOON, first).unwrap()
}

#[test]
fn dropping_a_lab_leaves_nothing() {
    let _alone = alone();
    let lab = Lab::up(MANIFESTS, options("drop")).unwrap();
    let pid = pid_in_pod(&lab);
    assert!(alive(&pid));
    drop(lab);
    assert_eq!(traces("drop"), Vec::<PathBuf>::new());
    assert!(!alive(&pid));
}

#[test]
fn a_panicking_test_leaves_nothing() {
    let _alone = alone();
    let panicked = std::thread::spawn(|| {
        let _lab = Lab::up(MANIFESTS, options("panic")).unwrap();
        assert!(traces("panic").is_empty(), "this is the panic");
    });
    assert!(panicked.join().is_err());
    assert_eq!(traces("panic"), Vec::<PathBuf>::new());
}

#[test]
fn what_a_killed_agent_leaves_is_swept_by_the_next_lab() {
    let _alone = alone();
    let lab = Lab::up(MANIFESTS, options("orphan")).unwrap();
    let pid = pid_in_pod(&lab);
    let agent = std::fs::read_to_string("/run/ambit-lab/orphan/lock").unwrap();
    kill(
        Pid::from_raw(agent.trim().parse().unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    lab.wait_until("the agent's end", SOON, || (!alive(&agent)).then_some(()))
        .unwrap();
    assert!(!traces("orphan").is_empty() && alive(&pid));
    // Of another name.
    let next = Lab::up(MANIFESTS, options("next")).unwrap();
    assert_eq!(traces("orphan"), Vec::<PathBuf>::new());
    assert!(!alive(&pid));
    next.down().unwrap();
}

#[test]
fn a_lab_does_not_outlive_the_process_that_owns_it() {
    let _alone = alone();
    // The test's own process must live on, so another one brings a lab up and is killed.
    let bin = Path::new(env!("CARGO_BIN_EXE_lab"));
    let manifests = tempfile::tempdir().unwrap();
    // A pod that is never ready keeps `up` waiting.
    let probe = "readinessProbe: {exec: {command: ['false']}}";
    let text = MANIFESTS.replace(
        "command: [sleep, infinity]",
        &format!("command: [sleep, infinity], {probe}"),
    );
    std::fs::write(manifests.path().join("m.yaml"), text).unwrap();
    let mut owner = Command::new(bin)
        .args(["up", "--no-daemon", "--name", "owned"])
        .arg(manifests.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let watcher = Lab::up(MANIFESTS, options("watcher")).unwrap();
    let running = || {
        Lab::attach("owned")
            .ok()?
            .status()
            .ok()?
            .pods
            .first()
            .map(|_| ())
    };
    watcher.wait_until("the owned lab", SOON, running).unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    let gone = || traces("owned").is_empty().then_some(());
    watcher
        .wait_until("the owned lab to go", SOON, gone)
        .unwrap();
}

#[test]
fn two_labs_with_the_same_addresses_do_not_meet() {
    let _alone = alone();
    let server = |text: &str| {
        MANIFESTS.replace(
            "[sleep, infinity]",
            &format!("[socat, 'TCP-LISTEN:80,fork,reuseaddr', 'SYSTEM:echo {text}'], readinessProbe: {{tcpSocket: {{port: 80}}}}"),
        )
    };
    let one = Lab::up(server("one"), options("side-1")).unwrap();
    let two = Lab::up(server("two"), options("side-2")).unwrap();
    assert_eq!(
        one.status().unwrap().pods[0].ips,
        two.status().unwrap().pods[0].ips
    );
    for (lab, said) in [(&one, "one\n"), (&two, "two\n")] {
        let cmd = ["socat", "-", "TCP:10.244.1.2:80"];
        let answer = lab.exec_in(&Location::node("a"), &cmd, SOON).unwrap();
        assert_eq!(answer.ok().unwrap(), said);
    }
    drop(one);
    assert!(two.exec("p", &["true"]).unwrap().success());
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let _alone = alone();
    let _lab = Lab::up(MANIFESTS, options("taken")).unwrap();
    let error = Lab::up(MANIFESTS, options("taken"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("lab taken is up already"), "{error}");
}
