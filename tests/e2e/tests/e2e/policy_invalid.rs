//! A policy that is not as it should be never lets anybody in: it denies, it is reported by object
//! and field, and where there was a good version that one goes on.

use ambit_e2e::input::{ExpectedProblem, SourceFile};
use ambit_e2e::policy::connection::Outcome;
use ambit_e2e::policy::fixture::{self, BAR, CLIENTS, FOO, HTTP, LEGACY, PRODUCTPAGE};
use ambit_e2e::policy::guides::{NO_ALLOW, connections};
use ambit_e2e::policy::telemetry::{self, Baseline, in_parallel};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::Lab;

/// Who gets through, to which ports.
type Lets = fn(client: &str, port: u16) -> bool;

/// A policy with a mistake, and what must become of it.
struct Mistake {
    what: &'static str,
    kind: &'static str,
    namespace: &'static str,
    spec: &'static str,
    field: &'static str,
    code: &'static str,
    lets: Lets,
}

const NOBODY: Lets = |_, _| false;
const MESHED: Lets = |client, _| client != LEGACY;

const AUTHORIZATION: &str = "AuthorizationPolicy";
const AUTHENTICATION: &str = "PeerAuthentication";
const NETWORK: &str = "NetworkPolicy";

const MISTAKES: [Mistake; 12] = [
    Mistake {
        what: "an ALLOW of an address that is none",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{rules: [{from: [{source: {ipBlocks: [10.244.1.300]}}]}, {from: [{source: {namespaces: [foo]}}]}]}",
        field: "spec.rules[0].from[0].source.ipBlocks[0]",
        code: "bad_value",
        lets: NOBODY,
    },
    Mistake {
        what: "a DENY of a port that is none, to clients of bar",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}], to: [{operation: {ports: [http]}}]}]}",
        field: "spec.rules[0].to[0].operation.ports[0]",
        code: "bad_value",
        lets: |client, _| client != BAR,
    },
    Mistake {
        what: "a DENY of an address that is none, on one port",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{action: DENY, rules: [{from: [{source: {notIpBlocks: [everywhere]}}], to: [{operation: {ports: [\"9000\"]}}]}]}",
        field: "spec.rules[0].from[0].source.notIpBlocks[0]",
        code: "bad_value",
        lets: |_, port| port == HTTP,
    },
    Mistake {
        what: "an ALLOW of nobody's name",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{rules: [{from: [{source: {principals: [\"\"]}}]}]}",
        field: "spec.rules[0].from[0].source.principals[0]",
        code: "bad_value",
        lets: NOBODY,
    },
    Mistake {
        what: "a field of the future",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{rules: [{from: [{source: {namespaces: [foo], onlyOnSundays: true}}]}]}",
        field: "spec.rules[0].from[0].source.onlyOnSundays",
        code: "unknown_field",
        lets: NOBODY,
    },
    Mistake {
        what: "an action of the future",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{action: WELCOME, rules: [{}]}",
        field: "spec.action",
        code: "unknown_action",
        lets: NOBODY,
    },
    Mistake {
        what: "a selector that cannot be read, of a DENY for plaintext",
        kind: AUTHORIZATION,
        namespace: "foo",
        spec: "{selector: [app, nothing], action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]}",
        field: "spec.selector",
        code: "bad_field",
        lets: MESHED,
    },
    Mistake {
        what: "a rule that is a word",
        kind: AUTHORIZATION,
        namespace: "istio-system",
        spec: "{rules: all}",
        field: "spec.rules",
        code: "bad_field",
        lets: NOBODY,
    },
    Mistake {
        what: "a mode of the future",
        kind: AUTHENTICATION,
        namespace: "foo",
        spec: "{mtls: {mode: RELAXED}}",
        field: "spec.mtls.mode",
        code: "unknown_mode",
        lets: MESHED,
    },
    Mistake {
        what: "a mode of the future for one port",
        kind: AUTHENTICATION,
        namespace: "foo",
        spec: "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {9000: {mode: RELAXED}}}",
        field: "spec.portLevelMtls.9000.mode",
        code: "unknown_mode",
        lets: MESHED,
    },
    Mistake {
        what: "an ipBlock that is none",
        kind: NETWORK,
        namespace: "foo",
        spec: "{podSelector: {matchLabels: {app: httpbin}}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}, {}]}",
        field: "spec.ingress[0].from[0].ipBlock.cidr",
        code: "bad_cidr",
        lets: NOBODY,
    },
    Mistake {
        what: "a podSelector that cannot be read",
        kind: NETWORK,
        namespace: "foo",
        spec: "{podSelector: {matchExpressions: [{key: app, operator: Like, values: [http]}]}, ingress: [{}]}",
        field: "spec.podSelector.matchExpressions[0].operator",
        code: "bad_selector",
        lets: NOBODY,
    },
];

impl Mistake {
    fn yaml(&self, name: &str) -> String {
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
            "{{apiVersion: {api}, kind: {kind}, metadata: {{namespace: {namespace}, name: {name}}}, spec: {spec}}}"
        )
    }

    fn is_reported(&self, lab: &Lab, name: &str) -> Result<()> {
        let object = format!("{} {}/{name}", self.kind, self.namespace);
        let report = ExpectedProblem {
            file: "mistake.yaml",
            object: &object,
            field: self.field,
            code: self.code,
        };
        for node in ["a", "b"] {
            report.wait(lab, node)?;
        }
        Ok(())
    }
}

/// Every connection of the town goes as this says.
fn lets(lab: &Lab, lets: Lets) -> Result<()> {
    let wrong = in_parallel(CLIENTS, |client| {
        let mut wrong = Vec::new();
        for connection in connections(client) {
            let wanted = match lets(client, connection.port) {
                true => Outcome::Answered,
                false => Outcome::Reset,
            };
            let seen = connection.open(lab)?;
            if seen != wanted {
                wrong.push(format!("{connection}: {seen:?}"));
            }
        }
        Ok(wrong)
    })?;
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn each_mistake_denies_and_is_reported_by_object_and_field() -> Result<()> {
    let lab = fixture::up()?;
    let mut broken = Vec::new();
    for mistake in &MISTAKES {
        let file = SourceFile::write(&lab, "mistake.yaml", mistake.yaml("mistake"))?;
        let result = mistake
            .is_reported(&lab, "mistake")
            .and_then(|()| is_invalid(&lab, mistake))
            .and_then(|()| lets(&lab, mistake.lets));
        if let Err(error) = result {
            broken.push(format!("{}: {error:#}", mistake.what));
        }
        drop(file);
        wait_synced(&lab)?;
    }
    ensure!(broken.is_empty(), "{}", broken.join("\n\n"));
    lets(&lab, |_, _| true)
}

fn is_invalid(lab: &Lab, mistake: &Mistake) -> Result<()> {
    for node in ["a", "b"] {
        let policy = telemetry::policy(lab, node, mistake.kind, mistake.namespace, "mistake")?;
        ensure!(!telemetry::is_accepted(&policy), "{policy:#}");
        ensure!(
            policy.to_string().contains(mistake.field),
            "{} is not named: {policy:#}",
            mistake.field
        );
    }
    Ok(())
}

/// Whatever is wrong with the new version, the good one goes on, and the mistake is told.
#[test]
fn a_broken_version_leaves_the_good_one_in_force() -> Result<()> {
    let lab = fixture::up()?;
    for (kind, spec, good) in [
        (
            AUTHORIZATION,
            "{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/productpage]}}]}]}",
            (|client, _| client != PRODUCTPAGE) as Lets,
        ),
        (AUTHENTICATION, "{mtls: {mode: STRICT}}", MESHED),
        (
            NETWORK,
            "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}",
            |client, _| client == FOO,
        ),
    ] {
        let of_kind = || {
            MISTAKES
                .iter()
                .filter(|mistake| mistake.kind == kind && mistake.namespace == "foo")
        };
        let first = of_kind().next().context("no mistake")?;
        let good_version = Mistake { spec, ..*first };
        let file = SourceFile::write(&lab, "mistake.yaml", good_version.yaml("policy"))?;
        wait_synced(&lab)?;
        lets(&lab, good).context("the good version")?;
        for mistake in of_kind() {
            file.replace(mistake.yaml("policy"))?;
            mistake.is_reported(&lab, "policy")?;
            lets(&lab, good).context(mistake.what)?;
        }
        file.replace("kind: [")?;
        wait_synced(&lab)?;
        lets(&lab, good).context("no YAML at all")?;
        // The last mistake is mended, and the next version holds.
        file.replace(good_version.yaml("policy").replace("foo,", "bar,"))?;
        wait_synced(&lab)?;
        lets(&lab, |_, _| true).context("mended")?;
    }
    Ok(())
}

/// Nothing is known of a good version then, whether the new one has a mistake or is no YAML at all.
#[test]
fn a_daemon_that_starts_with_a_broken_policy_denies() -> Result<()> {
    let lab = fixture::up()?;
    let mistake = MISTAKES.first().context("no mistake")?;
    let broken = mistake.yaml("policy");
    let good = broken.replace("10.244.1.300", "10.244.1.0/24, \"fd00:10:244:1::/64\"");
    let from_node_a: Lets = |client, _| client != BAR;
    let file = SourceFile::write(&lab, "mistake.yaml", &good)?;
    for (broken, object, field, code) in [
        (
            broken,
            "AuthorizationPolicy foo/policy",
            mistake.field,
            mistake.code,
        ),
        (format!("{good} ]"), "", "", "yaml_syntax"),
    ] {
        file.replace(&good)?;
        wait_synced(&lab)?;
        lets(&lab, from_node_a).context("the good version")?;
        file.replace(broken)?;
        let report = ExpectedProblem {
            file: "mistake.yaml",
            object,
            field,
            code,
        };
        for node in ["a", "b"] {
            report.wait(&lab, node)?;
        }
        lets(&lab, from_node_a).context("before the restart")?;
        for node in ["a", "b"] {
            lab.stop_daemon(node)?;
            lab.start_daemon(node)?;
        }
        wait_synced(&lab)?;
        lets(&lab, NOBODY).with_context(|| format!("after the restart, {code}"))?;
        for node in ["a", "b"] {
            report.wait(&lab, node)?;
            is_invalid_in(&lab, node)?;
        }
    }
    file.remove()?;
    wait_synced(&lab)?;
    lets(&lab, |_, _| true)
}

fn is_invalid_in(lab: &Lab, node: &str) -> Result<()> {
    let policy = telemetry::policy(lab, node, AUTHORIZATION, "foo", "policy")?;
    ensure!(!telemetry::is_accepted(&policy), "{policy:#}");
    Ok(())
}

#[test]
fn a_policy_on_trial_is_counted_and_logged_and_denies_nobody() -> Result<()> {
    let lab = fixture::up()?;
    let trial = |action: &str, rules: &str| {
        format!(
            "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: foo, name: trial, \
             annotations: {{istio.io/dry-run: \"true\"}}}}, spec: {{action: {action}, rules: {rules}}}}}"
        )
    };
    let everybody = CLIENTS.into_iter().flat_map(connections).count();
    let file = SourceFile::write(&lab, "trial.yaml", trial("DENY", "[{}]"))?;
    wait_synced(&lab)?;
    let baseline = Baseline::take(&lab)?;
    lets(&lab, |_, _| true)?;
    let policy = [("policy", "AuthorizationPolicy foo/trial")];
    baseline.wait_counter(&lab, telemetry::DRY_RUN_DENIALS_TOTAL, &policy, everybody)?;
    for (_, node) in fixture::SERVERS {
        let said = lab.daemon_log(node)?;
        let line = said
            .lines()
            .find(|line| line.contains("foo/trial") && line.contains("dry-run"));
        println!("{}", line.context("nothing in the log")?);
        let report = telemetry::policy(&lab, node, AUTHORIZATION, "foo", "trial")?;
        ensure!(report.to_string().contains("\"dryRun\":true"), "{report:#}");
    }

    // An ALLOW on trial takes nothing from anybody.
    file.replace(trial("ALLOW", "[{from: [{source: {namespaces: [foo]}}]}]"))?;
    wait_synced(&lab)?;
    let baseline = Baseline::take(&lab)?;
    lets(&lab, |_, _| true)?;
    let others = everybody - connections(FOO).count();
    baseline.wait_counter(
        &lab,
        telemetry::DRY_RUN_DENIALS_TOTAL,
        &[("policy", NO_ALLOW)],
        others,
    )?;
    ensure!(
        baseline.denials(&lab)?.is_empty(),
        "{:#?}",
        baseline.denials(&lab)?
    );
    Ok(())
}

/// What belongs elsewhere is said to be so, and what this version does not enforce even more so.
#[test]
fn what_is_not_enforced_here_is_said() -> Result<()> {
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
        let _file = SourceFile::write(&lab, "elsewhere.yaml", yaml)?;
        wait_synced(&lab)?;
        for node in ["a", "b"] {
            let policy = telemetry::policy(&lab, node, AUTHORIZATION, "foo", name)?;
            let said = policy.to_string().to_lowercase();
            ensure!(said.contains("not_enforced_here"), "{policy:#}");
            ensure!(!telemetry::is_accepted(&policy), "{policy:#}");
        }
        lets(&lab, |_, _| true).context(name)?;
    }
    Ok(())
}
