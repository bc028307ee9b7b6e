//! Which pods are in the mesh: labels, their precedence, and changes at run time.

use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::detector::Detector;
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::open_connections::OpenConnections;
use ambit_e2e::programs::{PORT, greeter};
use lab::{IpFamily, Lab, Options};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(10);

/// Namespace, pod, and whether the pod must be in the mesh.
const PRECEDENCE: &[(&str, &str, bool)] = &[
    ("ambient", "unlabelled", true),
    ("ambient", "none", false),
    ("ambient", "ambient", true),
    ("unset", "unlabelled", false),
    ("unset", "none", false),
    ("unset", "ambient", true),
    ("none", "unlabelled", false),
    ("none", "ambient", true),
    // A host-network pod has no network namespace of its own to capture.
    ("ambient", "host", false),
    // A pod with a sidecar is captured already.
    ("ambient", "sidecar", false),
    // Pods of kube-system are captured only with a label of their own.
    ("kube-system", "unlabelled", false),
];

fn precedence_manifests() -> String {
    let mut all = vec![
        manifest::two_nodes(),
        manifest::namespace("ambient", Some("ambient")),
        manifest::namespace("unset", None),
        manifest::namespace("none", Some("none")),
        manifest::namespace("kube-system", Some("ambient")),
    ];
    for (namespace, name, _) in PRECEDENCE {
        let pod = Pod::new(namespace, name).on("a");
        let pod = match *name {
            "none" | "ambient" => pod.label("istio.io/dataplane-mode", name),
            "host" => pod.spec("hostNetwork", true),
            "sidecar" => pod.metadata("annotations", json!({"sidecar.istio.io/status": "{}"})),
            _ => pod,
        };
        all.push(pod.into());
    }
    manifest::all(all)
}

/// Whether the pod's network namespace has the daemon's nft table.
fn is_captured(lab: &Lab, pod: &str) -> bool {
    lab.exec(pod, &["nft", "list", "tables"])
        .unwrap()
        .ok()
        .unwrap()
        .contains("table inet ambit")
}

#[test]
fn pod_and_namespace_labels_have_istios_precedence() {
    let lab = Lab::up(precedence_manifests(), Options::default()).unwrap();
    let dump = lab.config_dump("a").unwrap();
    let status = lab.status().unwrap();
    let mut failures = Vec::new();
    for (namespace, name, meshed) in PRECEDENCE {
        let pod = status.pod(&format!("{namespace}/{name}")).unwrap();
        let state = dump["workloadState"].get(pod.workload_uid("Kubernetes"));
        let enrolled = state.is_some_and(|state| state["state"] == "enrolled");
        // The host-network pod's namespace is the node's, which has the guard table but no capture.
        let captured = is_captured(&lab, &format!("{namespace}/{name}")) && *name != "host";
        if enrolled != *meshed || captured != *meshed {
            failures.push(format!(
                "{namespace}/{name}: enrolled {enrolled}, captured {captured}, expected {meshed}"
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A client on node `a` and a greeter on node `b`, in a namespace that is not in the mesh.
fn lab() -> Lab {
    let server = Pod::new("shop", "server")
        .on("b")
        .runs(greeter(PORT, "hi"))
        .port(None, PORT);
    let client = Pod::new("shop", "client").on("a").into();
    let all = [
        manifest::two_nodes(),
        manifest::namespace("shop", None),
        client,
        server.into(),
    ];
    Lab::up(manifest::all(all), Options::default()).unwrap()
}

/// Sets or removes the dataplane mode of the namespace.
fn set_mode(lab: &Lab, mode: Option<&str>) {
    lab.label("Namespace", "shop", &[("istio.io/dataplane-mode", mode)])
        .unwrap();
}

/// Waits until both pods have this enrolment state; `None` is outside the mesh.
fn wait_state(lab: &Lab, state: Option<&str>) {
    for pod in ["client", "server"] {
        lab.wait_workload_state(pod, state, DEADLINE).unwrap();
    }
}

/// Opens a connection from the client to the server, and echoes a word on it.
fn open(lab: &Lab, family: IpFamily, word: &str) -> OpenConnections {
    let mut connection =
        OpenConnections::open(lab, "client", lab.pod_ip("server", family).unwrap(), 1).unwrap();
    connection.echo(lab, word).unwrap();
    connection
}

/// Rules, routes and sockets of the daemon in the pod's namespace.
fn daemon_state(lab: &Lab, pod: &str) -> String {
    let list = "nft list tables; ip rule; ip -6 rule; ip route show table 100 2>/dev/null; \
                ip -6 route show table 100 2>/dev/null; ss -Hltn";
    let state = lab.exec(pod, &["sh", "-c", list]).unwrap().stdout;
    let is_daemons = |line: &&str| {
        [
            "ambit",
            "0x111",
            "local default",
            "local 0.0.0.0/0",
            ":15001 ",
            ":15006 ",
            ":15008 ",
        ]
        .iter()
        .any(|text| line.contains(text))
    };
    state
        .lines()
        .filter(is_daemons)
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn open_connections_survive_opt_in_and_opt_out_and_no_state_remains() {
    let lab = lab();
    let detector = Detector::start(&lab).unwrap();
    for family in IpFamily::ALL {
        let marker = |when: &str| format!("{when}-{family:?}-{}", lab.name());
        let is_plaintext = |when: &str| detector.occurrences(&marker(when)).unwrap().total() > 0;
        let mut before = open(&lab, family, &marker("before"));

        set_mode(&lab, Some("ambient"));
        wait_state(&lab, Some("enrolled"));
        before.echo(&lab, &marker("before-still")).unwrap();
        let mut inside = open(&lab, family, &marker("inside"));
        assert!(!is_plaintext("inside"), "plaintext on the wire");
        assert!(
            is_plaintext("before-still"),
            "the detector did not find the plaintext connection"
        );

        set_mode(&lab, None);
        for pod in ["client", "server"] {
            lab.wait_until(&format!("no redirect rule in {pod}"), DEADLINE, || {
                let rules = lab.exec(pod, &["nft", "list", "ruleset"]).ok()?.stdout;
                (!rules.contains("redirect to")).then_some(())
            })
            .unwrap();
        }
        before.echo(&lab, &marker("before-again")).unwrap();
        inside.echo(&lab, &marker("inside-still")).unwrap();
        assert!(!is_plaintext("inside-still"), "plaintext on the wire");
        let mut after = open(&lab, family, &marker("after"));
        assert!(is_plaintext("after"), "new connections are still captured");

        drop(inside);
        let identity = "spiffe://cluster.local/ns/shop/sa/client";
        let fields = [("direction", "inbound"), ("src.identity", identity)];
        access_log::wait(&lab, "b", &fields).unwrap();
        wait_state(&lab, None);
        for pod in ["client", "server"] {
            assert_eq!(daemon_state(&lab, pod), "", "in {pod}");
        }
        before.echo(&lab, &marker("before-without-rules")).unwrap();
        after.echo(&lab, &marker("after-without-rules")).unwrap();
    }
}

#[test]
fn pod_without_ipv6_is_enrolled_for_ipv4() {
    let lab = lab();
    for pod in ["client", "server"] {
        let disable_ipv6 = "for i in all default lo eth0; do \
                   echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
        lab.exec(pod, &["sh", "-c", disable_ipv6])
            .unwrap()
            .ok()
            .unwrap();
    }
    set_mode(&lab, Some("ambient"));
    wait_state(&lab, Some("enrolled"));
    let detector = Detector::start(&lab).unwrap();
    let marker = format!("ipv4-{}", lab.name());
    let _connection = open(&lab, IpFamily::V4, &marker);
    detector.ensure_unseen(&marker).unwrap();
}
