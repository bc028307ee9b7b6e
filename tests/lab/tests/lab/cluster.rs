//! The cluster without a mesh: networks, DNS names, kube-proxy, probes, pod lifecycle.

#![expect(clippy::unwrap_used, reason = "test helpers")]

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use lab::{IpFamily, Lab, Location, Options, TlsBytes};

const NODES_AND_PODS: &str = "\
{apiVersion: v1, kind: Node, metadata: {name: a}}
---
{apiVersion: v1, kind: Node, metadata: {name: b}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ipFamilyPolicy: PreferDualStack, ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: all, namespace: shop}
spec: {selector: {app: web}, clusterIP: None, ipFamilyPolicy: PreferDualStack, ports: [{port: 8080}]}
---
{apiVersion: v1, kind: Service, metadata: {name: empty, namespace: shop}, spec: {selector: {app: x}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop}, spec: {nodeName: a, containers: [{name: c, command: [sleep, infinity]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: other}, spec: {nodeName: b, containers: [{name: c, command: [sleep, infinity]}]}}
";

const SECOND: Duration = Duration::from_secs(1);

/// For events that take milliseconds on an idle machine.
const TIMEOUT: Duration = Duration::from_secs(15);

/// A pod that responds to each connection with its own name and the client's address.
fn server(name: &str, node: &str, more: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: web}}}}
spec:
  nodeName: {node}
  containers:
  - name: web
    command: [socat, 'TCP6-LISTEN:8080,fork,reuseaddr,ipv6only=0', 'SYSTEM:echo $HOSTNAME $SOCAT_PEERADDR']
    ports: [{{name: http, containerPort: 8080}}]
    readinessProbe: {{tcpSocket: {{port: http}}}}
{more}"
    )
}

fn options() -> Options {
    let bin_dir = PathBuf::from(env!("CARGO_BIN_EXE_lab"))
        .parent()
        .map(Into::into);
    Options {
        bin_dir,
        ..Options::without_daemons()
    }
}

fn up(manifests: &str) -> Lab {
    Lab::up(manifests, options()).unwrap()
}

/// Connects to a server from a location and returns what it sends.
fn connect(lab: &Lab, location: &Location, to: &str) -> String {
    let cmd = [
        "socat",
        "-T10",
        "-",
        &format!("TCP:{to},connect-timeout=10"),
    ];
    lab.exec_in(location, &cmd, TIMEOUT).unwrap().ok().unwrap()
}

#[test]
fn pods_reach_each_other_with_their_own_addresses() {
    let lab = up(&(NODES_AND_PODS.to_owned() + &server("near", "a", "") + &server("far", "b", "")));
    for family in IpFamily::ALL {
        for (pod, name) in [("near", "near"), ("far", "far")] {
            for client in ["client", "other"] {
                let to = std::net::SocketAddr::new(lab.pod_ip(pod, family).unwrap(), 8080);
                let response = connect(&lab, &Location::pod(client), &to.to_string());
                let (server, seen) = response.trim().split_once(' ').unwrap();
                assert_eq!(server, name);
                assert_eq!(
                    address(seen),
                    lab.pod_ip(client, family).unwrap(),
                    "{client} to {pod}"
                );
            }
        }
    }
}

/// Parses socat's form: `[fd00:0010:...]`, and for IPv4 on an IPv6 socket `[0000:...:ffff:0af4:0102]`.
fn address(text: &str) -> IpAddr {
    let ip: IpAddr = text.trim_matches(['[', ']']).parse().unwrap();
    ip.to_canonical()
}

#[test]
fn service_names_resolve_and_follow_pods() {
    let lab = up(&(NODES_AND_PODS.to_owned() + &server("one", "a", "")));
    let client = Location::pod("client");
    for name in [
        "web",
        "web.shop",
        "web.shop.svc",
        "web.shop.svc.cluster.local",
    ] {
        assert!(
            connect(&lab, &client, &format!("{name}:80")).starts_with("one "),
            "{name}"
        );
    }
    // A running process resolves a pod that is created later: its hosts file is changed in place.
    let mut shell = lab.spawn("client", &["sh"]).unwrap();
    let address = |lab: &Lab, pod| lab.pod_ip(pod, IpFamily::V4).unwrap().to_string();
    shell.write(b"getent ahostsv4 all; echo first.\n").unwrap();
    shell.wait_stdout("first.", TIMEOUT).unwrap();
    lab.apply(server("two", "b", "")).unwrap();
    lab.wait_ready().unwrap();
    shell.write(b"getent ahostsv4 all; echo second.\n").unwrap();
    shell.wait_stdout("second.", TIMEOUT).unwrap();
    let output = String::from_utf8(shell.stdout()).unwrap();
    let (before, after) = output.split_once("first.").unwrap();
    assert!(
        before.contains(&address(&lab, "one")) && !before.contains(&address(&lab, "two")),
        "{output}"
    );
    assert!(
        after.contains(&address(&lab, "one")) && after.contains(&address(&lab, "two")),
        "{output}"
    );
    assert_eq!(
        lab.exec("client", &["getent", "hosts", "nowhere.example"])
            .unwrap()
            .code,
        2
    );
}

#[test]
fn cluster_ip_reaches_ready_endpoints_from_pods_and_nodes() {
    let lab = up(&(NODES_AND_PODS.to_owned() + &server("near", "a", "") + &server("far", "b", "")));
    for location in [
        Location::pod("client"),
        Location::pod("other"),
        Location::node("a"),
    ] {
        for family in IpFamily::ALL {
            let vip = lab.service_ip("shop/web", family).unwrap();
            let to = std::net::SocketAddr::new(vip, 80).to_string();
            let mut responses: Vec<String> =
                (0..32).map(|_| connect(&lab, &location, &to)).collect();
            responses.sort();
            let servers: std::collections::BTreeSet<_> = responses
                .iter()
                .filter_map(|response| response.split(' ').next())
                .collect();
            // Each is one of two at random: all 32 are the same once in 2^31 runs.
            assert_eq!(
                servers.into_iter().collect::<Vec<_>>(),
                ["far", "near"],
                "{location} {family:?}"
            );
        }
    }
}

#[test]
fn service_without_endpoints_refuses_connections() {
    let lab = up(NODES_AND_PODS);
    let vip = lab
        .service_ip("shop/empty", IpFamily::V4)
        .unwrap()
        .to_string();
    let output = lab
        .exec("client", &["curl", "-sS", "--max-time", "5", &vip])
        .unwrap();
    assert_eq!(output.code, 7, "{}", output.stderr);
}

#[test]
fn pod_is_an_endpoint_only_while_its_readiness_probe_succeeds() {
    let file = "    env: [{name: X, value: y}]\n";
    let exec = server("slow", "a", file).replace(
        "tcpSocket: {port: http}",
        "exec: {command: [test, -e, go]}, periodSeconds: 1, failureThreshold: 1",
    );
    let lab = Lab::up(
        NODES_AND_PODS.to_owned() + &exec,
        Options {
            wait_until_ready: false,
            ..options()
        },
    )
    .unwrap();
    let is_running =
        |status: &lab::Status| status.pod("slow").is_ok_and(|pod| pod.phase == "Running");
    let status = lab.wait_status("slow to run", TIMEOUT, is_running).unwrap();
    assert!(!status.pod("slow").unwrap().ready);
    let endpoints = |status: &lab::Status| {
        status
            .services
            .iter()
            .find(|s| s.name == "web")
            .map(|s| s.endpoints.len())
            .unwrap()
    };
    assert_eq!(endpoints(&status), 0);
    lab.exec("slow", &["touch", "go"]).unwrap();
    lab.wait_status("an endpoint", TIMEOUT, |status| endpoints(status) == 2)
        .unwrap();
    lab.exec("slow", &["rm", "go"]).unwrap();
    lab.wait_status("no endpoint", TIMEOUT, |status| endpoints(status) == 0)
        .unwrap();
}

#[test]
fn probes_are_sent_from_the_nodes_address() {
    let often = server("web", "a", "").replace("{port: http}}", "{port: http}, periodSeconds: 1}");
    assert!(often.contains("periodSeconds"));
    let lab = up(&(NODES_AND_PODS.to_owned() + &often));
    let IpAddr::V4(node) = lab.node_ip("a", IpFamily::V4).unwrap() else {
        panic!("not IPv4");
    };
    let filter = format!("tcp dst port 8080 and src host {node}");
    let capture = lab.capture(Location::pod("web"), &filter).unwrap();
    let probed = || (capture.packet_count().ok()? > 0).then_some(());
    lab.wait_until("a probe from the node", TIMEOUT, probed)
        .unwrap();
}

#[test]
fn failed_liveness_probe_restarts_the_program() {
    let probe = "    livenessProbe: {exec: {command: [test, -e, alive]}, periodSeconds: 1, failureThreshold: 1}";
    let lab = up(&(NODES_AND_PODS.to_owned() + &server("web", "a", probe)));
    let has_restarted = |status: &lab::Status| status.pod("web").is_ok_and(|pod| pod.restarts > 0);
    lab.wait_status("a restart", TIMEOUT, has_restarted)
        .unwrap();
}

#[test]
fn deletion_is_graceful_and_frees_the_address() {
    let script = "trap \"echo bye; exit 0\" TERM; echo up; while :; do sleep 0.05; done";
    let pod = |name: &str, ip: &str| {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, annotations: {{lab.ambit.dev/ip: {ip}}}}},
               spec: {{nodeName: a, containers: [{{name: c, command: [sh, -c, '{script}']}}]}}}}"
        )
    };
    let lab = up(NODES_AND_PODS);
    lab.apply(pod("first", "10.244.1.77")).unwrap();
    lab.wait_ready().unwrap();
    lab.wait_until("its log", TIMEOUT, || {
        lab.pod_log("first").ok()?.contains("up").then_some(())
    })
    .unwrap();
    let before = lab.netns(&Location::pod("first")).unwrap();
    assert!(lab.apply(pod("second", "10.244.1.77")).is_err());
    lab.delete("Pod", "first").unwrap();
    assert!(!PathBuf::from("/run/netns").join(&before).exists());
    lab.apply(pod("first", "10.244.1.77")).unwrap();
    lab.wait_ready().unwrap();
    assert_eq!(
        lab.pod_ip("first", IpFamily::V4).unwrap().to_string(),
        "10.244.1.77"
    );
    assert_ne!(lab.netns(&Location::pod("first")).unwrap(), before);
    let log = || {
        lab.pod_log("first")
            .ok()?
            .starts_with("up\nbye\nup")
            .then_some(())
    };
    lab.wait_until("the log of both pods", TIMEOUT, log)
        .unwrap();
}

#[test]
fn fabric_capture_has_only_traffic_between_nodes() {
    let lab = up(&(NODES_AND_PODS.to_owned() + &server("near", "a", "") + &server("far", "b", "")));
    let bridge = lab.capture(Location::Fabric, "").unwrap();
    let node = lab.capture(Location::node("a"), "tcp").unwrap();
    let to = |pod| format!("{}:8080", lab.pod_ip(pod, IpFamily::V4).unwrap());
    connect(&lab, &Location::pod("client"), &to("near"));
    assert_eq!(bridge.occurrences("near 1").unwrap(), 0);
    assert!(node.occurrences("near ").unwrap() > 0);
    connect(&lab, &Location::pod("client"), &to("far"));
    assert!(bridge.occurrences("far ").unwrap() > 0);
    assert!(bridge.tcp_bytes(8080).unwrap() > 0);
    assert_eq!(bridge.tls_bytes(8080).unwrap(), TlsBytes::default());
}

#[test]
fn refused_manifest_changes_nothing() {
    let lab = up(NODES_AND_PODS);
    let good = "{apiVersion: v1, kind: Namespace, metadata: {name: new}}";
    let bad = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: c}]}}";
    let error = lab
        .apply(format!("{good}\n---\n{bad}"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("Pod default/p: container c: command is missing"),
        "{error}"
    );
    assert!(!lab.source_folder().join("namespace.new.yaml").exists());
}

#[test]
fn dropped_process_handle_kills_the_program() {
    let lab = up(NODES_AND_PODS);
    let process = lab
        .spawn("client", &["sh", "-c", "sleep 100 & echo started; wait"])
        .unwrap();
    process.wait_stdout("started", TIMEOUT).unwrap();
    let pid = process.id();
    drop(process);
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
    let late = lab
        .exec_in(&Location::pod("client"), &["sleep", "100"], SECOND / 10)
        .unwrap_err();
    assert!(
        format!("{late:#}").contains("still running after 100ms"),
        "{late:#}"
    );
}

#[test]
fn pod_has_only_its_annotated_families() {
    let pod = |name: &str, families: &str| {
        format!(
            "\n---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, annotations: {{lab.ambit.dev/ip-families: {families}}}}},
               spec: {{nodeName: a, containers: [{{name: c, command: [socat, 'TCP6-LISTEN:80,fork,ipv6only=0', 'SYSTEM:echo {name}'],
               startupProbe: {{tcpSocket: {{port: 80}}}}}}]}}}}"
        )
    };
    let four = pod("four", "IPv4").replace("TCP6-LISTEN:80,fork,ipv6only=0", "TCP-LISTEN:80,fork");
    let lab = up(&(NODES_AND_PODS.to_owned() + &four + &pod("six", "IPv6")));
    assert!(lab.pod_ip("four", IpFamily::V6).is_err() && lab.pod_ip("six", IpFamily::V4).is_err());
    for (name, family) in [("four", IpFamily::V4), ("six", IpFamily::V6)] {
        let to = std::net::SocketAddr::new(lab.pod_ip(name, family).unwrap(), 80);
        assert_eq!(
            connect(&lab, &Location::pod("other"), &to.to_string()),
            format!("{name}\n")
        );
        assert_eq!(
            lab.capture(Location::pod(name), "tcp")
                .unwrap()
                .packet_count()
                .unwrap(),
            0
        );
    }
}

#[test]
fn program_that_ignores_sigterm_is_killed_after_the_grace_period() {
    let lab = up(NODES_AND_PODS);
    lab.apply(
        "{apiVersion: v1, kind: Pod, metadata: {name: stubborn}, spec: {containers: [
           {name: c, command: [sh, -c, \"trap '' TERM; echo trapped; while :; do sleep 0.1; done\"]}]}}",
    )
    .unwrap();
    // A ready program runs, but may not have set its trap yet.
    let is_trapped = || {
        lab.pod_log("stubborn")
            .ok()?
            .contains("trapped")
            .then_some(())
    };
    lab.wait_until("the program's trap", TIMEOUT, is_trapped)
        .unwrap();
    let started = std::time::Instant::now();
    lab.delete_pod_with_grace("stubborn", SECOND).unwrap();
    assert!(
        started.elapsed() >= SECOND,
        "killed after {:?}",
        started.elapsed()
    );
    assert!(lab.status().unwrap().pod("stubborn").is_err());
}

#[test]
fn fabric_outside_the_cluster_reaches_pods() {
    let lab = up(&(NODES_AND_PODS.to_owned() + &server("web", "a", "")));
    for family in IpFamily::ALL {
        let to = std::net::SocketAddr::new(lab.pod_ip("web", family).unwrap(), 8080);
        assert!(connect(&lab, &Location::Fabric, &to.to_string()).starts_with("web "));
    }
}
