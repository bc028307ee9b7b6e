//! Metrics and access log have the names, labels and fields of Istio's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use ambit_e2e::access_log::{self, Entry};
use ambit_e2e::manifest::{self, Pod, Service};
use ambit_e2e::metrics::{self, Sample};
use ambit_e2e::programs::{CurlResponse, PORT, curl, nginx, url, wait_for_close};
use lab::{IpFamily, Lab, Location, Options};

/// Sends a request from pod `client` on node `a` to service `web`, whose pod is on node `b`. Canonical
/// service and revision come from the labels that Istio reads.
fn lab_and_request() -> (Lab, CurlResponse) {
    let client = Pod::new("in", "client").on("a").label("version", "v1");
    let web = Pod::new("in", "web-0")
        .on("b")
        .runs(nginx(&[PORT], "hello"))
        .port(None, PORT);
    let web = web
        .label("app", "web")
        .label("service.istio.io/canonical-name", "shop");
    let all = [
        manifest::two_nodes(),
        manifest::namespace("in", Some("ambient")),
        client.into(),
        web.into(),
        Service::new("in", "web", 80, PORT).into(),
    ];
    let lab = Lab::up(manifest::all(all), Options::default()).unwrap();
    let to = url(lab.service_ip("web", IpFamily::V4).unwrap(), 80);
    let response = curl(&lab, &Location::pod("client"), &to, &[]).unwrap();
    assert_eq!(response.body, "hello");
    (lab, response)
}

/// Istio's labels for that connection, without `reporter`.
const LABELS: &[(&str, &str)] = &[
    ("source_workload", "client"),
    ("source_canonical_service", "client"),
    ("source_canonical_revision", "v1"),
    ("source_workload_namespace", "in"),
    ("source_principal", "spiffe://cluster.local/ns/in/sa/client"),
    ("source_app", "client"),
    ("source_version", "v1"),
    ("source_cluster", "Kubernetes"),
    ("destination_service", "web.in.svc.cluster.local"),
    ("destination_service_namespace", "in"),
    ("destination_service_name", "web"),
    ("destination_workload", "web-0"),
    ("destination_canonical_service", "shop"),
    ("destination_canonical_revision", "latest"),
    ("destination_workload_namespace", "in"),
    (
        "destination_principal",
        "spiffe://cluster.local/ns/in/sa/web-0",
    ),
    ("destination_app", "shop"),
    ("destination_version", "latest"),
    ("destination_cluster", "Kubernetes"),
    ("request_protocol", "tcp"),
    ("response_flags", "-"),
    ("connection_security_policy", "mutual_tls"),
    ("source_region", "r1"),
    ("source_zone", "za"),
    ("destination_region", "r1"),
    ("destination_zone", "zb"),
];

#[test]
fn metrics_and_access_log_have_istios_names_and_labels() {
    let (lab, response) = lab_and_request();
    check_metrics(&lab, &response);
    check_access_log(&lab, &response);
}

fn check_metrics(lab: &Lab, response: &CurlResponse) {
    // Both reporters count the bytes that the client sent as received.
    let expected = BTreeMap::from([
        ("istio_tcp_connections_opened_total", 1),
        ("istio_tcp_connections_closed_total", 1),
        ("istio_tcp_received_bytes_total", response.request_bytes),
        ("istio_tcp_sent_bytes_total", response.response_bytes),
    ]);
    for (node, reporter) in [("a", "source"), ("b", "destination")] {
        metrics::wait(lab, node, "istio_tcp_connections_closed_total", &[], 1.0).unwrap();
        let text = lab.metrics(node).unwrap();
        let samples = metrics::parse(&text);
        let traffic: Vec<&Sample> = samples
            .iter()
            .filter(|sample| expected.contains_key(sample.name.as_str()))
            .collect();
        assert_eq!(traffic.len(), expected.len(), "{traffic:#?}");
        for sample in traffic {
            let labels: BTreeMap<String, String> = LABELS
                .iter()
                .chain([&("reporter", reporter)])
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect();
            assert_eq!(sample.labels, labels, "{} of node {node}", sample.name);
            let value = u32::try_from(expected[sample.name.as_str()]).unwrap();
            assert!(
                (sample.value - f64::from(value)).abs() < 0.5,
                "expected {value}, got {sample:?}"
            );
            assert!(
                text.contains(&format!("# TYPE {} counter\n", sample.name)),
                "{}",
                sample.name
            );
        }
        assert!(
            !text.contains("istio_tcp_connections_failed_total{"),
            "{text}"
        );
        let names: Vec<&str> = samples.iter().map(|sample| sample.name.as_str()).collect();
        for name in [
            "istio_build",
            "istio_tcp_sockets_open",
            "process_open_fds",
            "process_max_fds",
            "workload_manager_active_proxy_count",
        ] {
            assert!(names.contains(&name), "no {name} in {names:?}");
        }
    }
}

/// The line without its time, and with placeholders for values that differ from run to run.
fn normalised(line: &Entry, replacements: &[(String, &str)]) -> String {
    let (_, rest) = line.line.split_once('\t').unwrap();
    let duration = format!("duration=\"{}\"", line.field("duration"));
    let mut text = rest.replace(&duration, "duration=\"Nms\"");
    for (from, to) in replacements {
        text = text.replace(from, to);
    }
    text
}

/// The lines have Istio's fields in Istio's order.
fn check_access_log(lab: &Lab, response: &CurlResponse) {
    let (client, web) = (
        lab.pod_ip("client", IpFamily::V4).unwrap(),
        lab.pod_ip("web-0", IpFamily::V4).unwrap(),
    );
    let outbound = access_log::wait(lab, "a", &[("direction", "outbound")]).unwrap();
    let inbound = access_log::wait(lab, "b", &[("direction", "inbound")]).unwrap();
    let replacements = [
        (
            SocketAddr::new(client, response.local_port).to_string(),
            "CLIENT:PORT",
        ),
        // At the server this is the source of the tunnel.
        (
            format!("src.addr={}", inbound.field("src.addr")),
            "src.addr=CLIENT:TUNNEL",
        ),
        (SocketAddr::new(web, PORT).to_string(), "WEB:8080"),
        (SocketAddr::new(web, 15008).to_string(), "WEB:15008"),
        (format!("={} ", response.request_bytes), "=REQUEST "),
        (format!("={} ", response.response_bytes), "=REPLY "),
    ];
    assert!(
        inbound.field("src.addr").starts_with(&format!("{client}:")),
        "{}",
        inbound.line
    );
    assert_eq!(
        normalised(&outbound, &replacements),
        "info\taccess\tconnection complete\tsrc.addr=CLIENT:PORT src.workload=\"client\" src.namespace=\"in\" \
         src.identity=\"spiffe://cluster.local/ns/in/sa/client\" src.cluster=\"Kubernetes\" dst.addr=WEB:15008 \
         dst.hbone_addr=WEB:8080 dst.service=\"web.in.svc.cluster.local\" dst.workload=\"web-0\" dst.namespace=\"in\" \
         dst.identity=\"spiffe://cluster.local/ns/in/sa/web-0\" dst.cluster=\"Kubernetes\" direction=\"outbound\" \
         bytes_sent=REQUEST bytes_recv=REPLY duration=\"Nms\" reason=\"closed\""
    );
    assert_eq!(
        normalised(&inbound, &replacements),
        "info\taccess\tconnection complete\tsrc.addr=CLIENT:TUNNEL src.workload=\"client\" src.namespace=\"in\" \
         src.identity=\"spiffe://cluster.local/ns/in/sa/client\" src.cluster=\"Kubernetes\" dst.addr=WEB:15008 \
         dst.hbone_addr=WEB:8080 dst.service=\"web.in.svc.cluster.local\" dst.workload=\"web-0\" dst.namespace=\"in\" \
         dst.identity=\"spiffe://cluster.local/ns/in/sa/web-0\" dst.cluster=\"Kubernetes\" direction=\"inbound\" \
         bytes_sent=REPLY bytes_recv=REQUEST duration=\"Nms\" reason=\"closed\""
    );
    // Each daemon logs one line.
    for node in ["a", "b"] {
        assert_eq!(access_log::lines(lab, node).unwrap().len(), 1);
    }
}

#[test]
fn failed_connection_is_logged_as_error_with_reason_and_response_flag() {
    let all = [
        manifest::two_nodes(),
        manifest::namespace("in", Some("ambient")),
        manifest::namespace("out", None),
        Pod::new("in", "client").on("a").into(),
        // No program listens in these.
        Pod::new("in", "closed").on("b").into(),
        Pod::new("out", "closed").on("b").into(),
    ];
    let lab = Lab::up(manifest::all(all), Options::default()).unwrap();
    for (namespace, policy) in [("in", "mutual_tls"), ("out", "unknown")] {
        let ip = lab
            .pod_ip(&format!("{namespace}/closed"), IpFamily::V4)
            .unwrap();
        let to = SocketAddr::new(ip, PORT);
        let (error, _) = wait_for_close(&lab, &Location::pod("client"), to).unwrap();
        assert!(error.contains("Connection reset by peer"), "{error:?}");
        let line = access_log::wait(&lab, "a", &[("dst.namespace", namespace)]).unwrap();
        let (error, reason) = (line.field("error"), line.field("reason"));
        assert!(
            line.level == "error" && !error.is_empty() && !reason.is_empty(),
            "{}",
            line.line
        );
        let failures = [("direction", "outbound"), ("reason", reason)];
        metrics::wait(&lab, "a", "ambit_connection_failures_total", &failures, 1.0).unwrap();
        let failed = [
            ("reporter", "source"),
            ("destination_workload_namespace", namespace),
            ("connection_security_policy", policy),
            ("response_flags", "CONNECT"),
        ];
        metrics::wait(
            &lab,
            "a",
            "istio_tcp_connections_failed_total",
            &failed,
            1.0,
        )
        .unwrap();
    }
}

#[test]
fn json_log_has_one_object_per_line_with_the_same_fields() {
    let options = Options {
        daemon_args: vec!["--log-format".to_owned(), "json".to_owned()],
        ..Options::default()
    };
    let web = Pod::new("in", "web")
        .on("b")
        .runs(nginx(&[PORT], "hello"))
        .port(None, PORT);
    let all = [
        manifest::two_nodes(),
        manifest::namespace("in", Some("ambient")),
        Pod::new("in", "client").on("a").into(),
        web.into(),
    ];
    let lab = Lab::up(manifest::all(all), options).unwrap();
    let to = url(lab.pod_ip("web", IpFamily::V4).unwrap(), PORT);
    curl(&lab, &Location::pod("client"), &to, &[]).unwrap();
    let access = lab
        .wait_until("a line of the access log", Duration::from_secs(5), || {
            let log = lab.daemon_log("a").ok()?;
            log.lines()
                .find(|line| line.contains("\"scope\":\"access\""))
                .map(str::to_owned)
        })
        .unwrap();
    for line in lab.daemon_log("a").unwrap().lines() {
        let object: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["level", "time", "scope", "message"] {
            assert!(object[key].is_string(), "no {key} in {line}");
        }
    }
    let object: serde_json::Value = serde_json::from_str(&access).unwrap();
    assert_eq!(
        object["src.identity"],
        "spiffe://cluster.local/ns/in/sa/client"
    );
    assert_eq!(object["direction"], "outbound");
    assert!(object["bytes_sent"].is_u64(), "{access}");
}
