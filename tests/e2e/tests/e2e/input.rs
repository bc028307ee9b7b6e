//! Input that is wrong is reported by file, object and field; the last good state goes on; and when the mistake is mended,
//! so is its report.

use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::capture::{Traffic, server};
use ambit_e2e::input::{EditedFile, ExpectedProblem, SourceFile, problem_count, problems};
use ambit_e2e::manifest::{self, Pod, Service, namespace};
use ambit_e2e::programs::{PORT, curl, url};
use anyhow::{Context, Result, ensure};
use lab::{Capture, IpFamily, Lab, Location, Options};

const MARKER: &str = "marker-496e707574";

/// How long a change may take to show its effect on traffic.
const SOON: Duration = Duration::from_secs(8);

/// Two meshed pods on two nodes with a service between them, traffic over its ClusterIP, and a look at the wire.
struct Stage {
    lab: Lab,
    bridge: Capture,
    traffic: Traffic,
}

impl Stage {
    fn up() -> Result<Self> {
        let lab = Lab::up(
            manifest::all([
                manifest::two_nodes(),
                namespace("shop", Some("ambient")),
                Pod::new("shop", "client").on("a").into(),
                Pod::new("shop", "spare")
                    .on("b")
                    .runs(server("spare"))
                    .into(),
                Pod::new("shop", "web")
                    .on("b")
                    .runs(server("web"))
                    .port(Some("http"), PORT)
                    .into(),
                Service::new("shop", "web", PORT, "http").into(),
            ]),
            Options::default(),
        )?;
        for node in ["a", "b"] {
            ensure!(
                problems(&lab, node)?.is_empty(),
                "problems at the start: {:#?}",
                problems(&lab, node)?
            );
        }
        let bridge = lab.capture(Location::Fabric, "tcp")?;
        // The established connection goes to the pod, new ones to the service as well.
        let traffic =
            Traffic::patient(&lab, "client", lab.pod_ip("web", IpFamily::V4)?, MARKER, 10)?;
        Ok(Self {
            lab,
            bridge,
            traffic,
        })
    }

    /// Traffic goes on, to pod and service, and in no other way than before.
    fn goes_on(&self) -> Result<()> {
        self.traffic.flows(&self.lab, SOON)?;
        let bad: Vec<_> = self
            .traffic
            .answers()
            .into_iter()
            .filter(|answer| !answer.starts_with(MARKER))
            .collect();
        ensure!(bad.is_empty(), "requests failed: {bad:?}");
        let vip = self.lab.service_ip("shop/web", IpFamily::V4)?;
        let answer = curl(&self.lab, &Location::pod("client"), &url(vip, PORT), &[])?;
        ensure!(answer.body.ends_with("web"), "{}", answer.body);
        ensure!(
            self.bridge.occurrences(MARKER)? == 0,
            "the marker was seen in clear"
        );
        Ok(())
    }

    /// Both daemons report it while traffic goes on, and no longer once `mistake` is dropped.
    fn reports(&self, mistake: impl Drop, report: &ExpectedProblem<'_>) -> Result<Vec<String>> {
        let said: Result<Vec<_>> = ["a", "b"]
            .map(|node| report.wait(&self.lab, node))
            .into_iter()
            .collect();
        let said = said?;
        self.goes_on()?;
        drop(mistake);
        for node in ["a", "b"] {
            report.wait_gone(&self.lab, node)?;
        }
        Ok(said)
    }

    fn is_clean(&self) -> Result<()> {
        for node in ["a", "b"] {
            self.lab
                .wait_until("the metric to say that nothing is wrong", SOON, || {
                    (problem_count(&self.lab, node).ok()? < 0.5).then_some(())
                })?;
        }
        self.goes_on()
    }
}

/// A service's YAML, in one line.
fn service(name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{namespace: shop, name: {name}}}, spec: {spec}}}"
    )
}

/// A file that holds a mistake, and what is to be said of it.
#[derive(Clone)]
struct Mistake {
    what: &'static str,
    yaml: String,
    object: &'static str,
    field: &'static str,
    code: &'static str,
}

/// Files of which nothing can be told but that they are wrong.
fn unreadable() -> Vec<Mistake> {
    let of = |what, yaml: &str, field, code| Mistake {
        what,
        yaml: yaml.to_owned(),
        object: "",
        field,
        code,
    };
    let no_kind = "{apiVersion: v1, metadata: {name: x}}";
    vec![
        of("broken YAML", "kind: [Service\n", "", "yaml_syntax"),
        of("bytes that are no text", "\u{1}", "", "yaml_syntax"),
        of("no kind", no_kind, "kind", "missing_field"),
    ]
}

/// Services that are wrong in themselves, or among the pods that there are.
fn services() -> Vec<Mistake> {
    let of = |what, spec: &str, field, code| Mistake {
        what,
        yaml: service("x", spec),
        object: "Service shop/x",
        field,
        code,
    };
    let ports = |port: &str| {
        format!("{{selector: {{app: web}}, clusterIP: 10.96.200.1, ports: [{{port: {port}}}]}}")
    };
    let no_pod =
        "{selector: {app: web}, clusterIP: 10.96.200.2, ports: [{port: 80, targetPort: grpc}]}";
    let nobody = "{selector: {app: nobody}, clusterIP: 10.96.200.3, ports: [{port: 80}]}";
    vec![
        of(
            "a word for a port",
            &ports("eighty"),
            "spec.ports[0].port",
            "bad_field",
        ),
        of(
            "a port beyond all ports",
            &ports("99999"),
            "spec.ports[0].port",
            "bad_port",
        ),
        of(
            "a Service of no pod",
            nobody,
            "",
            "service_without_endpoints",
        ),
        of(
            "a named port that no pod has",
            no_pod,
            "spec.ports[0].targetPort",
            "named_port_missing",
        ),
    ]
}

/// Objects of other kinds, and one that is there already.
fn objects() -> Vec<Mistake> {
    let of = |what, yaml: &str, object, field, code| Mistake {
        what,
        yaml: yaml.to_owned(),
        object,
        field,
        code,
    };
    let slice = "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {namespace: shop, name: x, \
                 labels: {kubernetes.io/service-name: web}}, addressType: IPv4, endpoints: [{addresses: [nowhere]}]}";
    let mode = "{apiVersion: v1, kind: Namespace, metadata: {name: bank, labels: {istio.io/dataplane-mode: \"yes\"}}}";
    let unknown = "{apiVersion: v1, kind: ConfigMap, metadata: {namespace: shop, name: x}}";
    let twice = service("web", "{clusterIP: 10.96.200.4, ports: [{port: 80}]}");
    vec![
        of(
            "an unknown kind",
            unknown,
            "ConfigMap shop/x",
            "",
            "unknown_kind",
        ),
        of(
            "a label value that means nothing",
            mode,
            "Namespace bank",
            "metadata.labels[istio.io/dataplane-mode]",
            "bad_label_value",
        ),
        of(
            "an endpoint that is no address",
            slice,
            "EndpointSlice shop/x",
            "endpoints[0].addresses[0]",
            "bad_ip",
        ),
        of(
            "an object that is written twice",
            &twice,
            "Service shop/web",
            "",
            "duplicate_object",
        ),
    ]
}

#[test]
fn each_mistake_in_a_file_is_reported_by_file_object_and_field_and_harms_nothing_else() -> Result<()>
{
    let stage = Stage::up()?;
    for mistake in [unreadable(), services(), objects()].concat() {
        // Last in the order of names, so that an object of the lab's own counts before one of ours.
        let file = "zz-mistake.yaml";
        let report = ExpectedProblem {
            file,
            object: mistake.object,
            field: mistake.field,
            code: mistake.code,
        };
        let written = SourceFile::write(&stage.lab, file, &mistake.yaml)?;
        stage
            .reports(written, &report)
            .with_context(|| mistake.what)?;
    }
    stage.is_clean()
}

#[test]
fn a_policy_that_is_not_enforced_is_said_loudly() -> Result<()> {
    let stage = Stage::up()?;
    for (api, kind, spec, field, code) in [
        (
            "security.istio.io/v1",
            "RequestAuthentication",
            "{jwtRules: [{issuer: nobody}]}",
            "",
            "unsupported_kind",
        ),
        (
            "security.istio.io/v1",
            "AuthorizationPolicy",
            "{action: AUDIT, rules: [{}]}",
            "spec.action",
            "not_enforced",
        ),
        (
            "security.istio.io/v1",
            "AuthorizationPolicy",
            "{targetRefs: [{kind: Service, group: \"\", name: web}]}",
            "spec.targetRefs",
            "not_enforced",
        ),
    ] {
        let policy = format!(
            "{{apiVersion: {api}, kind: {kind}, metadata: {{namespace: shop, name: elsewhere}}, spec: {spec}}}"
        );
        let mistake = SourceFile::write(&stage.lab, "policy.yaml", policy)?;
        let object = format!("{kind} shop/elsewhere");
        let report = ExpectedProblem {
            file: "policy.yaml",
            object: &object,
            field,
            code,
        };
        let said = stage.reports(mistake, &report)?;
        ensure!(
            said.iter().all(|message| message.contains("NOT enforced")),
            "{said:?}"
        );
        let log = stage.lab.daemon_log("a")?;
        let line = log
            .lines()
            .find(|line| line.contains(&object) && line.contains(code))
            .context("no line")?;
        ensure!(
            line.split('\t').nth(1) == Some("warn"),
            "not a warning: {line}"
        );
    }
    stage.is_clean()
}

/// One that denies is in force at once, and no problem.
#[test]
fn a_policy_that_is_enforced_is_no_problem() -> Result<()> {
    let stage = Stage::up()?;
    let policy = "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, \
                  metadata: {namespace: shop, name: allow-nothing}, spec: {}}";
    let file = SourceFile::write(&stage.lab, "policy.yaml", policy)?;
    stage.traffic.is_cut(&stage.lab)?;
    for node in ["a", "b"] {
        let problems = problems(&stage.lab, node)?;
        ensure!(problems.is_empty(), "{problems:#?}");
    }
    drop(file);
    stage.traffic.new_ones_flow(&stage.lab, SOON)
}

#[test]
fn a_broken_version_of_an_object_in_use_leaves_the_good_one_in_use() -> Result<()> {
    let stage = Stage::up()?;
    let broken = |name: &str, edit: fn(&str) -> String| EditedFile::edit(&stage.lab, name, edit);
    let file = "service.shop.web.yaml";
    let mistake = broken(file, |_| "spec: {ports: [".to_owned())?;
    stage.reports(
        mistake,
        &ExpectedProblem {
            file,
            object: "",
            field: "",
            code: "yaml_syntax",
        },
    )?;

    let mistake = broken(file, |yaml| yaml.replace("8080", "80808080"))?;
    let object = "Service shop/web";
    stage.reports(
        mistake,
        &ExpectedProblem {
            file,
            object,
            field: "spec.ports[0].port",
            code: "bad_port",
        },
    )?;

    // Above all, a slip of the hand must not take a namespace out of the mesh.
    let file = "namespace.shop.yaml";
    let mistake = broken(file, |yaml| yaml.replace("ambient", "amibent"))?;
    let field = "metadata.labels[istio.io/dataplane-mode]";
    stage.reports(
        mistake,
        &ExpectedProblem {
            file,
            object: "Namespace shop",
            field,
            code: "bad_label_value",
        },
    )?;

    let file = "pod.shop.web.yaml";
    let mistake = broken(file, |_| "\u{0}".to_owned())?;
    stage.reports(
        mistake,
        &ExpectedProblem {
            file,
            object: "",
            field: "",
            code: "yaml_syntax",
        },
    )?;
    stage.is_clean()
}

#[test]
fn an_address_that_two_pods_claim_leads_to_neither_until_that_is_settled() -> Result<()> {
    let stage = Stage::up()?;
    let lab = &stage.lab;
    let spare = lab.pod_ip("spare", IpFamily::V4)?;
    let file = "zz-thief.yaml";
    let thief = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, name: thief, uid: 6d2c}}, \
         spec: {{nodeName: a, serviceAccountName: thief, containers: [{{name: main}}]}}, \
         status: {{phase: Running, podIPs: [{{ip: {spare}}}]}}}}"
    );
    let mistake = SourceFile::write(lab, file, thief)?;
    let report = ExpectedProblem {
        file,
        object: "Pod shop/thief",
        field: "status.podIPs",
        code: "duplicate_ip",
    };
    report.wait(lab, "a")?;
    let request = || {
        let to = url(spare, PORT);
        lab.exec(
            "client",
            &[
                "curl",
                "-sS",
                "-m",
                "3",
                "-H",
                &format!("X-Marker: {MARKER}"),
                &to,
            ],
        )
    };
    ensure!(
        !request()?.success(),
        "an address that two claim was answered"
    );
    let line = access_log::wait(
        lab,
        "a",
        &[("direction", "outbound"), ("reason", "duplicate_ip")],
    )?;
    ensure!(line.field("dst.identity").is_empty(), "{}", line.line);
    stage.reports(mistake, &report)?;
    lab.wait_until("the address to be reached again", SOON, || {
        request().ok().filter(lab::Output::success)
    })?;
    let identity = "spiffe://cluster.local/ns/shop/sa/spare";
    access_log::wait(
        lab,
        "a",
        &[("dst.workload", "spare"), ("dst.identity", identity)],
    )?;
    stage.is_clean()
}

#[test]
fn a_folder_that_goes_away_and_comes_back_changes_nothing() -> Result<()> {
    let stage = Stage::up()?;
    let folder = stage.lab.source_folder();
    let aside = folder.with_extension("aside");
    std::fs::rename(&folder, &aside)?;
    let report = ExpectedProblem {
        file: "",
        object: "",
        field: "",
        code: "folder_unreadable",
    };
    let seen = report.wait(&stage.lab, "a").and_then(|_| stage.goes_on());
    std::fs::rename(&aside, &folder)?;
    seen?;
    report.wait_gone(&stage.lab, "a")?;
    // It is followed again.
    let mistake = SourceFile::write(&stage.lab, "zz.yaml", "kind: [")?;
    stage.reports(
        mistake,
        &ExpectedProblem {
            file: "zz.yaml",
            object: "",
            field: "",
            code: "yaml_syntax",
        },
    )?;
    stage.is_clean()
}
