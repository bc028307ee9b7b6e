//! The exact metrics and access-log lines.

use std::time::Duration;

use hbone::Authority;
use mesh::{
    Affinity, Distribution, Health, Load, Locality, Mode, PolicySet, Service, Workload,
    WorkloadType,
};

use super::*;

pub(crate) fn workload(namespace: &str, name: &str) -> Arc<Workload> {
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{name}");
    Arc::new(Workload {
        uid: WorkloadUid::of_pod("Kubernetes", namespace, &format!("{name}-0"), "1234"),
        name: format!("{name}-0").into(),
        namespace: namespace.into(),
        service_account: name.into(),
        identity: SpiffeId::new(&identity).unwrap(),
        ips: vec!["10.0.0.1".parse().unwrap()],
        node: "a".into(),
        locality: Locality {
            region: "r1".into(),
            zone: "z1".into(),
            subzone: "".into(),
        },
        host_network: false,
        mode: Mode::Mesh,
        health: Health::default(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_type: WorkloadType::Deployment,
        workload_name: name.into(),
        app: "".into(),
        version: "".into(),
        cluster: "Kubernetes".into(),
        probe_ports: vec![],
        ports: vec![],
        services: vec![],
        labels: Arc::default(),
        policies: PolicySet::default(),
        kube_uid: "1234".into(),
        load: Load::default(),
    })
}

pub(crate) fn service(namespace: &str, name: &str) -> Arc<Service> {
    Arc::new(Service {
        namespace: namespace.into(),
        name: name.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        vips: vec![],
        external: vec![],
        ports: vec![],
        endpoints: vec![],
        affinity: Affinity::None,
        distribution: Distribution::Any,
        node_local: false,
        publish_not_ready: false,
    })
}

fn mutual_tls(reporter: Direction) -> ConnectionLabels {
    let source = workload("shop", "web");
    ConnectionLabels {
        reporter,
        source_identity: Some(Arc::new(source.identity.clone())),
        source: Some(source),
        destination: Some(workload("shop", "cart")),
        service: Some(service("shop", "cart")),
        mutual_tls: true,
    }
}

fn plain_to_unknown() -> ConnectionLabels {
    ConnectionLabels {
        reporter: Direction::Outbound,
        source: Some(workload("shop", "web")),
        source_identity: None,
        destination: None,
        service: None,
        mutual_tls: false,
    }
}

fn traffic(telemetry: &Telemetry) -> Vec<String> {
    let text = telemetry.scrape().unwrap();
    text.lines()
        .filter(|line| line.starts_with("istio_tcp_") && !line.contains("sockets"))
        .map(Into::into)
        .collect()
}

#[tokio::test]
async fn connection_counts_under_istios_metric_names_and_labels() {
    let telemetry = Arc::new(Telemetry::new(None).unwrap());
    let worker = WorkerTelemetry::new(telemetry.clone());
    let series = worker.traffic_series(&mutual_tls(Direction::Inbound));
    series.record_opened();
    series.add_bytes(10, 2000);
    series.record_closed();
    series.record_failure(ResponseFlags::Connect);
    let labels = |flags: &str| {
        format!(
            "reporter=\"destination\",source_workload=\"web\",source_canonical_service=\"web\",\
             source_canonical_revision=\"v1\",source_workload_namespace=\"shop\",\
             source_principal=\"spiffe://cluster.local/ns/shop/sa/web\",source_app=\"web\",\
             source_version=\"v1\",source_cluster=\"Kubernetes\",\
             destination_service=\"cart.shop.svc.cluster.local\",\
             destination_service_namespace=\"shop\",destination_service_name=\"cart\",\
             destination_workload=\"cart\",destination_canonical_service=\"cart\",\
             destination_canonical_revision=\"v1\",destination_workload_namespace=\"shop\",\
             destination_principal=\"spiffe://cluster.local/ns/shop/sa/cart\",\
             destination_app=\"cart\",destination_version=\"v1\",\
             destination_cluster=\"Kubernetes\",request_protocol=\"tcp\",\
             response_flags=\"{flags}\",connection_security_policy=\"mutual_tls\",\
             source_region=\"r1\",source_zone=\"z1\",destination_region=\"r1\",\
             destination_zone=\"z1\""
        )
    };
    let (ok, failed) = (labels("-"), labels("CONNECT"));
    assert_eq!(
        traffic(&telemetry),
        [
            format!("istio_tcp_connections_closed_total{{{ok}}} 1"),
            format!("istio_tcp_connections_failed_total{{{failed}}} 1"),
            format!("istio_tcp_connections_opened_total{{{ok}}} 1"),
            format!("istio_tcp_received_bytes_total{{{ok}}} 10"),
            format!("istio_tcp_sent_bytes_total{{{ok}}} 2000"),
        ]
    );
}

#[tokio::test]
async fn unknown_values_have_istios_unknown_label() {
    let telemetry = Arc::new(Telemetry::new(None).unwrap());
    WorkerTelemetry::new(telemetry.clone())
        .traffic_series(&plain_to_unknown())
        .record_opened();
    let line = traffic(&telemetry)
        .into_iter()
        .find(|line| line.contains("opened"))
        .unwrap();
    for label in [
        "reporter=\"source\"",
        "source_workload=\"web\"",
        "source_principal=\"unknown\"",
        "destination_service=\"unknown\"",
        "destination_workload=\"unknown\"",
        "destination_principal=\"unknown\"",
        "connection_security_policy=\"unknown\"",
        "destination_zone=\"unknown\"",
    ] {
        assert!(line.contains(label), "{label} is not in {line}");
    }
}

#[tokio::test]
async fn dashboard_metrics_exist_before_the_first_connection() {
    let telemetry = Arc::new(Telemetry::new(None).unwrap());
    let _worker = WorkerTelemetry::new(telemetry.clone());
    telemetry.record_enrolment(&[("enrolled", 3), ("pending", 1)]);
    telemetry.record_capture_repair("rules_missing");
    telemetry.record_problems(2);
    let text = telemetry.scrape().unwrap();
    for line in [
        "istio_build{component=\"ztunnel\",tag=\"",
        "istio_tcp_sockets_open{reporter=\"destination\"} 0",
        "istio_tcp_sockets_open{reporter=\"source\"} 0",
        "process_open_fds ",
        "process_max_fds ",
        "process_resident_memory_bytes ",
        "tokio_num_workers 1",
        "tokio_num_alive_tasks ",
        "tokio_global_queue_depth ",
        "tokio_worker_park_count_total{worker=\"0\"}",
        "workload_manager_active_proxy_count 3",
        "workload_manager_pending_proxy_count 1",
        "workload_manager_proxies_started_total 0",
        "ambit_enrolment_pods{state=\"enrolled\"} 3",
        "ambit_capture_repairs_total{reason=\"rules_missing\"} 1",
        "ambit_configuration_problems 2",
        "ambit_log_lines_dropped_total 0",
    ] {
        assert!(
            text.lines().any(|found| found.starts_with(line)),
            "{line} is not in\n{text}"
        );
    }
}

#[tokio::test]
async fn same_labels_share_one_series() {
    let worker = WorkerTelemetry::new(Arc::new(Telemetry::new(None).unwrap()));
    let labels = mutual_tls(Direction::Outbound);
    let first = worker.traffic_series(&labels);
    assert!(Arc::ptr_eq(&first, &worker.traffic_series(&labels)));
    // Another version of the same objects has the same labels.
    assert!(Arc::ptr_eq(
        &first,
        &worker.traffic_series(&mutual_tls(Direction::Outbound))
    ));
    // Another verified identity is another label.
    let mut other = labels;
    let identity = SpiffeId::new("spiffe://cluster.local/ns/shop/sa/other").unwrap();
    other.source_identity = Some(Arc::new(identity));
    assert!(!Arc::ptr_eq(&first, &worker.traffic_series(&other)));
}

#[tokio::test]
async fn unused_series_leave_the_scrape_and_used_ones_stay() {
    let telemetry = Arc::new(Telemetry::new(None).unwrap());
    let worker = WorkerTelemetry::new(telemetry.clone());
    let used = worker.traffic_series(&plain_to_unknown());
    let labels = mutual_tls(Direction::Outbound);
    worker.traffic_series(&labels);
    worker.remove_workload(&labels.destination.as_ref().unwrap().uid);
    worker.clear_cache();
    for _ in 0..MAX_IDLE_SWEEPS {
        telemetry.sweep();
    }
    used.record_opened();
    let lines = traffic(&telemetry);
    assert!(
        lines
            .iter()
            .all(|line| line.contains("destination_workload=\"unknown\"")),
        "{lines:?}"
    );
    assert!(!lines.is_empty());
}

fn access_line(labels: &ConnectionLabels, format: LogFormat) -> String {
    let authority: Authority = "10.0.0.2:80".parse().unwrap();
    let line = AccessLogEntry {
        labels,
        source: "10.0.0.1:40000".parse().unwrap(),
        destination: "10.0.0.2:15008".parse().unwrap(),
        hbone: Some(&authority),
        sent: 67,
        received: 490,
        duration: Duration::from_micros(12_345),
        error: None,
        reason: "closed",
        policy: None,
    }
    .line(format);
    line.trim_end().to_owned()
}

#[test]
fn access_log_has_istios_fields_in_istios_order_and_the_reason() {
    let line = access_line(&mutual_tls(Direction::Outbound), LogFormat::Plain);
    let (time, rest) = line.split_once('\t').unwrap();
    assert!(
        time.ends_with('Z') && time.len() == "2026-01-02T03:04:05.000006Z".len(),
        "{time}"
    );
    assert_eq!(
        rest,
        "info\taccess\tconnection complete\tsrc.addr=10.0.0.1:40000 src.workload=\"web-0\" \
         src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/web\" \
         src.cluster=\"Kubernetes\" dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 \
         dst.service=\"cart.shop.svc.cluster.local\" dst.workload=\"cart-0\" \
         dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/cart\" \
         dst.cluster=\"Kubernetes\" direction=\"outbound\" bytes_sent=67 bytes_recv=490 \
         duration=\"12ms\" reason=\"closed\""
    );
}

#[test]
fn inbound_access_log_counts_bytes_from_the_pods_side() {
    let line = access_line(&mutual_tls(Direction::Inbound), LogFormat::Json);
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["direction"], "inbound");
    assert_eq!(line["bytes_sent"], 490);
    assert_eq!(line["bytes_recv"], 67);
    assert_eq!(line["scope"], "access");
    assert_eq!(line["dst.hbone_addr"], "10.0.0.2:80");
}

#[test]
fn failed_connection_is_logged_at_error_level_with_text_and_code() {
    let labels = plain_to_unknown();
    let line = AccessLogEntry {
        labels: &labels,
        source: "10.0.0.1:40000".parse().unwrap(),
        destination: "10.9.9.9:80".parse().unwrap(),
        hbone: None,
        sent: 0,
        received: 0,
        duration: Duration::ZERO,
        error: Some(&"cannot connect to 10.9.9.9:80"),
        reason: "connect_refused",
        policy: None,
    }
    .line(LogFormat::Plain);
    let (_, rest) = line.trim_end().split_once('\t').unwrap();
    assert_eq!(
        rest,
        "error\taccess\tconnection complete\tsrc.addr=10.0.0.1:40000 src.workload=\"web-0\" \
         src.namespace=\"shop\" src.cluster=\"Kubernetes\" dst.addr=10.9.9.9:80 \
         direction=\"outbound\" bytes_sent=0 bytes_recv=0 duration=\"0ms\" \
         error=\"cannot connect to 10.9.9.9:80\" reason=\"connect_refused\""
    );
}

#[test]
fn denied_connection_names_its_policy_last() {
    let labels = mutual_tls(Direction::Inbound);
    let line = AccessLogEntry {
        labels: &labels,
        source: "10.0.0.1:40000".parse().unwrap(),
        destination: "10.0.0.2:15008".parse().unwrap(),
        hbone: None,
        sent: 0,
        received: 0,
        duration: Duration::ZERO,
        error: Some(&"denied by AuthorizationPolicy shop/deny"),
        reason: "policy_denied",
        policy: Some("AuthorizationPolicy shop/deny"),
    }
    .line(LogFormat::Plain);
    assert!(
        line.trim_end().ends_with(
            "error=\"denied by AuthorizationPolicy shop/deny\" reason=\"policy_denied\" \
             policy=\"AuthorizationPolicy shop/deny\""
        ),
        "{line}"
    );
}

#[tokio::test]
async fn dry_run_denials_count_apart_from_denials() {
    let telemetry = Arc::new(Telemetry::new(None).unwrap());
    let worker = WorkerTelemetry::new(telemetry.clone());
    worker.record_denial(&"AuthorizationPolicy shop/deny".into());
    worker.record_dry_run_denial(&"AuthorizationPolicy shop/dry-run".into());
    let text = telemetry.scrape().unwrap();
    for line in [
        "ambit_policy_denials_total{policy=\"AuthorizationPolicy shop/deny\"} 1",
        "ambit_policy_dry_run_denials_total{policy=\"AuthorizationPolicy shop/dry-run\"} 1",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "{line} is not in\n{text}"
        );
    }
}
