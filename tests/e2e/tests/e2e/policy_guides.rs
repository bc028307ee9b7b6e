//! Example policies of published guides allow and deny what the guides describe: over both families, on
//! the same node and across nodes, for HTTP and for a server that sends first.

use std::net::SocketAddr;

use ambit_e2e::access_log;
use ambit_e2e::input::SourceFile;
use ambit_e2e::manifest::Service;
use ambit_e2e::metrics;
use ambit_e2e::policy::connection::{Connection, Outcome};
use ambit_e2e::policy::fixture::{self, BAR, FOO, HTTP, LEGACY, PRODUCTPAGE, TCP};
use ambit_e2e::policy::guides::{AUTHENTICATION, AUTHORIZATION, Guide, NETWORK};
use ambit_e2e::policy::telemetry::{self, Baseline, DENIED};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Options};

/// No policy at all, which allows everything.
const NO_POLICY: Guide = Guide {
    name: "nothing",
    yaml: "",
    allows: &[
        (PRODUCTPAGE, &[HTTP, TCP]),
        (FOO, &[HTTP, TCP]),
        (BAR, &[HTTP, TCP]),
        (LEGACY, &[HTTP, TCP]),
    ],
    denied_by: ["", ""],
};

/// Checks each guide, and that everything is allowed before the first and after the last.
fn check_all(lab: &Lab, guides: &[Guide]) -> Result<()> {
    let mut failures = Vec::new();
    for guide in [&[NO_POLICY], guides, &[NO_POLICY]].concat() {
        if let Err(error) = guide.check(lab) {
            failures.push(format!("{}: {error:#}", guide.name));
        }
    }
    ensure!(
        failures.is_empty(),
        "{} of {} guides fail:\n{}",
        failures.len(),
        guides.len(),
        failures.join("\n\n")
    );
    Ok(())
}

#[test]
fn authorization_policies_allow_and_deny_as_written() -> Result<()> {
    check_all(&fixture::up()?, AUTHORIZATION)
}

#[test]
fn peer_authentication_denies_plaintext_only_where_strict() -> Result<()> {
    check_all(&fixture::up()?, AUTHENTICATION)
}

#[test]
fn network_policies_apply_to_tunnelled_connections() -> Result<()> {
    check_all(&fixture::up()?, NETWORK)
}

#[test]
fn network_policies_are_ignored_with_network_policy_off() -> Result<()> {
    let options = Options {
        daemon_args: vec!["--network-policy".to_owned(), "off".to_owned()],
        ..Options::default()
    };
    let lab = fixture::up_with([], options)?;
    let deny = NETWORK.first().copied().unwrap_or(NO_POLICY);
    Guide {
        allows: NO_POLICY.allows,
        ..deny
    }
    .check(&lab)
}

/// A policy's port is compared with the pod's port, not with the service's.
#[test]
fn policy_port_matches_the_target_port_of_a_service() -> Result<()> {
    let service = Service::new("foo", "httpbin", 80, "http");
    let lab = fixture::up_with([service.into()], Options::default())?;
    for (port, expected) in [(80, Outcome::Served), (HTTP, Outcome::Reset)] {
        let policy = format!(
            "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: foo, name: by-port}}, \
             spec: {{action: DENY, rules: [{{to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]}}}}"
        );
        let _file = SourceFile::write(&lab, "by-port.yaml", policy)?;
        wait_synced(&lab)?;
        for family in IpFamily::ALL {
            let to = SocketAddr::new(lab.service_ip("foo/httpbin", family)?, 80);
            for from in [PRODUCTPAGE, LEGACY] {
                let connection = Connection {
                    from,
                    to: "foo/far",
                    family,
                    port: HTTP,
                };
                let outcome = connection.open_to(&lab, to)?;
                ensure!(
                    outcome == expected,
                    "DENY of port {port}: {from} to {to}: {outcome:?}"
                );
            }
        }
    }
    Ok(())
}

/// The policy of the guide `deny-by-port`, as denials name it.
const DENY_BY_PORT: &str = "AuthorizationPolicy foo/tcp-policy";

#[test]
fn deny_policy_is_named_in_access_log_metrics_and_dump() -> Result<()> {
    let lab = fixture::up()?;
    let baseline = Baseline::take(&lab)?;
    let guide = AUTHORIZATION
        .iter()
        .find(|guide| guide.name == "deny-by-port")
        .context("the guide")?;
    let _file = SourceFile::write(&lab, "p.yaml", guide.yaml)?;
    wait_synced(&lab)?;
    for from in [FOO, LEGACY] {
        let denied = Connection {
            from,
            to: "foo/far",
            family: IpFamily::V4,
            port: TCP,
        };
        let outcome = denied.open(&lab)?;
        ensure!(outcome == Outcome::Reset, "{denied}: {outcome:?}");
    }
    check_access_log(&lab).context("access log")?;
    check_metrics(&lab, &baseline).context("metrics")?;
    check_dump(&lab).context("dump")
}

/// Both sides of a denied connection are logged.
fn check_access_log(lab: &Lab) -> Result<()> {
    for (client, identity) in [
        ("foo", "spiffe://cluster.local/ns/foo/sa/curl"),
        ("legacy", ""),
    ] {
        let fields = [
            ("direction", "inbound"),
            ("reason", DENIED),
            ("policy", DENY_BY_PORT),
            ("src.namespace", client),
            ("src.workload", "curl"),
        ];
        let line = access_log::wait(lab, "b", &fields)?;
        ensure!(
            line.field("src.identity") == identity && line.level == "error",
            "{}",
            line.line
        );
        ensure!(line.field("error").contains(DENY_BY_PORT), "{}", line.line);
    }
    let fields = [
        ("direction", "outbound"),
        ("reason", "connect_rejected"),
        ("src.namespace", "foo"),
    ];
    let line = access_log::wait(lab, "a", &fields)?;
    ensure!(line.field("error").contains("401"), "{}", line.line);
    Ok(())
}

fn check_metrics(lab: &Lab, baseline: &Baseline) -> Result<()> {
    let policy = [("policy", DENY_BY_PORT)];
    baseline.wait_counter(lab, telemetry::DENIALS_TOTAL, &policy, 2)?;
    for (principal, security) in [
        ("spiffe://cluster.local/ns/foo/sa/curl", "mutual_tls"),
        ("unknown", "unknown"),
    ] {
        let labels = [
            ("reporter", "destination"),
            ("response_flags", "DENY"),
            ("source_principal", principal),
            ("connection_security_policy", security),
            ("destination_workload", "far"),
        ];
        let failed = "istio_tcp_connections_failed_total";
        metrics::wait(lab, "b", failed, &labels, 1.0)?;
    }
    let reason = [("direction", "inbound"), ("reason", DENIED)];
    baseline.wait_counter(lab, "ambit_connection_failures_total", &reason, 2)
}

/// Every daemon lists the policy with its action, scope, state and selected pods.
fn check_dump(lab: &Lab) -> Result<()> {
    for node in ["a", "b"] {
        let policy = telemetry::policy(lab, node, "AuthorizationPolicy", "foo", "tcp-policy")?;
        ensure!(telemetry::text(&policy, "action") == "Deny", "{policy:#}");
        ensure!(
            telemetry::text(&policy, "scope") == "WorkloadSelector",
            "{policy:#}"
        );
        ensure!(telemetry::is_accepted(&policy), "{policy:#}");
        let selected = policy
            .get("selects")
            .map(ToString::to_string)
            .unwrap_or_default();
        for pod in ["/foo/near/", "/foo/far/"] {
            ensure!(selected.contains(pod), "{pod} is not in {selected}");
        }
        ensure!(
            !selected.contains("/foo/curl/"),
            "a pod without the label is selected: {selected}"
        );
    }
    Ok(())
}
