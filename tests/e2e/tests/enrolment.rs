//! Who is in the mesh: labels, their precedence, and coming and going at run time.

#![allow(clippy::unwrap_used, reason = "a test ends at its first failure")]

use std::time::Duration;

use ambit_e2e::detector::Detector;
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::programs::{PORT, greeter, hold};
use lab::{Family, Lab, Options, Process};
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

/// A connection that is held open, and what is said on it.
struct Held(Process);

impl Held {
    fn open(lab: &Lab, server: &str, family: Family) -> Self {
        let command = hold(lab.pod_ip(server, family).unwrap(), PORT, 1);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let process = lab.spawn("client", &command).unwrap();
        process.wait_stdout("held\n", DEADLINE).unwrap();
        Self(process)
    }

    /// Sends a word and waits for its echo.
    fn says(&mut self, word: &str) {
        self.0.write(format!("{word}\n").as_bytes()).unwrap();
        self.0.wait_stdout(&format!("{word}\n"), DEADLINE).unwrap();
    }
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
    let server = Pod::new("shop", "server")
        .on("b")
        .runs(greeter(PORT, "hi"))
        .port(None, PORT);
    let client = Pod::new("shop", "client").on("a");
    let all = [
        manifest::two_nodes(),
        manifest::namespace("shop", None),
        client.into(),
        server.into(),
    ];
    let lab = Lab::up(manifest::all(all), Options::default()).unwrap();
    let mode = |mode: Option<&str>| {
        lab.label("Namespace", "shop", &[("istio.io/dataplane-mode", mode)])
            .unwrap();
    };
    let detector = Detector::start(&lab).unwrap();
    for family in Family::ALL {
        let mark = |when: &str| format!("{when}-{family:?}-{}", lab.name());
        let mut before = Held::open(&lab, "server", family);
        before.says(&mark("before"));

        mode(Some("ambient"));
        for pod in ["client", "server"] {
            lab.wait_workload_state(pod, Some("enrolled"), DEADLINE)
                .unwrap();
        }
        before.says(&mark("before-still"));
        let mut inside = Held::open(&lab, "server", family);
        inside.says(&mark("inside"));
        detector.never_saw(&mark("inside")).unwrap();
        assert!(
            detector.look_for(&mark("before-still")).unwrap().total() > 0,
            "the detector is blind"
        );

        mode(None);
        for pod in ["client", "server"] {
            lab.wait_until(&format!("no redirect in {pod}"), DEADLINE, || {
                let rules = lab.exec(pod, &["nft", "list", "ruleset"]).ok()?.stdout;
                (!rules.contains("redirect to")).then_some(())
            })
            .unwrap();
        }
        before.says(&mark("before-again"));
        inside.says(&mark("inside-still"));
        detector.never_saw(&mark("inside-still")).unwrap();
        let mut after = Held::open(&lab, "server", family);
        after.says(&mark("after"));
        assert!(
            detector.look_for(&mark("after")).unwrap().total() > 0,
            "still captured"
        );

        drop(inside);
        for pod in ["client", "server"] {
            lab.wait_workload_state(pod, None, DEADLINE).unwrap();
            assert_eq!(traces(&lab, pod), "", "in {pod}");
        }
        before.says(&mark("before-at-last"));
        after.says(&mark("after-at-last"));
    }
}

#[test]
fn a_pod_without_ipv6_is_enrolled_with_what_it_has() {
    let server = Pod::new("shop", "server")
        .on("b")
        .runs(greeter(PORT, "hi"))
        .port(None, PORT);
    let client = Pod::new("shop", "client").on("a");
    let all = [
        manifest::two_nodes(),
        manifest::namespace("shop", None),
        client.into(),
        server.into(),
    ];
    let lab = Lab::up(manifest::all(all), Options::default()).unwrap();
    for pod in ["client", "server"] {
        let off = "for i in all default lo eth0; do echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
        lab.exec(pod, &["sh", "-c", off]).unwrap().ok().unwrap();
    }
    lab.label(
        "Namespace",
        "shop",
        &[("istio.io/dataplane-mode", Some("ambient"))],
    )
    .unwrap();
    for pod in ["client", "server"] {
        lab.wait_workload_state(pod, Some("enrolled"), DEADLINE)
            .unwrap();
    }
    let detector = Detector::start(&lab).unwrap();
    let marker = format!("four-{}", lab.name());
    Held::open(&lab, "server", Family::V4).says(&marker);
    detector.never_saw(&marker).unwrap();
}
