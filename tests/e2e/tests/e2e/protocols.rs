//! Programs with other protocols than HTTP work unchanged through the mesh.

use std::time::{Duration, Instant};

use ambit_e2e::manifest::{self, Pod, Service};
use ambit_e2e::programs::{greeter, words};
use ambit_e2e::{access_log, metrics};
use lab::{IpFamily, Lab, Location, Options};

/// A client on node `a` and a server on node `b`, both in the mesh, with a service on `port`.
fn lab_of(server: Vec<String>, port: u16) -> Lab {
    let server = Pod::new("in", "server")
        .on("b")
        .runs(server)
        .port(None, port);
    // Only a startup probe: for iperf3 a probe is a client, and it serves one client at a time.
    let server = server.container(
        "startupProbe",
        serde_json::json!({"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 30}),
    );
    let all = [
        manifest::two_nodes(),
        manifest::namespace("in", Some("ambient")),
        Pod::new("in", "client").on("a").into(),
        server.into(),
        Service::new("in", "server", port, port).into(),
    ];
    Lab::up(manifest::all(all), Options::default()).unwrap()
}

/// Runs a program in the client pod, which must succeed. Returns its output.
fn run_client(lab: &Lab, command: &[&str]) -> String {
    lab.exec_in(
        &Location::pod("in/client"),
        command,
        Duration::from_secs(30),
    )
    .unwrap()
    .ok()
    .unwrap()
}

#[test]
fn greeting_of_a_server_that_sends_first_arrives_at_once() {
    let lab = lab_of(greeter(2525, "220 ready"), 2525);
    for family in IpFamily::ALL {
        for to in [
            lab.service_ip("server", family).unwrap(),
            lab.pod_ip("server", family).unwrap(),
        ] {
            let start = Instant::now();
            // nc sends nothing and keeps its side open.
            let process = lab
                .spawn("in/client", &["nc", &to.to_string(), "2525"])
                .unwrap();
            process
                .wait_stdout("220 ready\n", Duration::from_secs(20))
                .unwrap();
            // A proxy that sniffs the client's first bytes delays the greeting, usually by 5 s or 10 s.
            assert!(
                start.elapsed() < Duration::from_secs(5),
                "{to}: {:?}",
                start.elapsed()
            );
        }
    }
}

#[test]
fn redis_commands_pipelines_and_large_values_work() {
    let server = [
        "redis-server",
        "--port",
        "6379",
        "--bind",
        "*",
        "-::*",
        "--protected-mode",
        "no",
        "--save",
        "",
    ];
    let lab = lab_of(words(&server), 6379);
    for family in IpFamily::ALL {
        let ip = lab.service_ip("server", family).unwrap().to_string();
        assert_eq!(
            run_client(&lab, &["redis-cli", "-h", &ip, "set", "key", "value"]),
            "OK\n"
        );
        assert_eq!(
            run_client(&lab, &["redis-cli", "-h", &ip, "get", "key"]),
            "value\n"
        );
        let large =
            format!("head -c 3000000 /dev/zero | tr '\\0' x | redis-cli -h {ip} -x set large");
        assert_eq!(run_client(&lab, &["sh", "-c", &large]), "OK\n");
        assert_eq!(
            run_client(&lab, &["redis-cli", "-h", &ip, "strlen", "large"]),
            "3000000\n"
        );
        let fetched = format!("redis-cli -h {ip} get large | tr -d '\\n' | wc -c");
        assert_eq!(run_client(&lab, &["sh", "-c", &fetched]).trim(), "3000000");
        // 5000 small commands are in flight at once.
        let pipeline = format!("seq 5000 | sed 's/.*/INCR counter/' | redis-cli -h {ip} --pipe");
        assert!(
            run_client(&lab, &["sh", "-c", &pipeline]).contains("replies: 5000"),
            "{pipeline}"
        );
    }
    assert_eq!(
        run_client(
            &lab,
            &[
                "redis-cli",
                "-h",
                &lab.service_ip("server", IpFamily::V4).unwrap().to_string(),
                "get",
                "counter"
            ]
        ),
        "10000\n"
    );
}

#[test]
fn iperf3_transfers_in_both_directions_on_several_streams() {
    let lab = lab_of(words(&["iperf3", "-s"]), 5201);
    // A fixed number of bytes per run, so that the result does not depend on the machine's speed.
    let runs = [
        (IpFamily::V4, &["-n", "64M"][..]),
        (IpFamily::V6, &["-n", "64M", "-R"]),
        (IpFamily::V4, &["-t", "1", "--bidir"]),
    ];
    for (family, options) in runs {
        let ip = lab.service_ip("server", family).unwrap().to_string();
        let command = ["iperf3", "-c", &ip, "-P", "4", "--json"];
        let json = run_client(&lab, &[&command[..], options].concat());
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        // iperf3 ends when everything is sent; the sockets may still hold a part of it then.
        let min_bytes = if options.contains(&"-n") { 16 << 20 } else { 1 };
        for sum in ["sum_sent", "sum_received"] {
            let bytes = report["end"][sum]["bytes"].as_u64().unwrap_or_default();
            assert!(bytes >= min_bytes, "{options:?} {sum}: {bytes}");
        }
    }
    // The metrics count the bytes as encrypted.
    let labels = [
        ("reporter", "source"),
        ("source_workload", "client"),
        ("connection_security_policy", "mutual_tls"),
    ];
    metrics::wait(
        &lab,
        "a",
        "istio_tcp_sent_bytes_total",
        &labels,
        10_000_000.0,
    )
    .unwrap();
    metrics::wait(
        &lab,
        "a",
        "istio_tcp_received_bytes_total",
        &labels,
        10_000_000.0,
    )
    .unwrap();
    let failed: Vec<_> = access_log::lines(&lab, "a")
        .unwrap()
        .into_iter()
        .filter(|line| line.level == "error")
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}
