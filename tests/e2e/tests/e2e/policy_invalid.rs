//! Invalid policies fail closed: the daemons deny, report the object and field, and keep enforcing the
//! last valid version if there is one. Also policies that are reported and not enforced.

use ambit_e2e::input::{ExpectedProblem, SourceFile};
use ambit_e2e::policy::connection::{check_connections, connections};
use ambit_e2e::policy::fixture::{self, BAR, CLIENTS, FOO, HTTP, LEGACY, PRODUCTPAGE};
use ambit_e2e::policy::guides::NO_ALLOW;
use ambit_e2e::policy::telemetry::{self, Baseline};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::Lab;

/// The nodes, whose daemons all report each problem.
const NODES: [&str; 2] = ["a", "b"];

/// Whether a client's connections to a port are allowed.
type IsAllowed = fn(client: &str, port: u16) -> bool;

/// A policy with one invalid field, and its expected report and effect.
struct InvalidPolicy {
    description: &'static str,
    kind: &'static str,
    namespace: &'static str,
    spec: &'static str,
    field: &'static str,
    code: &'static str,
    is_allowed: IsAllowed,
}

/// The file of the policy under test.
const FILE: &str = "policy.yaml";

const ALL_ALLOWED: IsAllowed = |_, _| true;
const ALL_DENIED: IsAllowed = |_, _| false;
const MESHED: IsAllowed = |client, _| client != LEGACY;

const AUTHORIZATION: &str = "AuthorizationPolicy";
const AUTHENTICATION: &str = "PeerAuthentication";
const NETWORK: &str = "NetworkPolicy";

const INVALID_POLICIES: [InvalidPolicy; 12] = [
    InvalidPolicy {
        description: "ALLOW with an invalid address",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{rules: [{from: [{source: {ipBlocks: [10.244.1.300]}}]}, {from: [{source: {namespaces: [foo]}}]}]}",
        field: "spec.rules[0].from[0].source.ipBlocks[0]",
        code: "bad_value",
        is_allowed: ALL_DENIED,
    },
    InvalidPolicy {
        description: "DENY with an invalid port, for clients of bar",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}], to: [{operation: {ports: [http]}}]}]}",
        field: "spec.rules[0].to[0].operation.ports[0]",
        code: "bad_value",
        is_allowed: |client, _| client != BAR,
    },
    InvalidPolicy {
        description: "DENY with an invalid address, for one port",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{action: DENY, rules: [{from: [{source: {notIpBlocks: [everywhere]}}], to: [{operation: {ports: [\"9000\"]}}]}]}",
        field: "spec.rules[0].from[0].source.notIpBlocks[0]",
        code: "bad_value",
        is_allowed: |_, port| port == HTTP,
    },
    InvalidPolicy {
        description: "ALLOW of an empty principal",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{rules: [{from: [{source: {principals: [\"\"]}}]}]}",
        field: "spec.rules[0].from[0].source.principals[0]",
        code: "bad_value",
        is_allowed: ALL_DENIED,
    },
    InvalidPolicy {
        description: "unknown field",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{rules: [{from: [{source: {namespaces: [foo], onlyOnSundays: true}}]}]}",
        field: "spec.rules[0].from[0].source.onlyOnSundays",
        code: "unknown_field",
        is_allowed: ALL_DENIED,
    },
    InvalidPolicy {
        description: "unknown action",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{action: WELCOME, rules: [{}]}",
        field: "spec.action",
        code: "unknown_action",
        is_allowed: ALL_DENIED,
    },
    InvalidPolicy {
        description: "DENY of plaintext with an unreadable selector",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{selector: [app, nothing], action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]}",
        field: "spec.selector",
        code: "bad_field",
        is_allowed: MESHED,
    },
    InvalidPolicy {
        description: "rules that are not a list",
        kind: AUTHORIZATION,
        namespace: "istio-system",
        spec: "{rules: all}",
        field: "spec.rules",
        code: "bad_field",
        is_allowed: ALL_DENIED,
    },
    InvalidPolicy {
        description: "unknown mode",
        kind: AUTHENTICATION,
        namespace: "foo",
        spec: "{mtls: {mode: RELAXED}}",
        field: "spec.mtls.mode",
        code: "unknown_mode",
        is_allowed: MESHED,
    },
    InvalidPolicy {
        description: "unknown mode for one port",
        kind: AUTHENTICATION,
        namespace: "foo",
        spec: "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {9000: {mode: RELAXED}}}",
        field: "spec.portLevelMtls.9000.mode",
        code: "unknown_mode",
        is_allowed: MESHED,
    },
    InvalidPolicy {
        description: "invalid ipBlock",
        kind: NETWORK,
        namespace: "foo",
        spec: "{podSelector: {matchLabels: {app: httpbin}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}, {}]}",
        field: "spec.ingress[0].from[0].ipBlock.cidr",
        code: "bad_cidr",
        is_allowed: ALL_DENIED,
    },
    InvalidPolicy {
        description: "invalid podSelector",
        kind: NETWORK,
        namespace: "foo",
        spec: "{podSelector: {matchExpressions: [{key: app, operator: Like, values: [http]}]}, ingress: [{}]}",
        field: "spec.podSelector.matchExpressions[0].operator",
        code: "bad_selector",
        is_allowed: ALL_DENIED,
    },
];

impl InvalidPolicy {
    /// The policy, named `policy`.
    fn yaml(&self) -> String {
        let api = match self.kind {
            NETWORK => "networking.k8s.io/v1",
            _ => "security.istio.io/v1",
        };
        let Self {
            kind,
            namespace,
            spec,
            ..
        } = self;
        format!(
            "{{apiVersion: {api}, kind: {kind}, metadata: {{namespace: {namespace}, name: policy}}, spec: {spec}}}"
        )
    }

    /// Waits until every daemon reports the invalid field.
    fn wait_reported(&self, lab: &Lab) -> Result<()> {
        let object = format!("{} {}/policy", self.kind, self.namespace);
        let report = ExpectedProblem {
            file: FILE,
            object: &object,
            field: self.field,
            code: self.code,
        };
        for node in NODES {
            report.wait(lab, node)?;
        }
        Ok(())
    }
}

/// Checks every connection of the fixture.
fn check_allowed(lab: &Lab, is_allowed: IsAllowed) -> Result<()> {
    check_connections(lab, &CLIENTS, is_allowed)
}

#[test]
fn invalid_policy_denies_and_is_reported_by_object_and_field() -> Result<()> {
    let lab = fixture::up()?;
    let mut failures = Vec::new();
    for invalid in &INVALID_POLICIES {
        let file = SourceFile::write(&lab, FILE, invalid.yaml())?;
        let result = invalid
            .wait_reported(&lab)
            .and_then(|()| check_not_accepted(&lab, invalid))
            .and_then(|()| check_allowed(&lab, invalid.is_allowed));
        if let Err(error) = result {
            failures.push(format!("{}: {error:#}", invalid.description));
        }
        drop(file);
        wait_synced(&lab)?;
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    check_allowed(&lab, ALL_ALLOWED)
}

/// The dump of every daemon has the policy, not accepted, with the invalid field.
fn check_not_accepted(lab: &Lab, invalid: &InvalidPolicy) -> Result<()> {
    for node in NODES {
        let policy = telemetry::policy(lab, node, invalid.kind, invalid.namespace, "policy")?;
        ensure!(!telemetry::is_accepted(&policy), "{policy:#}");
        ensure!(
            policy.to_string().contains(invalid.field),
            "{} is not named: {policy:#}",
            invalid.field
        );
    }
    Ok(())
}

#[test]
fn invalid_version_keeps_the_last_valid_version_in_force() -> Result<()> {
    let lab = fixture::up()?;
    for (kind, spec, is_allowed) in [
        (
            AUTHORIZATION,
            "{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/productpage]}}]}]}",
            (|client, _| client != PRODUCTPAGE) as IsAllowed,
        ),
        (AUTHENTICATION, "{mtls: {mode: STRICT}}", MESHED),
        (
            NETWORK,
            "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}",
            |client, _| client == FOO,
        ),
    ] {
        let of_kind = || {
            INVALID_POLICIES
                .iter()
                .filter(|invalid| invalid.kind == kind && invalid.namespace == "foo")
        };
        let first = of_kind().next().context("no invalid policy of this kind")?;
        let valid = InvalidPolicy { spec, ..*first };
        let file = SourceFile::write(&lab, FILE, valid.yaml())?;
        wait_synced(&lab)?;
        check_allowed(&lab, is_allowed).context("the valid version")?;
        for invalid in of_kind() {
            file.replace(invalid.yaml())?;
            invalid.wait_reported(&lab)?;
            check_allowed(&lab, is_allowed).context(invalid.description)?;
        }
        file.replace("kind: [")?;
        wait_synced(&lab)?;
        check_allowed(&lab, is_allowed).context("invalid YAML")?;
        // The next valid version takes effect: it selects no pod of the fixture's servers.
        file.replace(valid.yaml().replace("foo,", "bar,"))?;
        wait_synced(&lab)?;
        check_allowed(&lab, ALL_ALLOWED).context("the next valid version")?;
    }
    Ok(())
}

/// After a restart no daemon has a last valid version, whether the file has an invalid field or is no
/// YAML at all.
#[test]
fn daemon_that_starts_with_an_invalid_policy_denies() -> Result<()> {
    let lab = fixture::up()?;
    let first = INVALID_POLICIES.first().context("no invalid policy")?;
    let invalid = first.yaml();
    let valid = invalid.replace("10.244.1.300", "10.244.1.0/24, \"fd00:10:244:1::/64\"");
    let from_node_a: IsAllowed = |client, _| client != BAR;
    let file = SourceFile::write(&lab, FILE, &valid)?;
    for (invalid, object, field, code) in [
        (
            invalid,
            "AuthorizationPolicy foo/policy",
            first.field,
            first.code,
        ),
        (format!("{valid} ]"), "", "", "yaml_syntax"),
    ] {
        file.replace(&valid)?;
        wait_synced(&lab)?;
        check_allowed(&lab, from_node_a).context("the valid version")?;
        file.replace(invalid)?;
        let report = ExpectedProblem {
            file: FILE,
            object,
            field,
            code,
        };
        for node in NODES {
            report.wait(&lab, node)?;
        }
        check_allowed(&lab, from_node_a).context("before the restart")?;
        for node in NODES {
            lab.stop_daemon(node)?;
            lab.start_daemon(node)?;
        }
        wait_synced(&lab)?;
        check_allowed(&lab, ALL_DENIED).with_context(|| format!("after the restart, {code}"))?;
        for node in NODES {
            report.wait(&lab, node)?;
            let policy = telemetry::policy(&lab, node, AUTHORIZATION, "foo", "policy")?;
            ensure!(!telemetry::is_accepted(&policy), "{policy:#}");
        }
    }
    file.remove()?;
    wait_synced(&lab)?;
    check_allowed(&lab, ALL_ALLOWED)
}

#[test]
fn dry_run_policy_is_counted_and_logged_and_denies_nothing() -> Result<()> {
    let lab = fixture::up()?;
    let dry_run = |action: &str, rules: &str| {
        format!(
            "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: foo, name: candidate, \
             annotations: {{istio.io/dry-run: \"true\"}}}}, spec: {{action: {action}, rules: {rules}}}}}"
        )
    };
    let all_connections = CLIENTS.into_iter().flat_map(connections).count();
    let file = SourceFile::write(&lab, "dry-run.yaml", dry_run("DENY", "[{}]"))?;
    wait_synced(&lab)?;
    let baseline = Baseline::take(&lab)?;
    check_allowed(&lab, ALL_ALLOWED)?;
    let policy = [("policy", "AuthorizationPolicy foo/candidate")];
    baseline.wait_counter(
        &lab,
        telemetry::DRY_RUN_DENIALS_TOTAL,
        &policy,
        all_connections,
    )?;
    for (_, node) in fixture::SERVERS {
        let log = lab.daemon_log(node)?;
        let is_logged = log
            .lines()
            .any(|line| line.contains("foo/candidate") && line.contains("dry-run"));
        ensure!(is_logged, "no dry-run denial in the log of {node}");
        let report = telemetry::policy(&lab, node, AUTHORIZATION, "foo", "candidate")?;
        ensure!(report.to_string().contains("\"dryRun\":true"), "{report:#}");
    }

    // A dry-run ALLOW that does not match would deny, and does not.
    file.replace(dry_run(
        "ALLOW",
        "[{from: [{source: {namespaces: [foo]}}]}]",
    ))?;
    wait_synced(&lab)?;
    let baseline = Baseline::take(&lab)?;
    check_allowed(&lab, ALL_ALLOWED)?;
    let not_matched = all_connections - connections(FOO).count();
    let policy = [("policy", NO_ALLOW)];
    baseline.wait_counter(&lab, telemetry::DRY_RUN_DENIALS_TOTAL, &policy, not_matched)?;
    let denials = baseline.denials(&lab)?;
    ensure!(denials.is_empty(), "{denials:#?}");
    Ok(())
}

/// Policies for waypoints and actions that this version does not enforce.
#[test]
fn unenforced_policy_is_reported_and_denies_nothing() -> Result<()> {
    let lab = fixture::up()?;
    for (name, spec) in [
        (
            "waypoint",
            "{targetRefs: [{kind: Service, group: \"\", name: httpbin}], rules: []}",
        ),
        ("audit", "{action: AUDIT, rules: [{}]}"),
        (
            "custom",
            "{action: CUSTOM, provider: {name: ext-authz}, rules: [{}]}",
        ),
    ] {
        let yaml = format!(
            "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, \
             metadata: {{namespace: foo, name: {name}}}, spec: {spec}}}"
        );
        let _file = SourceFile::write(&lab, "unenforced.yaml", yaml)?;
        wait_synced(&lab)?;
        for node in NODES {
            let policy = telemetry::policy(&lab, node, AUTHORIZATION, "foo", name)?;
            let text = policy.to_string().to_lowercase();
            ensure!(text.contains("not_enforced_here"), "{policy:#}");
            ensure!(!telemetry::is_accepted(&policy), "{policy:#}");
        }
        check_allowed(&lab, ALL_ALLOWED).context(name)?;
    }
    Ok(())
}
