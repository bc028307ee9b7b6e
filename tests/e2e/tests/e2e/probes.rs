//! The kubelet's probes reach the applications of enrolled pods as they do without a mesh.

use std::time::Duration;

use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::programs::{PORT, curl, nginx, url};
use ambit_e2e::{access_log, metrics};
use lab::{IpFamily, Lab, Location, Options};
use serde_json::json;

/// The port of the httpGet probes.
const HTTP: u16 = 8081;

/// The port of the tcpSocket probe.
const TCP: u16 = 8082;

/// An enrolled pod on node `a`, with a probe of each kind and a port without one.
fn lab() -> Lab {
    let pod = Pod::new("in", "web")
        .on("a")
        .runs(nginx(&[PORT, HTTP, TCP], "$remote_addr"))
        .port(None, PORT)
        .port(Some("health"), HTTP)
        .container(
            "startupProbe",
            json!({"tcpSocket": {"port": TCP}, "periodSeconds": 1, "failureThreshold": 30}),
        )
        .container(
            "readinessProbe",
            json!({"httpGet": {"port": "health", "path": "/ready"}, "periodSeconds": 1}),
        )
        .container(
            "livenessProbe",
            json!({"httpGet": {"port": HTTP, "path": "/live"}, "periodSeconds": 1}),
        );
    let namespace = manifest::namespace("in", Some("ambient"));
    let all = [manifest::two_nodes(), namespace, pod.into()];
    Lab::up(manifest::all(all), Options::default()).unwrap()
}

#[test]
fn declared_probes_of_an_enrolled_pod_succeed_and_come_from_the_node() {
    let lab = lab();
    lab.wait_workload_state("web", Some("enrolled"), Duration::from_secs(10))
        .unwrap();
    let node = lab.node_ip("a", IpFamily::V4).unwrap();
    for path in ["/ready", "/live"] {
        let line = format!("{node} {HTTP} {path} ");
        lab.wait_until(
            &format!("a probe of {path}"),
            Duration::from_secs(10),
            || lab.pod_log("web").ok()?.contains(&line).then_some(()),
        )
        .unwrap();
    }
    let status = lab.status().unwrap();
    let pod = status.pod("web").unwrap();
    assert!(pod.ready && pod.restarts == 0, "{pod:?}");
    // The daemon had no part in them.
    let inbound = metrics::sum(
        &metrics::scrape(&lab, "a").unwrap(),
        "istio_tcp_connections_opened_total",
        &[],
    );
    assert!(
        inbound < 0.5,
        "{inbound} connections in the daemon's metrics"
    );
}

#[test]
fn the_node_reaches_probe_ports_directly_and_other_ports_through_the_daemon() {
    let lab = lab();
    let node = Location::node("a");
    for family in IpFamily::ALL {
        let (pod_ip, node_ip) = (
            lab.pod_ip("web", family).unwrap(),
            lab.node_ip("a", family).unwrap(),
        );
        for port in [HTTP, TCP] {
            let answer = curl(&lab, &node, &url(pod_ip, port), &[]).unwrap();
            assert_eq!(answer.body, node_ip.to_string(), "{family:?} {port}");
        }
        // Nothing is told of a probe; the line of this request comes after where theirs would be.
        let answer = curl(&lab, &node, &url(pod_ip, PORT), &[]).unwrap();
        assert_eq!(
            answer.body,
            node_ip.to_string(),
            "{family:?}: not from where it came"
        );
        let source = std::net::SocketAddr::new(node_ip, answer.local_port).to_string();
        let line = access_log::wait(
            &lab,
            "a",
            &[("src.addr", &source), ("direction", "inbound")],
        )
        .unwrap();
        let to = std::net::SocketAddr::new(pod_ip, PORT).to_string();
        assert!(
            line.has(&[("dst.addr", &to), ("src.identity", ""), ("error", "")]),
            "{}",
            line.line
        );
    }
    let ports: Vec<String> = access_log::lines(&lab, "a")
        .unwrap()
        .iter()
        .filter_map(|line| {
            line.field("dst.addr")
                .rsplit_once(':')
                .map(|(_, port)| port.to_owned())
        })
        .collect();
    assert_eq!(ports, [PORT.to_string(), PORT.to_string()]);
}

#[test]
fn a_probe_port_is_open_to_the_node_alone() {
    let lab = lab();
    // Another node's address is not the kubelet's of this pod.
    for family in IpFamily::ALL {
        let pod_ip = lab.pod_ip("web", family).unwrap();
        let answer = curl(&lab, &Location::node("b"), &url(pod_ip, HTTP), &[]).unwrap();
        let source =
            std::net::SocketAddr::new(lab.node_ip("b", family).unwrap(), answer.local_port);
        access_log::wait(
            &lab,
            "a",
            &[("src.addr", &source.to_string()), ("direction", "inbound")],
        )
        .unwrap();
    }
}
