//! Daemons and the certificate authority, tested with scripts in their place.

#![expect(clippy::unwrap_used, reason = "test helpers")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lab::{Clock, IdentitySource, Lab, LaunchOptions, Location, Options, ProgramState};
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);

/// For events that take milliseconds on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(15);

const MANIFESTS: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: meshed, namespace: shop}, spec: {containers: [{name: c, command: [sleep, infinity]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: plain}, spec: {containers: [{name: c, command: [sleep, infinity]}]}}
";

/// A daemon that is ready at once, and reports every pod as enrolled once the file `enrol` exists.
const SCRIPT: &str = r#"#!/bin/sh
echo "started with $*"
date +%s
here=$(dirname "$0")
while [ $# -gt 0 ]; do
  case $1 in --netns-dir) netns=$2 ;; esac
  shift
done
export here netns
cat > "$here/dump" <<'END'
#!/bin/sh
state=pending
[ -e "$here/enrol" ] && state=enrolled
sep= ; pods=
for file in "$netns"/*; do
  pods="$pods$sep\"c//Pod/n/p/$(basename "$file")\": {\"state\": \"$state\"}"
  sep=,
done
printf 'HTTP/1.0 200 OK\r\n\r\n{"workloadState": {%s}}' "$pods"
END
printf '#!/bin/sh\nprintf "HTTP/1.0 200 OK\\r\\n\\r\\n"\n' > "$here/ready"
chmod +x "$here/dump" "$here/ready"
socat TCP-LISTEN:15000,bind=127.0.0.1,fork,reuseaddr EXEC:"$here/dump" &
trap 'echo drained; kill $!; exit 0' TERM
socat TCP-LISTEN:15021,fork,reuseaddr EXEC:"$here/ready" &
wait; wait; wait
"#;

/// A folder of binaries with the lab and this daemon.
fn bin_dir(daemon: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_lab"), dir.path().join("lab")).unwrap();
    let path = dir.path().join("ztunnel");
    std::fs::write(&path, daemon).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn options(bin: &TempDir) -> Options {
    Options {
        bin_dir: Some(bin.path().to_owned()),
        wait_until_ready: false,
        ..Options::default()
    }
}

fn processes(lab: &Lab, pod: &str) -> usize {
    let netns = lab.netns(&Location::pod(pod)).unwrap();
    let pids = Command::new("ip")
        .args(["netns", "pids", &netns])
        .output()
        .unwrap();
    String::from_utf8(pids.stdout).unwrap().lines().count()
}

#[test]
fn opted_in_pod_starts_only_after_enrolment() {
    let bin = bin_dir(SCRIPT);
    let lab = Lab::up(MANIFESTS, options(&bin)).unwrap();
    let is_waiting = |status: &lab::Status| {
        let pod = status.pod("meshed").unwrap();
        status.pod("plain").unwrap().ready
            && status.nodes[0].daemon == ProgramState::Ready
            && pod.message.contains("has not enrolled the pod (pending)")
    };
    lab.wait_status("the meshed pod to wait", TIMEOUT, is_waiting)
        .unwrap();
    assert_eq!(processes(&lab, "meshed"), 0);
    std::fs::write(bin.path().join("enrol"), "").unwrap();
    let is_ready = |status: &lab::Status| status.pod("meshed").unwrap().ready;
    let status = lab
        .wait_status("the meshed pod to start", TIMEOUT, is_ready)
        .unwrap();
    assert_eq!(status.pod("meshed").unwrap().message, "");
}

#[test]
fn pod_that_opts_out_while_waiting_starts() {
    let bin = bin_dir(SCRIPT);
    let lab = Lab::up(MANIFESTS, options(&bin)).unwrap();
    let is_waiting = |status: &lab::Status| !status.pod("meshed").unwrap().message.is_empty();
    lab.wait_status("the meshed pod to wait", TIMEOUT, is_waiting)
        .unwrap();
    lab.label("Namespace", "shop", &[("istio.io/dataplane-mode", None)])
        .unwrap();
    let is_ready = |status: &lab::Status| status.pod("meshed").unwrap().ready;
    lab.wait_status("the pod to start", TIMEOUT, is_ready)
        .unwrap();
}

#[test]
fn daemon_gets_its_folders_as_arguments() {
    let bin = bin_dir(SCRIPT);
    let options = Options {
        daemon_args: vec!["--more".to_owned()],
        ..options(&bin)
    };
    let lab = Lab::up(MANIFESTS, options).unwrap();
    let log = || {
        lab.daemon_log("a")
            .ok()
            .filter(|log| log.contains("started with"))
    };
    let log = lab.wait_until("the daemon's log", TIMEOUT, log).unwrap();
    for (flag, folder) in [
        ("--source-folder", lab.source_folder()),
        ("--ca-dir", lab.ca_folder()),
        ("--netns-dir", lab.netns_folder()),
    ] {
        assert!(
            log.contains(&format!("{flag} {}", folder.display())),
            "{flag} in {log}"
        );
    }
    assert!(
        log.contains("--node-name a") && log.contains("--more"),
        "{log}"
    );
    assert!(lab.ca_folder().join("root-cert.pem").exists());
    let uid = lab.status().unwrap().pod("meshed").unwrap().uid.clone();
    let netns = lab.wait_until("the pod's file", TIMEOUT, || {
        std::fs::read_to_string(lab.netns_folder().join(&uid)).ok()
    });
    assert!(Path::new(&netns.unwrap()).exists());
}

#[test]
fn daemon_can_be_killed_stopped_and_restarted() {
    let bin = bin_dir(SCRIPT);
    let lab = Lab::up(MANIFESTS, options(&bin)).unwrap();
    lab.start_daemon("a").unwrap();
    let exit = |lab: &Lab| match lab.status().unwrap().nodes[0].daemon.clone() {
        ProgramState::Exited(how) => how,
        other => panic!("{other:?}"),
    };
    lab.stop_daemon("a").unwrap();
    assert!(exit(&lab).contains("exit status: 0"));
    assert!(lab.daemon_log("a").unwrap().contains("drained"));
    lab.start_daemon("a").unwrap();
    lab.kill_daemon("a").unwrap();
    assert!(exit(&lab).contains("signal: 9"));
    lab.kill_daemon("a").unwrap();
}

/// The arguments and the wall clock of the daemon's last start, from its log.
fn last_start(lab: &Lab) -> (String, i64) {
    let log = lab.daemon_log("a").unwrap();
    let start = log.rfind("started with").unwrap();
    let mut lines = log[start..].lines();
    let arguments = lines.next().unwrap().to_owned();
    (arguments, lines.next().unwrap().parse().unwrap())
}

fn now() -> i64 {
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs().try_into().unwrap()
}

#[test]
fn daemon_restarts_with_new_arguments_and_clock() {
    let bin = bin_dir(SCRIPT);
    let mut options = options(&bin);
    let launch = LaunchOptions::args(&["--first"]).clock(Clock::Behind(300 * SECOND));
    options.node_launch.insert("a".to_owned(), launch);
    let lab = Lab::up(MANIFESTS, options).unwrap();
    lab.start_daemon("a").unwrap();
    let (arguments, time) = last_start(&lab);
    assert!(arguments.contains("--first"), "{arguments}");
    assert!((now() - 300 - time).abs() < 30, "{time}");
    let launch = LaunchOptions::args(&["--second"]).clock(Clock::Ahead(300 * SECOND));
    lab.restart_daemon_with("a", launch).unwrap();
    let (arguments, time) = last_start(&lab);
    assert!(arguments.contains("--second") && !arguments.contains("--first"));
    assert!((now() + 300 - time).abs() < 30, "{time}");
}

/// A certificate authority that signs tokens as `signed`, and listens on its `--listen` address.
const CA_SCRIPT: &str = r#"#!/bin/sh
echo "$*" >&2
[ "$1" = ca ] || { echo signed; exit 0; }
while [ $# -gt 0 ]; do
  case $1 in --listen) listen=$2 ;; --dir) echo root > "$2/root-cert.pem" ;; esac
  shift
done
exec socat "TCP-LISTEN:${listen##*:},bind=${listen%:*},fork,reuseaddr" EXEC:date
"#;

#[test]
fn certificate_authority_starts_before_daemons_and_can_be_restarted() {
    let bin = bin_dir(SCRIPT);
    let path = bin.path().join("ambit");
    std::fs::write(&path, CA_SCRIPT).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let options = Options {
        identity: IdentitySource::Ca,
        ca_launch: LaunchOptions::args(&["--more"]),
        ..options(&bin)
    };
    let lab = Lab::up(MANIFESTS, options).unwrap();
    lab.start_daemon("a").unwrap();
    let address = lab.ca_address().unwrap().to_string();
    let (arguments, _) = last_start(&lab);
    for (flag, value) in [
        ("--ca-address", address.clone()),
        (
            "--ca-root-cert",
            format!("{}/state/root-bundle.pem", lab.ca_folder().display()),
        ),
        ("--ca-token", lab.token_file("a").display().to_string()),
    ] {
        assert!(
            arguments.contains(&format!("{flag} {value}")),
            "{arguments}"
        );
    }
    assert_eq!(
        std::fs::read_to_string(lab.token_file("a")).unwrap(),
        "signed"
    );
    assert!(lab.ca_log().unwrap().contains("--more"));
    let connect = |location: &Location| {
        let command = ["socat", "-u", &format!("TCP:{address}"), "-"];
        lab.exec_in(location, &command, TIMEOUT).unwrap()
    };
    assert!(connect(&Location::node("a")).success());
    lab.kill_ca().unwrap();
    assert!(!connect(&Location::node("a")).success());
    lab.start_ca().unwrap();
    lab.restart_ca_with(LaunchOptions::args(&["--other"]))
        .unwrap();
    assert!(connect(&Location::node("a")).success());
    let log = lab.ca_log().unwrap();
    assert!(log.lines().last().unwrap().contains("--other"), "{log}");
}

#[test]
fn waiting_for_an_exited_daemon_fails_with_its_last_log_line() {
    let bin = bin_dir("#!/bin/sh\necho no such flag >&2\nexit 64\n");
    let options = Options {
        wait_until_ready: true,
        ..options(&bin)
    };
    let error = format!("{:#}", Lab::up(MANIFESTS, options).unwrap_err());
    assert!(
        error.contains("exit status: 64") && error.contains("no such flag"),
        "{error}"
    );
}

#[test]
fn missing_binary_error_has_the_build_command() {
    let bin = bin_dir("");
    std::fs::remove_file(bin.path().join("ztunnel")).unwrap();
    let error = format!("{:#}", Lab::up(MANIFESTS, options(&bin)).unwrap_err());
    assert!(error.contains("cargo build -p ztunnel"), "{error}");
}

#[test]
fn demo_succeeds_and_removes_its_lab() {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo");
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["demo", "--name", "demo-test", "--manifests"])
        .arg(manifests)
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{stdout}\n{stderr}");
    let identities =
        "spiffe://cluster.local/ns/shop/sa/client -> spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(stdout.matches(identities).count(), 2, "{stdout}");
    assert!(stdout.contains("  0 bytes of"), "{stdout}");
    assert!(!PathBuf::from("/run/ambit-lab/demo-test").exists());
}
