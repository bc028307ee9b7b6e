//! Who is in the mesh: labels, their precedence, and coming and going at run time.

use std::time::Duration;

use ambit_e2e::detector::Detector;
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::open_connections::OpenConnections;
use ambit_e2e::programs::{PORT, greeter};
use lab::{IpFamily, Lab, Options};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(10);

/// Namespace, pod, and whether the pod is to be in the mesh.
const PRECEDENCE: &[(&str, &str, bool)] = &[
    ("ambient", "silent", true),
    ("ambient", "none", false),
    ("ambient", "ambient", true),
    ("unset", "silent", false),
    ("unset", "none", false),
    ("unset", "ambient", true),
    ("none", "silent", false),
    ("none", "ambient", true),
    // A host-network pod has no network namespace of its own to capture.
    ("ambient", "host", false),
    // A pod with a sidecar is captured already.
    ("ambient", "sidecar", false),
    // What the cluster itself stands on is never captured, unless asked for.
    ("kube-system", "silent", false),
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

/// Whether the pod's own network namespace has the daemon's table.
fn captured(lab: &Lab, pod: &str) -> bool {
    lab.exec(pod, &["nft", "list", "tables"])
        .unwrap()
        .ok()
        .unwrap()
        .contains("table inet ambit")
}

#[test]
fn labels_of_pod_and_namespace_decide_with_istios_precedence() {
    let lab = Lab::up(precedence_manifests(), Options::default()).unwrap();
    let dump = lab.config_dump("a").unwrap();
    let status = lab.status().unwrap();
    let mut wrong = Vec::new();
    for (namespace, name, meshed) in PRECEDENCE {
        let pod = status.pod(&format!("{namespace}/{name}")).unwrap();
        let state = dump["workloadState"].get(pod.workload_uid("Kubernetes"));
        let enrolled = state.is_some_and(|state| state["state"] == "enrolled");
        // The host-network pod's namespace is the node's, which has a guard but no capture.
        let captured = captured(&lab, &format!("{namespace}/{name}")) && *name != "host";
        if enrolled != *meshed || captured != *meshed {
            wrong.push(format!(
                "{namespace}/{name}: enrolled {enrolled}, captured {captured}, not {meshed}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
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

/// Opts the namespace in, or not.
fn opt_in(lab: &Lab, mode: Option<&str>) {
    lab.label("Namespace", "shop", &[("istio.io/dataplane-mode", mode)])
        .unwrap();
}

/// Waits until both pods are in the mesh, or out of it.
fn wait_enrolled(lab: &Lab, state: Option<&str>) {
    for pod in ["client", "server"] {
        lab.wait_workload_state(pod, state, DEADLINE).unwrap();
    }
}

/// A connection from the client to the server, on which something was said.
fn open(lab: &Lab, family: IpFamily, word: &str) -> OpenConnections {
    let mut held =
        OpenConnections::open(lab, "client", lab.pod_ip("server", family).unwrap(), 1).unwrap();
    held.echo(lab, word).unwrap();
    held
}

/// What the daemon has left in the pod's namespace; empty for a pod that it never was in.
fn traces(lab: &Lab, pod: &str) -> String {
    let list = "nft list tables; ip rule; ip -6 rule; ip route show table 100 2>/dev/null; \
                ip -6 route show table 100 2>/dev/null; ss -Hltn";
    let all = lab.exec(pod, &["sh", "-c", list]).unwrap().stdout;
    let ours = |line: &&str| {
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
        .any(|sign| line.contains(sign))
    };
    all.lines().filter(ours).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_running_pod_joins_and_leaves_without_losing_a_connection_and_without_a_trace() {
    let lab = lab();
    let detector = Detector::start(&lab).unwrap();
    for family in IpFamily::ALL {
        let mark = |when: &str| format!("{when}-{family:?}-{}", lab.name());
        let seen = |when: &str| detector.occurrences(&mark(when)).unwrap().total() > 0;
        let mut before = open(&lab, family, &mark("before"));

        opt_in(&lab, Some("ambient"));
        wait_enrolled(&lab, Some("enrolled"));
        before.echo(&lab, &mark("before-still")).unwrap();
        let mut inside = open(&lab, family, &mark("inside"));
        assert!(!seen("inside"), "in clear on the wire");
        assert!(seen("before-still"), "the detector is blind");

        opt_in(&lab, None);
        for pod in ["client", "server"] {
            lab.wait_until(&format!("no redirect in {pod}"), DEADLINE, || {
                let rules = lab.exec(pod, &["nft", "list", "ruleset"]).ok()?.stdout;
                (!rules.contains("redirect to")).then_some(())
            })
            .unwrap();
        }
        before.echo(&lab, &mark("before-again")).unwrap();
        inside.echo(&lab, &mark("inside-still")).unwrap();
        assert!(!seen("inside-still"), "in clear on the wire");
        let mut after = open(&lab, family, &mark("after"));
        assert!(seen("after"), "still captured");

        drop(inside);
        wait_enrolled(&lab, None);
        for pod in ["client", "server"] {
            assert_eq!(traces(&lab, pod), "", "in {pod}");
        }
        before.echo(&lab, &mark("before-at-last")).unwrap();
        after.echo(&lab, &mark("after-at-last")).unwrap();
    }
}

#[test]
fn a_pod_without_ipv6_is_enrolled_with_what_it_has() {
    let lab = lab();
    for pod in ["client", "server"] {
        let off = "for i in all default lo eth0; do \
                   echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
        lab.exec(pod, &["sh", "-c", off]).unwrap().ok().unwrap();
    }
    opt_in(&lab, Some("ambient"));
    wait_enrolled(&lab, Some("enrolled"));
    let detector = Detector::start(&lab).unwrap();
    let marker = format!("four-{}", lab.name());
    let _held = open(&lab, IpFamily::V4, &marker);
    detector.ensure_unseen(&marker).unwrap();
}
