//! Where connections are sent: services, ports, families, and destinations outside the mesh.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ambit_e2e::manifest::{Pod, Service, endpoint_slice};
use ambit_e2e::programs::{PORT, curl, curl_many, nginx, url, wait_for_close};
use ambit_e2e::web_service::{client, count_answers, endpoint, lab_with};
use ambit_e2e::{access_log, metrics, sync};
use lab::{IpFamily, Lab, Location, Process};
use serde_json::json;

#[test]
fn named_target_port_is_resolved_per_pod() {
    let mut all = Vec::new();
    for namespace in ["in", "out"] {
        let other = nginx(&[9090], "other");
        let other = Pod::new(namespace, "other")
            .on("b")
            .label("app", "web")
            .runs(other);
        all.push(endpoint(namespace, "web", "b").into());
        all.push(other.port(Some("web"), 9090).into());
        all.push(
            Service::new(namespace, "named", 80, "web")
                .selecting("web")
                .into(),
        );
    }
    let lab = lab_with(all).unwrap();
    for namespace in ["in", "out"] {
        for family in IpFamily::ALL {
            let named = lab
                .service_ip(&format!("{namespace}/named"), family)
                .unwrap();
            let responses = curl_many(&lab, &client(), &url(named, 80), 24).unwrap();
            let counts = count_answers(&responses);
            assert_eq!(
                counts.keys().collect::<Vec<_>>(),
                [&"other", &"web"],
                "{namespace} {family:?}"
            );
        }
    }
}

#[test]
fn service_without_selector_uses_applied_endpoint_slices() {
    let service = |name: &str| String::from(Service::new("in", name, 80, PORT).without_selector());
    let lab = lab_with([
        service("pods"),
        service("outside"),
        endpoint("in", "web", "b").into(),
    ])
    .unwrap();
    let outside = nginx_outside(&lab, "outside $remote_addr");
    for family in IpFamily::ALL {
        let pod = lab.pod_ip("web", family).unwrap();
        let fabric = fabric_ip(family);
        lab.apply(endpoint_slice("in", "pods", pod, PORT)).unwrap();
        lab.apply(endpoint_slice("in", "outside", fabric, PORT))
            .unwrap();
        sync::wait_synced(&lab).unwrap();
        let request = |service: &str| {
            let ip = lab.service_ip(&format!("in/{service}"), family).unwrap();
            curl(&lab, &client(), &url(ip, 80), &[]).unwrap()
        };
        let response = request("pods");
        assert_eq!(response.body, "web");
        // A pod's address in the slice is resolved to the pod and its identity.
        let source = SocketAddr::new(lab.pod_ip("client", family).unwrap(), response.local_port);
        let source = source.to_string();
        let line = access_log::wait(&lab, "a", &[("src.addr", &source)]).unwrap();
        assert_eq!(
            line.field("dst.identity"),
            "spiffe://cluster.local/ns/in/sa/web",
            "{}",
            line.line
        );
        let client_ip = lab.pod_ip("client", family).unwrap();
        assert_eq!(request("outside").body, format!("outside {client_ip}"));
    }
    drop(outside);
}

/// An address of the fabric, which is outside the cluster.
fn fabric_ip(family: IpFamily) -> IpAddr {
    match family {
        IpFamily::V4 => IpAddr::from([10, 0, 0, 1]),
        IpFamily::V6 => "fd00:10::1".parse().unwrap(),
    }
}

/// Starts nginx outside the cluster, and waits until it responds.
fn nginx_outside(lab: &Lab, body: &str) -> (Process, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let command = nginx(&[PORT], body);
    let mut args = vec!["env", "-C", dir.path().to_str().unwrap()];
    args.extend(command.iter().map(String::as_str));
    let process = lab.spawn_in(&Location::Fabric, &args).unwrap();
    lab.wait_until(
        "nginx outside the cluster to respond",
        Duration::from_secs(5),
        || {
            curl(
                lab,
                &Location::Fabric,
                &url(fabric_ip(IpFamily::V6), PORT),
                &[],
            )
            .ok()
        },
    )
    .unwrap();
    (process, dir)
}

#[test]
fn destination_outside_the_mesh_is_reached_directly() {
    let lab = lab_with([]).unwrap();
    let outside = nginx_outside(&lab, "$remote_addr $http_x_marker");
    for family in IpFamily::ALL {
        let (client_ip, to) = (lab.pod_ip("client", family).unwrap(), fabric_ip(family));
        let response = curl(&lab, &client(), &url(to, PORT), &["-H", "X-Marker: m"]).unwrap();
        assert_eq!(response.body, format!("{client_ip} m"));
        let source = SocketAddr::new(client_ip, response.local_port).to_string();
        let line = access_log::wait(&lab, "a", &[("src.addr", &source)]).unwrap();
        let to = SocketAddr::new(to, PORT).to_string();
        assert!(
            line.has(&[
                ("dst.addr", &to),
                ("dst.workload", ""),
                ("dst.identity", ""),
                ("error", "")
            ]),
            "{}",
            line.line
        );
    }
    drop(outside);
}

#[test]
fn service_without_endpoints_resets_at_once_and_logs_the_reason() {
    let unready = json!({"exec": {"command": ["false"]}, "periodSeconds": 1});
    let unready = endpoint("in", "unready", "b").container("readinessProbe", unready);
    let empty = Service::new("in", "empty", 80, PORT);
    let lab = lab_with([empty.into(), Service::new("in", "web", 80, PORT).into()]).unwrap();
    lab.apply(String::from(unready)).unwrap();
    lab.wait_status("the pod to run", Duration::from_secs(10), |status| {
        status
            .pod("in/unready")
            .is_ok_and(|pod| pod.phase == "Running")
    })
    .unwrap();
    sync::wait_synced(&lab).unwrap();
    for (service, reason) in [("empty", "no_endpoint"), ("web", "no_healthy_endpoint")] {
        for family in IpFamily::ALL {
            let to = lab.service_ip(service, family).unwrap();
            let to = SocketAddr::new(to, 80);
            let (error, duration) = wait_for_close(&lab, &client(), to).unwrap();
            assert!(
                error.contains("Connection reset by peer"),
                "{service} {to}: {error:?}"
            );
            assert!(duration < Duration::from_secs(2), "{duration:?}");
        }
        let host = format!("{service}.in.svc.cluster.local");
        let fields = [("dst.service", host.as_str()), ("reason", reason)];
        let line = access_log::wait(&lab, "a", &fields).unwrap();
        let others = [
            ("src.workload", "client"),
            ("src.namespace", "in"),
            ("bytes_recv", "0"),
        ];
        assert!(line.level == "error" && line.has(&others), "{}", line.line);
        let failures = [("direction", "outbound"), ("reason", reason)];
        metrics::wait(&lab, "a", "ambit_connection_failures_total", &failures, 2.0).unwrap();
        let failed = [
            ("destination_service", host.as_str()),
            ("reporter", "source"),
        ];
        metrics::wait(
            &lab,
            "a",
            "istio_tcp_connections_failed_total",
            &failed,
            2.0,
        )
        .unwrap();
    }
}

#[test]
fn single_stack_services_are_reached_over_their_family() {
    let service = |name: &str, family: &str| {
        let service = Service::new("in", name, 80, PORT).selecting("web");
        let service = service.spec("ipFamilyPolicy", "SingleStack");
        String::from(service.spec("ipFamilies", json!([family])))
    };
    let lab = lab_with([
        service("ipv4", "IPv4"),
        service("ipv6", "IPv6"),
        endpoint("in", "web", "b").into(),
    ])
    .unwrap();
    for (name, family) in [("ipv4", IpFamily::V4), ("ipv6", IpFamily::V6)] {
        assert_eq!(
            lab.status()
                .unwrap()
                .services
                .iter()
                .find(|s| s.name == name)
                .unwrap()
                .cluster_ips
                .len(),
            1
        );
        let to = url(lab.service_ip(name, family).unwrap(), 80);
        assert_eq!(curl(&lab, &client(), &to, &[]).unwrap().body, "web");
    }
}
