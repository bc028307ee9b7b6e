//! Location a connection goes: services, ports, families, and what the mesh does not know.

use std::net::IpAddr;
use std::time::Duration;

use ambit_e2e::manifest::{Pod, Service, endpoint_slice};
use ambit_e2e::programs::{PORT, curl, curl_many, nginx, url, wait_for_close};
use ambit_e2e::web_service::{client, count_answers, endpoint, lab_with};
use ambit_e2e::{access_log, metrics, sync};
use lab::{IpFamily, Lab, Location, Process};
use serde_json::json;

#[test]
fn a_target_port_may_be_a_number_or_a_name_that_each_pod_gives_a_number_of_its_own() {
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
        all.push(
            Service::new(namespace, "numeric", 81, 9090)
                .selecting("other")
                .into(),
        );
        all.push(
            Service::new(namespace, "same", PORT, PORT)
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
            let answers = curl_many(&lab, &client(), &url(named, 80), 24).unwrap();
            let tally = count_answers(&answers);
            assert_eq!(
                tally.keys().collect::<Vec<_>>(),
                [&"other", &"web"],
                "{namespace} {family:?}"
            );
        }
    }
}

#[test]
fn a_service_without_selector_reaches_the_endpoints_that_are_written_by_hand() {
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
        let ask = |service: &str| {
            let ip = lab.service_ip(&format!("in/{service}"), family).unwrap();
            curl(&lab, &client(), &url(ip, 80), &[]).unwrap()
        };
        let answer = ask("pods");
        assert_eq!(answer.body, "web");
        // A hand-written address that is a pod's is that pod, with its identity.
        let source =
            std::net::SocketAddr::new(lab.pod_ip("client", family).unwrap(), answer.local_port);
        let source = source.to_string();
        let line = access_log::wait(&lab, "a", &[("src.addr", &source)]).unwrap();
        assert_eq!(
            line.field("dst.identity"),
            "spiffe://cluster.local/ns/in/sa/web",
            "{}",
            line.line
        );
        let client_ip = lab.pod_ip("client", family).unwrap();
        assert_eq!(ask("outside").body, format!("outside {client_ip}"));
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

/// nginx outside the cluster, listening.
fn nginx_outside(lab: &Lab, answer: &str) -> (Process, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let command = nginx(&[PORT], answer);
    let mut all = vec!["env", "-C", dir.path().to_str().unwrap()];
    all.extend(command.iter().map(String::as_str));
    let process = lab.spawn_in(&Location::Fabric, &all).unwrap();
    lab.wait_until("nginx outside to answer", Duration::from_secs(5), || {
        curl(
            lab,
            &Location::Fabric,
            &url(fabric_ip(IpFamily::V6), PORT),
            &[],
        )
        .ok()
    })
    .unwrap();
    (process, dir)
}

#[test]
fn what_the_mesh_does_not_know_is_reached_as_it_is() {
    let lab = lab_with([]).unwrap();
    let outside = nginx_outside(&lab, "$remote_addr $http_x_marker");
    for family in IpFamily::ALL {
        let (client_ip, to) = (lab.pod_ip("client", family).unwrap(), fabric_ip(family));
        let answer = curl(&lab, &client(), &url(to, PORT), &["-H", "X-Marker: m"]).unwrap();
        assert_eq!(answer.body, format!("{client_ip} m"));
        let source = std::net::SocketAddr::new(client_ip, answer.local_port).to_string();
        let line = access_log::wait(&lab, "a", &[("src.addr", &source)]).unwrap();
        let to = std::net::SocketAddr::new(to, PORT).to_string();
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
fn a_service_that_nobody_serves_resets_at_once_and_says_why() {
    let ill = json!({"exec": {"command": ["false"]}, "periodSeconds": 1});
    let ill = endpoint("in", "ill", "b").container("readinessProbe", ill);
    let empty = Service::new("in", "empty", 80, PORT);
    let lab = lab_with([empty.into(), Service::new("in", "web", 80, PORT).into()]).unwrap();
    lab.apply(String::from(ill)).unwrap();
    lab.wait_status("the pod to run", Duration::from_secs(10), |status| {
        status.pod("in/ill").is_ok_and(|pod| pod.phase == "Running")
    })
    .unwrap();
    sync::wait_synced(&lab).unwrap();
    for (service, reason) in [("empty", "no_endpoint"), ("web", "no_healthy_endpoint")] {
        for family in IpFamily::ALL {
            let to = lab.service_ip(service, family).unwrap();
            let to = std::net::SocketAddr::new(to, 80);
            let (end, took) = wait_for_close(&lab, &client(), to).unwrap();
            assert!(
                end.contains("Connection reset by peer"),
                "{service} {to}: {end:?}"
            );
            assert!(took < Duration::from_secs(2), "{took:?}");
        }
        let host = format!("{service}.in.svc.cluster.local");
        let wanted = [("dst.service", host.as_str()), ("reason", reason)];
        let line = access_log::wait(&lab, "a", &wanted).unwrap();
        let of = [
            ("src.workload", "client"),
            ("src.namespace", "in"),
            ("bytes_recv", "0"),
        ];
        assert!(line.level == "error" && line.has(&of), "{}", line.line);
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
fn one_family_is_enough_for_a_pod_and_for_a_service() {
    let one = |family: &str| json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": [family]});
    let service = |name: &str, family: &str| {
        let spec = one(family);
        let service = Service::new("in", name, 80, PORT).selecting("web");
        let service = service.spec("ipFamilyPolicy", spec["ipFamilyPolicy"].clone());
        String::from(service.spec("ipFamilies", spec["ipFamilies"].clone()))
    };
    let lab = lab_with([
        service("four", "IPv4"),
        service("six", "IPv6"),
        endpoint("in", "web", "b").into(),
    ])
    .unwrap();
    for (name, family) in [("four", IpFamily::V4), ("six", IpFamily::V6)] {
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
