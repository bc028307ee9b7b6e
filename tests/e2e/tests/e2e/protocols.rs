//! Programs that are no web browsers, through the mesh and not knowing it.

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
    // At the start alone: to iperf3 a probe is a client, and it serves one at a time.
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

/// The program's output in the client pod; it must succeed.
fn client(lab: &Lab, command: &[&str]) -> String {
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
fn a_server_that_speaks_first_is_heard_at_once() {
    let lab = lab_of(greeter(2525, "220 ready"), 2525);
    for family in IpFamily::ALL {
        for to in [
            lab.service_ip("server", family).unwrap(),
            lab.pod_ip("server", family).unwrap(),
        ] {
            let start = Instant::now();
            // The client says nothing, and keeps its side open until it has heard something.
            let process = lab
                .spawn("in/client", &["nc", &to.to_string(), "2525"])
                .unwrap();
            process
                .wait_stdout("220 ready\n", Duration::from_secs(20))
                .unwrap();
            // Proxies that look at the client's first bytes wait for them here, most of them 5 s or 10 s.
            assert!(
                start.elapsed() < Duration::from_secs(5),
                "{to}: {:?}",
                start.elapsed()
            );
        }
    }
}

#[test]
fn redis_works_with_many_commands_and_large_values() {
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
            client(&lab, &["redis-cli", "-h", &ip, "set", "key", "value"]),
            "OK\n"
        );
        assert_eq!(
            client(&lab, &["redis-cli", "-h", &ip, "get", "key"]),
            "value\n"
        );
        let large =
            format!("head -c 3000000 /dev/zero | tr '\\0' x | redis-cli -h {ip} -x set large");
        assert_eq!(client(&lab, &["sh", "-c", &large]), "OK\n");
        assert_eq!(
            client(&lab, &["redis-cli", "-h", &ip, "strlen", "large"]),
            "3000000\n"
        );
        let fetched = format!("redis-cli -h {ip} get large | tr -d '\\n' | wc -c");
        assert_eq!(client(&lab, &["sh", "-c", &fetched]).trim(), "3000000");
        // Thousands of small commands in flight at once.
        let piped = format!("seq 5000 | sed 's/.*/INCR counter/' | redis-cli -h {ip} --pipe");
        assert!(
            client(&lab, &["sh", "-c", &piped]).contains("replies: 5000"),
            "{piped}"
        );
    }
    assert_eq!(
        client(
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
fn iperf3_moves_bytes_both_ways_on_several_streams() {
    let lab = lab_of(words(&["iperf3", "-s"]), 5201);
    for (family, direction) in [(IpFamily::V4, "--bidir"), (IpFamily::V6, "-R")] {
        let ip = lab.service_ip("server", family).unwrap().to_string();
        let json = client(
            &lab,
            &[
                "iperf3", "-c", &ip, "-t", "1", "-P", "4", direction, "--json",
            ],
        );
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        for sum in ["sum_sent", "sum_received"] {
            let bytes = report["end"][sum]["bytes"].as_u64().unwrap_or_default();
            // The slowest that was measured moves ten times as many in a second.
            assert!(bytes > 10_000_000, "{direction} {sum}: {bytes}");
        }
    }
    // What was counted is what moved, and all of it was encrypted.
    let source = [
        ("reporter", "source"),
        ("source_workload", "client"),
        ("connection_security_policy", "mutual_tls"),
    ];
    metrics::wait(
        &lab,
        "a",
        "istio_tcp_sent_bytes_total",
        &source,
        10_000_000.0,
    )
    .unwrap();
    metrics::wait(
        &lab,
        "a",
        "istio_tcp_received_bytes_total",
        &source,
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
