//! The kubelet's probes reach the applications of enrolled pods directly, as without a mesh.

use std::net::SocketAddr;
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
fn declared_probes_of_an_enrolled_pod_bypass_the_daemon() {
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
    let proxied = metrics::sum(
        &metrics::scrape(&lab, "a").unwrap(),
        "istio_tcp_connections_opened_total",
        &[],
    );
    assert!(proxied < 0.5, "{proxied} probes passed through the daemon");
}

#[test]
fn probe_ports_bypass_the_daemon_only_for_the_pods_own_node() {
    let lab = lab();
    let node = Location::node("a");
    for family in IpFamily::ALL {
        let (pod_ip, node_ip) = (
            lab.pod_ip("web", family).unwrap(),
            lab.node_ip("a", family).unwrap(),
        );
        for port in [HTTP, TCP] {
            let response = curl(&lab, &node, &url(pod_ip, port), &[]).unwrap();
            assert_eq!(response.body, node_ip.to_string(), "{family:?} {port}");
        }
        // A bypassing connection has no log line. The line of this request comes after where the lines
        // of the two above would be.
        let response = curl(&lab, &node, &url(pod_ip, PORT), &[]).unwrap();
        assert_eq!(
            response.body,
            node_ip.to_string(),
            "{family:?}: the source address is not the node's"
        );
        let line = wait_inbound(&lab, SocketAddr::new(node_ip, response.local_port));
        let to = SocketAddr::new(pod_ip, PORT).to_string();
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

    // Another node does not run the kubelet of this pod.
    for family in IpFamily::ALL {
        let to = url(lab.pod_ip("web", family).unwrap(), HTTP);
        let response = curl(&lab, &Location::node("b"), &to, &[]).unwrap();
        let node_ip = lab.node_ip("b", family).unwrap();
        wait_inbound(&lab, SocketAddr::new(node_ip, response.local_port));
    }
}

/// Waits for the access-log line of an inbound connection from this address.
fn wait_inbound(lab: &Lab, from: SocketAddr) -> access_log::Entry {
    let from = from.to_string();
    let fields = [("src.addr", &*from), ("direction", "inbound")];
    access_log::wait(lab, "a", &fields).unwrap()
}
