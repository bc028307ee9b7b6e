//! What the lab does with daemons, shown with one that is a script.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lab::{Clock, IdentitySource, Lab, LaunchOptions, Location, Options, ProgramState};
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);

/// For what comes at once, but on a busy machine.
const SOON: Duration = Duration::from_secs(15);

const MANIFESTS: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: meshed, namespace: shop}, spec: {containers: [{name: c, command: [sleep, infinity]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: plain}, spec: {containers: [{name: c, command: [sleep, infinity]}]}}
";

/// Answers on the ports of a daemon: ready at once, and with the pods it finds enrolled, once a
/// file says that it may.
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

/// A folder of binaries with the real lab and this daemon.
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
fn an_opted_in_pod_starts_only_when_its_daemon_has_enrolled_it() {
    let bin = bin_dir(SCRIPT);
    let lab = Lab::up(MANIFESTS, options(&bin)).unwrap();
    let waits = |status: &lab::Status| {
        let pod = status.pod("meshed").unwrap();
        status.pod("plain").unwrap().ready
            && status.nodes[0].daemon == ProgramState::Ready
            && pod.message.contains("has not enrolled the pod (pending)")
    };
    lab.wait_status("the meshed pod to wait", SOON, waits)
        .unwrap();
    assert_eq!(processes(&lab, "meshed"), 0);
    std::fs::write(bin.path().join("enrol"), "").unwrap();
    let ready = |status: &lab::Status| status.pod("meshed").unwrap().ready;
    let status = lab
        .wait_status("the meshed pod to start", SOON, ready)
        .unwrap();
    assert_eq!(status.pod("meshed").unwrap().message, "");
}

#[test]
fn a_pod_that_opts_out_while_it_waits_starts() {
    let bin = bin_dir(SCRIPT);
    let lab = Lab::up(MANIFESTS, options(&bin)).unwrap();
    let waits = |status: &lab::Status| !status.pod("meshed").unwrap().message.is_empty();
    lab.wait_status("the meshed pod to wait", SOON, waits)
        .unwrap();
    lab.label("Namespace", "shop", &[("istio.io/dataplane-mode", None)])
        .unwrap();
    let ready = |status: &lab::Status| status.pod("meshed").unwrap().ready;
    lab.wait_status("the pod to start", SOON, ready).unwrap();
}

#[test]
fn a_daemon_is_told_where_everything_is() {
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
    let log = lab.wait_until("the daemon's log", SOON, log).unwrap();
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
    let netns = lab.wait_until("the pod's file", SOON, || {
        std::fs::read_to_string(lab.netns_folder().join(&uid)).ok()
    });
    assert!(Path::new(&netns.unwrap()).exists());
}

#[test]
fn a_daemon_is_killed_stopped_and_started_again() {
    let bin = bin_dir(SCRIPT);
    let lab = Lab::up(MANIFESTS, options(&bin)).unwrap();
    lab.start_daemon("a").unwrap();
    let ended = |lab: &Lab| match lab.status().unwrap().nodes[0].daemon.clone() {
        ProgramState::Exited(how) => how,
        other => panic!("{other:?}"),
    };
    lab.stop_daemon("a").unwrap();
    assert!(ended(&lab).contains("exit status: 0"));
    assert!(lab.daemon_log("a").unwrap().contains("drained"));
    lab.start_daemon("a").unwrap();
    lab.kill_daemon("a").unwrap();
    assert!(ended(&lab).contains("signal: 9"));
    lab.kill_daemon("a").unwrap();
}

/// Its first line is what it was started with, its second what it takes for the time.
fn said_at_start(lab: &Lab) -> (String, i64) {
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
fn a_daemon_can_be_started_again_with_other_arguments_and_another_clock() {
    let bin = bin_dir(SCRIPT);
    let mut options = options(&bin);
    let launch = LaunchOptions::args(&["--first"]).clock(Clock::Behind(300 * SECOND));
    options.node_launch.insert("a".to_owned(), launch);
    let lab = Lab::up(MANIFESTS, options).unwrap();
    lab.start_daemon("a").unwrap();
    let (arguments, time) = said_at_start(&lab);
    assert!(arguments.contains("--first"), "{arguments}");
    assert!((now() - 300 - time).abs() < 30, "{time}");
    let launch = LaunchOptions::args(&["--second"]).clock(Clock::Ahead(300 * SECOND));
    lab.restart_daemon_with("a", launch).unwrap();
    let (arguments, time) = said_at_start(&lab);
    assert!(arguments.contains("--second") && !arguments.contains("--first"));
    assert!((now() + 300 - time).abs() < 30, "{time}");
}

/// Signs tokens with a word, and listens on the address that it is told.
const AUTHORITY: &str = r#"#!/bin/sh
echo "$*" >&2
[ "$1" = ca ] || { echo signed; exit 0; }
while [ $# -gt 0 ]; do
  case $1 in --listen) listen=$2 ;; --dir) echo root > "$2/root-cert.pem" ;; esac
  shift
done
exec socat "TCP-LISTEN:${listen##*:},bind=${listen%:*},fork,reuseaddr" EXEC:date
"#;

#[test]
fn a_certificate_authority_is_there_before_the_daemons_and_can_be_ended_and_started() {
    let bin = bin_dir(SCRIPT);
    let path = bin.path().join("ambit");
    std::fs::write(&path, AUTHORITY).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let options = Options {
        identity: IdentitySource::Ca,
        ca_launch: LaunchOptions::args(&["--more"]),
        ..options(&bin)
    };
    let lab = Lab::up(MANIFESTS, options).unwrap();
    lab.start_daemon("a").unwrap();
    let address = lab.ca_address().unwrap().to_string();
    let (arguments, _) = said_at_start(&lab);
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
    let ask = |place: &Location| {
        let command = ["socat", "-u", &format!("TCP:{address}"), "-"];
        lab.exec_in(place, &command, SOON).unwrap()
    };
    assert!(ask(&Location::node("a")).success());
    lab.kill_ca().unwrap();
    assert!(!ask(&Location::node("a")).success());
    lab.start_ca().unwrap();
    lab.restart_ca_with(LaunchOptions::args(&["--other"]))
        .unwrap();
    assert!(ask(&Location::node("a")).success());
    let log = lab.ca_log().unwrap();
    assert!(log.lines().last().unwrap().contains("--other"), "{log}");
}

#[test]
fn waiting_for_a_daemon_that_has_died_ends_at_once_with_its_last_words() {
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
fn a_missing_binary_is_named_with_the_way_to_build_it() {
    let bin = bin_dir("");
    std::fs::remove_file(bin.path().join("ztunnel")).unwrap();
    let error = format!("{:#}", Lab::up(MANIFESTS, options(&bin)).unwrap_err());
    assert!(error.contains("cargo build -p ztunnel"), "{error}");
}

#[test]
fn the_demo_shows_what_it_promises() {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo");
    let output = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["demo", "--name", "demo-test", "--manifests"])
        .arg(manifests)
        .output()
        .unwrap();
    let (said, wrong) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{said}\n{wrong}");
    let identities =
        "spiffe://cluster.local/ns/shop/sa/client -> spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(said.matches(identities).count(), 2, "{said}");
    assert!(said.contains("  0 bytes of"), "{said}");
    assert!(!PathBuf::from("/run/ambit-lab/demo-test").exists());
}
