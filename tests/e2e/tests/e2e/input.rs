//! Invalid configuration: each problem is reported by file, object and field, the last valid state stays in use, and the
//! report disappears when the problem is fixed.

use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::capture::{Traffic, server};
use ambit_e2e::input::{EditedFile, ExpectedProblem, SourceFile, problem_count, problems};
use ambit_e2e::manifest::{self, Pod, Service, namespace};
use ambit_e2e::programs::{PORT, curl, url};
use anyhow::{Context, Result, ensure};
use lab::{Capture, IpFamily, Lab, Location, Options};

const MARKER: &str = "marker-496e707574";

/// How long a change may take to affect traffic.
const DEADLINE: Duration = Duration::from_secs(8);

/// A meshed client and a meshed service on two nodes, traffic between them, and a packet capture.
struct Fixture {
    lab: Lab,
    bridge: Capture,
    traffic: Traffic,
}

impl Fixture {
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
                "problems before the test: {:#?}",
                problems(&lab, node)?
            );
        }
        let bridge = lab.capture(Location::Fabric, "tcp")?;
        // Requests over new connections, and one established connection.
        let traffic = Traffic::start_with_timeout(
            &lab,
            "client",
            lab.pod_ip("web", IpFamily::V4)?,
            MARKER,
            10,
        )?;
        Ok(Self {
            lab,
            bridge,
            traffic,
        })
    }

    /// Checks that traffic to pod and service succeeds, encrypted, and that no request has failed.
    fn check_traffic(&self) -> Result<()> {
        self.traffic.wait_flowing(&self.lab, DEADLINE)?;
        let failed: Vec<_> = self
            .traffic
            .responses()
            .into_iter()
            .filter(|answer| !answer.starts_with(MARKER))
            .collect();
        ensure!(failed.is_empty(), "requests failed: {failed:?}");
        let vip = self.lab.service_ip("shop/web", IpFamily::V4)?;
        let response = curl(&self.lab, &Location::pod("client"), &url(vip, PORT), &[])?;
        ensure!(response.body.ends_with("web"), "{}", response.body);
        ensure!(
            self.bridge.occurrences(MARKER)? == 0,
            "the marker was seen unencrypted"
        );
        Ok(())
    }

    /// Checks that both daemons report the problem while traffic continues, and no longer once `cause` is dropped.
    /// Returns the messages.
    fn check_reported(
        &self,
        cause: impl Drop,
        report: &ExpectedProblem<'_>,
    ) -> Result<Vec<String>> {
        let messages: Result<Vec<_>> = ["a", "b"]
            .map(|node| report.wait(&self.lab, node))
            .into_iter()
            .collect();
        let messages = messages?;
        self.check_traffic()?;
        drop(cause);
        for node in ["a", "b"] {
            report.wait_gone(&self.lab, node)?;
        }
        Ok(messages)
    }

    /// Checks that no problem is counted and traffic continues.
    fn check_no_problems(&self) -> Result<()> {
        for node in ["a", "b"] {
            self.lab
                .wait_until("the metric to count no problem", DEADLINE, || {
                    (problem_count(&self.lab, node).ok()? < 0.5).then_some(())
                })?;
        }
        self.check_traffic()
    }
}

/// A service's YAML in one line.
fn service(name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{namespace: shop, name: {name}}}, spec: {spec}}}"
    )
}

/// A file with a problem, and how daemons must report it.
#[derive(Clone)]
struct InvalidFile {
    what: &'static str,
    yaml: String,
    object: &'static str,
    field: &'static str,
    code: &'static str,
}

/// Files that cannot be parsed as objects.
fn unreadable() -> Vec<InvalidFile> {
    let of = |what, yaml: &str, field, code| InvalidFile {
        what,
        yaml: yaml.to_owned(),
        object: "",
        field,
        code,
    };
    let no_kind = "{apiVersion: v1, metadata: {name: x}}";
    vec![
        of("broken YAML", "kind: [Service\n", "", "yaml_syntax"),
        of("bytes that are not text", "\u{1}", "", "yaml_syntax"),
        of("no kind", no_kind, "kind", "missing_field"),
    ]
}

/// Services that are invalid, or that do not match the pods.
fn services() -> Vec<InvalidFile> {
    let of = |what, spec: &str, field, code| InvalidFile {
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
    let no_match = "{selector: {app: nobody}, clusterIP: 10.96.200.3, ports: [{port: 80}]}";
    vec![
        of(
            "a word for a port",
            &ports("eighty"),
            "spec.ports[0].port",
            "bad_field",
        ),
        of(
            "a port above 65535",
            &ports("99999"),
            "spec.ports[0].port",
            "bad_port",
        ),
        of(
            "a Service without pods",
            no_match,
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

/// Objects of other kinds, and a duplicate.
fn objects() -> Vec<InvalidFile> {
    let of = |what, yaml: &str, object, field, code| InvalidFile {
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
            "an unknown label value",
            mode,
            "Namespace bank",
            "metadata.labels[istio.io/dataplane-mode]",
            "bad_label_value",
        ),
        of(
            "an endpoint that is not an address",
            slice,
            "EndpointSlice shop/x",
            "endpoints[0].addresses[0]",
            "bad_ip",
        ),
        of(
            "an object in two files",
            &twice,
            "Service shop/web",
            "",
            "duplicate_object",
        ),
    ]
}

#[test]
fn problems_are_reported_by_file_object_and_field_without_affecting_traffic() -> Result<()> {
    let fixture = Fixture::up()?;
    for invalid in [unreadable(), services(), objects()].concat() {
        // The last name in sort order, so that the lab's own object takes precedence over a duplicate.
        let file = "zz-invalid.yaml";
        let report = ExpectedProblem {
            file,
            object: invalid.object,
            field: invalid.field,
            code: invalid.code,
        };
        let written = SourceFile::write(&fixture.lab, file, &invalid.yaml)?;
        fixture
            .check_reported(written, &report)
            .with_context(|| invalid.what)?;
    }
    fixture.check_no_problems()
}

#[test]
fn unenforced_policy_is_reported_and_logged_as_a_warning() -> Result<()> {
    let fixture = Fixture::up()?;
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
        let invalid = SourceFile::write(&fixture.lab, "policy.yaml", policy)?;
        let object = format!("{kind} shop/elsewhere");
        let report = ExpectedProblem {
            file: "policy.yaml",
            object: &object,
            field,
            code,
        };
        let messages = fixture.check_reported(invalid, &report)?;
        ensure!(
            messages
                .iter()
                .all(|message| message.contains("NOT enforced")),
            "{messages:?}"
        );
        let log = fixture.lab.daemon_log("a")?;
        let line = log
            .lines()
            .find(|line| line.contains(&object) && line.contains(code))
            .context("the problem is not in the log")?;
        ensure!(
            line.split('\t').nth(1) == Some("warn"),
            "not a warning: {line}"
        );
    }
    fixture.check_no_problems()
}

#[test]
fn enforced_policy_takes_effect_and_is_not_a_problem() -> Result<()> {
    let fixture = Fixture::up()?;
    let policy = "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, \
                  metadata: {namespace: shop, name: allow-nothing}, spec: {}}";
    let file = SourceFile::write(&fixture.lab, "policy.yaml", policy)?;
    fixture.traffic.wait_cut(&fixture.lab)?;
    for node in ["a", "b"] {
        let problems = problems(&fixture.lab, node)?;
        ensure!(problems.is_empty(), "{problems:#?}");
    }
    drop(file);
    fixture.traffic.wait_new_flowing(&fixture.lab, DEADLINE)
}

#[test]
fn invalid_version_of_an_object_leaves_the_last_valid_one_in_use() -> Result<()> {
    let fixture = Fixture::up()?;
    let edit =
        |name: &str, change: fn(&str) -> String| EditedFile::edit(&fixture.lab, name, change);
    let file = "service.shop.web.yaml";
    let invalid = edit(file, |_| "spec: {ports: [".to_owned())?;
    fixture.check_reported(
        invalid,
        &ExpectedProblem {
            file,
            object: "",
            field: "",
            code: "yaml_syntax",
        },
    )?;

    let invalid = edit(file, |yaml| yaml.replace("8080", "80808080"))?;
    let object = "Service shop/web";
    fixture.check_reported(
        invalid,
        &ExpectedProblem {
            file,
            object,
            field: "spec.ports[0].port",
            code: "bad_port",
        },
    )?;

    // A typo must not take a namespace out of the mesh.
    let file = "namespace.shop.yaml";
    let invalid = edit(file, |yaml| yaml.replace("ambient", "amibent"))?;
    let field = "metadata.labels[istio.io/dataplane-mode]";
    fixture.check_reported(
        invalid,
        &ExpectedProblem {
            file,
            object: "Namespace shop",
            field,
            code: "bad_label_value",
        },
    )?;

    let file = "pod.shop.web.yaml";
    let invalid = edit(file, |_| "\u{0}".to_owned())?;
    fixture.check_reported(
        invalid,
        &ExpectedProblem {
            file,
            object: "",
            field: "",
            code: "yaml_syntax",
        },
    )?;
    fixture.check_no_problems()
}

#[test]
fn address_of_two_pods_is_unreachable_until_one_is_removed() -> Result<()> {
    let fixture = Fixture::up()?;
    let lab = &fixture.lab;
    let spare = lab.pod_ip("spare", IpFamily::V4)?;
    let file = "zz-duplicate.yaml";
    let duplicate = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, name: duplicate, uid: 6d2c}}, \
         spec: {{nodeName: a, serviceAccountName: duplicate, containers: [{{name: main}}]}}, \
         status: {{phase: Running, podIPs: [{{ip: {spare}}}]}}}}"
    );
    let invalid = SourceFile::write(lab, file, duplicate)?;
    let report = ExpectedProblem {
        file,
        object: "Pod shop/duplicate",
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
        "a request to the address of two pods succeeded"
    );
    let line = access_log::wait(
        lab,
        "a",
        &[("direction", "outbound"), ("reason", "duplicate_ip")],
    )?;
    ensure!(line.field("dst.identity").is_empty(), "{}", line.line);
    fixture.check_reported(invalid, &report)?;
    lab.wait_until("the address to be reachable again", DEADLINE, || {
        request().ok().filter(lab::Output::success)
    })?;
    let identity = "spiffe://cluster.local/ns/shop/sa/spare";
    access_log::wait(
        lab,
        "a",
        &[("dst.workload", "spare"), ("dst.identity", identity)],
    )?;
    fixture.check_no_problems()
}

#[test]
fn missing_source_folder_keeps_the_last_state_until_it_returns() -> Result<()> {
    let fixture = Fixture::up()?;
    let folder = fixture.lab.source_folder();
    let aside = folder.with_extension("aside");
    std::fs::rename(&folder, &aside)?;
    let report = ExpectedProblem {
        file: "",
        object: "",
        field: "",
        code: "folder_unreadable",
    };
    let result = report
        .wait(&fixture.lab, "a")
        .and_then(|_| fixture.check_traffic());
    std::fs::rename(&aside, &folder)?;
    result?;
    report.wait_gone(&fixture.lab, "a")?;
    // Changes are read again.
    let invalid = SourceFile::write(&fixture.lab, "zz.yaml", "kind: [")?;
    fixture.check_reported(
        invalid,
        &ExpectedProblem {
            file: "zz.yaml",
            object: "",
            field: "",
            code: "yaml_syntax",
        },
    )?;
    fixture.check_no_problems()
}
