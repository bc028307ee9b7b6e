//! The daemon as a process: flags, readiness, termination.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::open_connections::OpenConnections;
use ambit_e2e::programs::{self, PORT, greeter, wait_for_close};
use lab::{IpFamily, Lab, Location, Options, ProgramState};

const DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn configuration_errors_are_all_reported_with_exit_code_64() {
    // EX_USAGE of sysexits.h.
    let output = Command::new(programs::ztunnel_binary().unwrap())
        .env_clear()
        .env("ZTUNNEL_WORKER_THREADS", "many")
        .env("LOG_FORMAT", "xml")
        .args([
            "--cert-ttl",
            "soon",
            "--admin-addr",
            "nowhere",
            "--trust-domain",
            "Not A Domain",
        ])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(64), "{stderr}");
    let invalid = [
        "--worker-threads",
        "--log-format",
        "--cert-ttl",
        "--admin-addr",
        "--trust-domain",
        // These are required and absent.
        "--node-name",
        "--source-folder",
    ];
    let unreported: Vec<&&str> = invalid
        .iter()
        .filter(|flag| !stderr.contains(**flag))
        .collect();
    assert!(unreported.is_empty(), "{unreported:?} not in:\n{stderr}");
}

#[test]
fn unknown_flag_is_reported_with_exit_code_64() {
    let output = Command::new(programs::ztunnel_binary().unwrap())
        .arg("--nonsense")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--nonsense"));
}

/// A client on node `a` and a greeter on node `b`, both in the mesh. The daemons have this termination
/// deadline.
fn lab_with_deadline(deadline: &str) -> Lab {
    let server = Pod::new("in", "server")
        .on("b")
        .runs(greeter(PORT, "hi"))
        .port(None, PORT);
    let client = Pod::new("in", "client").on("a").into();
    let namespace = manifest::namespace("in", Some("ambient"));
    let all = [manifest::two_nodes(), namespace, client, server.into()];
    let daemon_args = vec!["--termination-deadline".to_owned(), deadline.to_owned()];
    Lab::up(
        manifest::all(all),
        Options {
            daemon_args,
            ..Options::default()
        },
    )
    .unwrap()
}

/// Opens a connection from the client to the server.
fn open_connection(lab: &Lab) -> OpenConnections {
    let mut connection = OpenConnections::open(
        lab,
        "client",
        lab.pod_ip("server", IpFamily::V4).unwrap(),
        1,
    )
    .unwrap();
    connection.echo(lab, "one").unwrap();
    connection
}

#[test]
fn readiness_and_metrics_are_served_on_both_families_and_admin_only_on_loopback() {
    let lab = lab_with_deadline("5s");
    for family in IpFamily::ALL {
        let node = lab.node_ip("a", family).unwrap();
        let ready = lab
            .http_get(
                &Location::Fabric,
                SocketAddr::new(node, 15021),
                "/healthz/ready",
            )
            .unwrap();
        assert_eq!(ready.status, 200, "{}", ready.body);
        let metrics = lab
            .http_get(&Location::Fabric, SocketAddr::new(node, 15020), "/metrics")
            .unwrap();
        assert_eq!(metrics.status, 200);
        assert!(
            lab.http_get(
                &Location::Fabric,
                SocketAddr::new(node, 15000),
                "/config_dump"
            )
            .is_err()
        );
        // Pods on the node have another loopback and do not reach it either.
        let from_pod = lab.http_get(
            &Location::pod("client"),
            SocketAddr::new(node, 15000),
            "/config_dump",
        );
        assert!(from_pod.is_err(), "{from_pod:?}");
    }
}

/// Sends SIGTERM to a node's daemon and runs `while_draining` while it drains. Returns the daemon's
/// exit and the duration.
fn terminate(lab: &Lab, node: &str, while_draining: impl FnOnce()) -> (ProgramState, Duration) {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| lab.stop_daemon(node));
        // The daemon drains once readiness is no longer 200.
        let ip = lab.node_ip(node, IpFamily::V4).unwrap();
        lab.wait_until("the daemon to drain", DEADLINE, || {
            let ready = lab.http_get(
                &Location::Fabric,
                SocketAddr::new(ip, 15021),
                "/healthz/ready",
            );
            (!ready.is_ok_and(|response| response.status == 200)).then_some(())
        })
        .unwrap();
        while_draining();
        stop.join().unwrap().unwrap();
    });
    (
        lab.status().unwrap().node(node).unwrap().daemon.clone(),
        start.elapsed(),
    )
}

#[test]
fn sigterm_drains_connections_and_exits_with_0_once_they_are_closed() {
    let lab = lab_with_deadline("12s");
    let mut connection = open_connection(&lab);
    let (exit, duration) = terminate(&lab, "b", || {
        connection.echo(&lab, "two").unwrap();
        // A new connection is reset, neither served nor sent in plaintext.
        let to = SocketAddr::new(lab.pod_ip("server", IpFamily::V4).unwrap(), PORT);
        let (error, _) = wait_for_close(&lab, &Location::pod("client"), to).unwrap();
        assert!(error.contains("Connection reset by peer"), "{error:?}");
        connection.close().unwrap();
    });
    assert_eq!(
        exit,
        ProgramState::Exited("ended: exit status: 0".to_owned())
    );
    assert!(
        duration < Duration::from_secs(10),
        "waited for the termination deadline: {duration:?}"
    );
}

#[test]
fn sigterm_closes_open_connections_at_the_deadline_and_exits_with_0() {
    let lab = lab_with_deadline("1s");
    for node in ["b", "a"] {
        let _connection = open_connection(&lab);
        let (exit, duration) = terminate(&lab, node, || {});
        assert_eq!(
            exit,
            ProgramState::Exited("ended: exit status: 0".to_owned()),
            "{node}"
        );
        assert!(duration < Duration::from_secs(5), "{node}: {duration:?}");
        // Once ready, the daemon has enrolled the existing pods again.
        lab.start_daemon(node).unwrap();
        let dump = lab.config_dump(node).unwrap();
        let states = dump["workloadState"].as_object().unwrap();
        let is_enrolled = |state: &serde_json::Value| state["state"] == "enrolled";
        assert!(
            states.len() == 1 && states.values().all(is_enrolled),
            "{states:?}"
        );
    }
    open_connection(&lab);
}
