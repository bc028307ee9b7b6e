//! A lab is removed completely, however its processes end.

#![expect(clippy::unwrap_used, reason = "test helpers")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lab::{Lab, Location, Options};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For events that take milliseconds on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(15);

const MANIFESTS: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c, command: [sleep, infinity]}]}}
";

/// Serialises the tests of this file: every lab that starts removes dead labs, so a test that checks
/// what a dead lab left must not run beside another.
fn serialise() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    // A failed test does not affect the next one.
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
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

/// The files and namespaces of a lab of this name.
fn resources(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (dir, prefix) in [
        ("/run/netns", format!("ambit-{name}-")),
        ("/etc/netns", format!("ambit-{name}-")),
        ("/run/ambit-lab", name.to_owned()),
    ] {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let of_lab =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        found.extend(of_lab.map(|entry| entry.path()));
    }
    found
}

/// Whether a process runs. A zombie does not.
fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn pid_in_pod(lab: &Lab) -> String {
    let netns = lab.netns(&Location::pod("p")).unwrap();
    let first_pid = || {
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
    lab.wait_until("the pod's process", TIMEOUT, first_pid)
        .unwrap()
}

#[test]
fn dropped_lab_leaves_nothing() {
    let _serial = serialise();
    let lab = Lab::up(MANIFESTS, options("drop")).unwrap();
    let pid = pid_in_pod(&lab);
    assert!(is_running(&pid));
    drop(lab);
    assert_eq!(resources("drop"), Vec::<PathBuf>::new());
    assert!(!is_running(&pid));
}

#[test]
fn panicking_test_leaves_nothing() {
    let _serial = serialise();
    let panicked = std::thread::spawn(|| {
        let _lab = Lab::up(MANIFESTS, options("panic")).unwrap();
        assert!(resources("panic").is_empty(), "this is the panic");
    });
    assert!(panicked.join().is_err());
    assert_eq!(resources("panic"), Vec::<PathBuf>::new());
}

#[test]
fn next_lab_removes_what_a_killed_agent_left() {
    let _serial = serialise();
    let lab = Lab::up(MANIFESTS, options("orphan")).unwrap();
    let pid = pid_in_pod(&lab);
    let agent = std::fs::read_to_string("/run/ambit-lab/orphan/lock").unwrap();
    kill(
        Pid::from_raw(agent.trim().parse().unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    lab.wait_until("the agent's exit", TIMEOUT, || {
        (!is_running(&agent)).then_some(())
    })
    .unwrap();
    assert!(!resources("orphan").is_empty() && is_running(&pid));
    // A lab of another name.
    let next = Lab::up(MANIFESTS, options("next")).unwrap();
    assert_eq!(resources("orphan"), Vec::<PathBuf>::new());
    assert!(!is_running(&pid));
    next.down().unwrap();
}

#[test]
fn lab_is_removed_when_its_owner_is_killed() {
    let _serial = serialise();
    // The process that brings the lab up is killed, so it must not be the test's own.
    let bin = Path::new(env!("CARGO_BIN_EXE_lab"));
    let manifests = tempfile::tempdir().unwrap();
    // `up` waits for a pod that is never ready.
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
    let has_pod = || {
        Lab::attach("owned")
            .ok()?
            .status()
            .ok()?
            .pods
            .first()
            .map(|_| ())
    };
    watcher
        .wait_until("the owned lab", TIMEOUT, has_pod)
        .unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    let removed = || resources("owned").is_empty().then_some(());
    watcher
        .wait_until("the removal of the owned lab", TIMEOUT, removed)
        .unwrap();
}

#[test]
fn two_labs_with_the_same_addresses_are_isolated() {
    let _serial = serialise();
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
    for (lab, expected) in [(&one, "one\n"), (&two, "two\n")] {
        let cmd = ["socat", "-", "TCP:10.244.1.2:80"];
        let output = lab.exec_in(&Location::node("a"), &cmd, TIMEOUT).unwrap();
        assert_eq!(output.ok().unwrap(), expected);
    }
    drop(one);
    assert!(two.exec("p", &["true"]).unwrap().success());
}

#[test]
fn name_of_a_running_lab_is_refused() {
    let _serial = serialise();
    let _lab = Lab::up(MANIFESTS, options("taken")).unwrap();
    let error = Lab::up(MANIFESTS, options("taken"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("lab taken is up already"), "{error}");
}
