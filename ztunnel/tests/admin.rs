//! The admin and metrics ports, over HTTP.
// A failed step ends the test with the message of its `expect`.
#![allow(clippy::expect_used)]

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use mesh::certs::{Certificates, CertificatesConfig, LocalCa};
use mesh::{Store, WorkloadUid};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use ztunnel::admin::{self, Admin, WorkloadState};
use ztunnel::dataplane::{
    DataPlane, DataPlaneConfig, MAX_CONNECTIONS_PER_POD, MAX_HANDSHAKES_PER_POD,
};
use ztunnel::identity::Identities;
use ztunnel::telemetry::{Log, LogConfig, LogFormat, Telemetry};

fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    (listener, address)
}

/// Status and body of one request.
async fn request(to: SocketAddr, method: &str, target: &str) -> (u16, String) {
    let head = format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let text = send(to, head.as_bytes()).await;
    let status = text
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    let (_, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    (status.expect("a status"), body.to_owned())
}

/// Sends bytes and returns the response.
async fn send(to: SocketAddr, bytes: &[u8]) -> String {
    let exchange = async {
        let mut stream = TcpStream::connect(to).await.expect("an open port");
        stream.write_all(bytes).await.expect("an open connection");
        let mut text = String::new();
        // The server may reset a malformed request; the response before the reset counts.
        let _ = stream.read_to_string(&mut text).await;
        text
    };
    timeout(Duration::from_secs(20), exchange)
        .await
        .expect("a response in time")
}

/// One test for all endpoints, because a process can install its log only once.
#[tokio::test]
async fn admin_and_metrics_ports_serve_their_endpoints() {
    let levels = LogConfig {
        format: LogFormat::Json,
        filter: "warn".into(),
    };
    let (log, _guard) = Log::install(&levels).expect("the first log");
    let telemetry = Arc::new(Telemetry::new(Some(log.clone())).expect("metric names are unique"));
    let folder = tempfile::tempdir().expect("a folder");
    let ca = LocalCa::create(folder.path()).expect("a certificate authority");
    let (certificates, renewal) = Certificates::new(Arc::new(ca), CertificatesConfig::default());
    let identities = Identities::new(certificates, hbone::Revocations::none());
    let store = Store::new();
    let config = DataPlaneConfig {
        workers: 1,
        max_connections_per_pod: MAX_CONNECTIONS_PER_POD,
        max_handshakes_per_pod: MAX_HANDSHAKES_PER_POD,
        identities: identities.clone(),
        trust_domain_aliases: vec![],
        tunnel_max_age: std::time::Duration::from_secs(3600),
        readiness: None,
    };
    let data_plane = DataPlane::start(config, store.clone(), telemetry.clone()).expect("a thread");
    let data_plane = Arc::new(data_plane);
    let (quit, stop) = (CancellationToken::new(), CancellationToken::new());
    let admin = Admin {
        store,
        data_plane: data_plane.clone(),
        identities: identities.clone(),
        log,
        workloads: Box::new(|| vec![pending()]),
        config: json!({ "node": "a" }),
        quit: quit.clone(),
    };
    let ((listener, to), (stats_listener, stats)) = (listen(), listen());
    let local = LocalSet::new();
    let mut tasks = JoinSet::new();
    tasks.spawn_local_on(admin::serve(listener, admin, stop.clone()), &local);
    tasks.spawn_local_on(
        admin::serve_metrics(stats_listener, telemetry.clone(), stop.clone()),
        &local,
    );
    tasks.spawn_local_on(renewal.run(stop.clone()), &local);
    let stopped = stop.clone();
    tasks.spawn_local_on(
        async move { identities.run(&telemetry, stopped).await },
        &local,
    );
    local
        .run_until(async {
            pages(to).await;
            logging(to).await;
            metrics(stats).await;
            malformed_requests(to).await;
            assert_eq!(request(to, "GET", "/quitquitquit").await.0, 405);
            assert!(!quit.is_cancelled());
            assert_eq!(request(to, "POST", "/quitquitquit").await.0, 200);
            assert!(quit.is_cancelled());
            stop.cancel();
            while tasks.join_next().await.is_some() {}
            data_plane.drain(Duration::ZERO).await;
        })
        .await;
}

fn pending() -> WorkloadState {
    WorkloadState {
        uid: WorkloadUid::of_pod("Kubernetes", "shop", "web-0", "1234"),
        state: "pending",
        reason: Some("its network namespace does not exist yet".into()),
        since: std::time::SystemTime::UNIX_EPOCH,
        name: "web-0".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        trust_domain: "cluster.local".into(),
    }
}

async fn pages(to: SocketAddr) {
    assert_eq!(request(to, "GET", "/").await.0, 200);
    assert_eq!(request(to, "GET", "/nothing").await.0, 404);
    let (status, dump) = request(to, "GET", "/config_dump").await;
    assert_eq!(status, 200);
    let dump: Value = serde_json::from_str(&dump).expect("JSON");
    for key in [
        "workloads",
        "services",
        "policies",
        "certificates",
        "workloadState",
        "version",
    ] {
        assert!(dump.get(key).is_some(), "{key} is not in {dump}");
    }
    assert_eq!(dump["config"], json!({ "node": "a" }));
    let state = &dump["workloadState"]["Kubernetes//Pod/shop/web-0/1234"];
    assert_eq!(state["state"], "pending");
    assert_eq!(state["reason"], "its network namespace does not exist yet");
    assert_eq!(
        state["connections"],
        json!({ "inbound": [], "outbound": [] })
    );
    assert_eq!(state["info"]["serviceAccount"], "web");
}

async fn logging(to: SocketAddr) {
    let level = async |target: &str| request(to, "POST", target).await;
    assert_eq!(
        level("/logging").await,
        (200, "current log level is warn\n".into())
    );
    assert_eq!(
        level("/logging?level=debug").await,
        (200, "current log level is debug\n".into())
    );
    assert_eq!(level("/logging?level=a=b=c").await.0, 400);
    assert_eq!(
        level("/logging").await,
        (200, "current log level is debug\n".into())
    );
    assert_eq!(
        level("/logging?reset").await,
        (200, "current log level is warn\n".into())
    );
    assert_eq!(request(to, "GET", "/logging?level=debug").await.0, 405);
}

async fn metrics(to: SocketAddr) {
    for target in ["/metrics", "/stats/prometheus"] {
        let (status, text) = request(to, "GET", target).await;
        assert_eq!(status, 200);
        assert!(text.contains("istio_build{component=\"ztunnel\""), "{text}");
    }
    assert_eq!(request(to, "GET", "/config_dump").await.0, 404);
    assert_eq!(request(to, "POST", "/metrics").await.0, 405);
}

/// A malformed or oversized request affects its own connection only.
async fn malformed_requests(to: SocketAddr) {
    let many = "a: b\r\n".repeat(1000);
    let long = format!("GET / HTTP/1.1\r\na: {}\r\n\r\n", "b".repeat(100_000));
    let flood = format!("GET / HTTP/1.1\r\n{many}\r\n");
    for bytes in ["\u{0}\u{1}garbage\r\n\r\n", "GET\r\n\r\n", &long, &flood] {
        let response = send(to, bytes.as_bytes()).await;
        assert!(!response.contains("200 OK"), "{response}");
    }
    assert_eq!(request(to, "GET", "/").await.0, 200);
}
