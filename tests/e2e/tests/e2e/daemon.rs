//! The daemon as a process: its flags, its readiness, its end.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::open_connections::OpenConnections;
use ambit_e2e::programs::{self, PORT, greeter, wait_for_close};
use lab::{IpFamily, Lab, Location, Options, ProgramState};

const DEADLINE: Duration = Duration::from_secs(10);

#[test]
fn all_configuration_errors_are_reported_together_with_exit_code_64() {
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
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(64), "{said}");
    let wrong = [
        "--worker-threads",
        "--log-format",
        "--cert-ttl",
        "--admin-addr",
        "--trust-domain",
        // These are not given.
        "--node-name",
        "--source-folder",
    ];
    let silent: Vec<&&str> = wrong.iter().filter(|flag| !said.contains(**flag)).collect();
    assert!(silent.is_empty(), "nothing about {silent:?} in:\n{said}");
}

#[test]
fn an_unknown_flag_is_a_configuration_error_too() {
    let output = Command::new(programs::ztunnel_binary().unwrap())
        .arg("--nonsense")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--nonsense"));
}

/// A client on node `a`, a greeter on node `b`, both in the mesh.
fn lab_with(deadline: &str) -> Lab {
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

/// One connection from the client to the server, held open.
fn held(lab: &Lab) -> OpenConnections {
    let mut held = OpenConnections::open(
        lab,
        "client",
        lab.pod_ip("server", IpFamily::V4).unwrap(),
        1,
    )
    .unwrap();
    held.echo(lab, "one").unwrap();
    held
}

#[test]
fn readiness_is_answered_on_both_families_and_admin_on_loopback_alone() {
    let lab = lab_with("5s");
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
        // Nor for the daemon's own pods: their loopback is another.
        let from_pod = lab.http_get(
            &Location::pod("client"),
            SocketAddr::new(node, 15000),
            "/config_dump",
        );
        assert!(from_pod.is_err(), "{from_pod:?}");
    }
}

/// Runs `meanwhile` once SIGTERM is on its way to the daemon; returns how the daemon ended, and
/// after how long.
fn terminate(lab: &Lab, node: &str, meanwhile: impl FnOnce()) -> (ProgramState, Duration) {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| lab.stop_daemon(node));
        // Draining has begun once readiness is no longer 200.
        let ip = lab.node_ip(node, IpFamily::V4).unwrap();
        lab.wait_until("the daemon to drain", DEADLINE, || {
            let ready = lab.http_get(
                &Location::Fabric,
                SocketAddr::new(ip, 15021),
                "/healthz/ready",
            );
            (!ready.is_ok_and(|answer| answer.status == 200)).then_some(())
        })
        .unwrap();
        meanwhile();
        stop.join().unwrap().unwrap();
    });
    (
        lab.status().unwrap().node(node).unwrap().daemon.clone(),
        start.elapsed(),
    )
}

#[test]
fn sigterm_lets_connections_end_and_exits_with_0_as_soon_as_they_have() {
    let lab = lab_with("12s");
    let mut connection = held(&lab);
    let (ended, took) = terminate(&lab, "b", || {
        connection.echo(&lab, "two").unwrap();
        // What is new is refused, neither served nor sent in clear.
        let to = SocketAddr::new(lab.pod_ip("server", IpFamily::V4).unwrap(), PORT);
        let (end, _) = wait_for_close(&lab, &Location::pod("client"), to).unwrap();
        assert!(end.contains("Connection reset by peer"), "{end:?}");
        connection.close().unwrap();
    });
    assert_eq!(
        ended,
        ProgramState::Exited("ended: exit status: 0".to_owned())
    );
    assert!(
        took < Duration::from_secs(10),
        "{took:?}: waited for the deadline, not for the end"
    );
}

#[test]
fn sigterm_cuts_what_has_not_ended_at_the_deadline_and_exits_with_0() {
    let lab = lab_with("1s");
    for node in ["b", "a"] {
        let _connection = held(&lab);
        let (ended, took) = terminate(&lab, node, || {});
        assert_eq!(
            ended,
            ProgramState::Exited("ended: exit status: 0".to_owned()),
            "{node}"
        );
        assert!(took < Duration::from_secs(5), "{node}: {took:?}");
        // Ready means that the pods that were there are in the mesh again.
        lab.start_daemon(node).unwrap();
        let dump = lab.config_dump(node).unwrap();
        let states = dump["workloadState"].as_object().unwrap();
        let enrolled = |state: &serde_json::Value| state["state"] == "enrolled";
        assert!(
            states.len() == 1 && states.values().all(enrolled),
            "{states:?}"
        );
    }
    held(&lab);
}
