//! Policies as guides tell people to write them do what the guides say: over both families, on the
//! same node and across nodes, where the client asks and where the server speaks first.

use std::net::SocketAddr;

use ambit_e2e::access_log;
use ambit_e2e::input::SourceFile;
use ambit_e2e::manifest::Service;
use ambit_e2e::metrics;
use ambit_e2e::policy::connection::{Connection, Outcome};
use ambit_e2e::policy::fixture::{self, FOO, HTTP, LEGACY, PRODUCTPAGE, TCP};
use ambit_e2e::policy::guides::{AUTHENTICATION, AUTHORIZATION, Guide, NETWORK};
use ambit_e2e::policy::telemetry::{self, Baseline, DENIED};
use ambit_e2e::sync::wait_synced;
use anyhow::{Result, ensure};
use lab::{IpFamily, Lab, Options};

/// Without a policy everybody reaches everything, before and after.
const NOTHING: Guide = Guide {
    name: "nothing",
    yaml: "",
    allows: &[
        (fixture::PRODUCTPAGE, &[HTTP, TCP]),
        (fixture::FOO, &[HTTP, TCP]),
        (fixture::BAR, &[HTTP, TCP]),
        (fixture::LEGACY, &[HTTP, TCP]),
    ],
    denied_by: ["", ""],
};

fn all_hold(lab: &Lab, guides: &[Guide]) -> Result<()> {
    let mut broken = Vec::new();
    for guide in [&[NOTHING], guides, &[NOTHING]].concat() {
        if let Err(error) = guide.holds(lab) {
            broken.push(format!("{}: {error:#}", guide.name));
        }
    }
    ensure!(
        broken.is_empty(),
        "{} of {} do not:\n{}",
        broken.len(),
        guides.len(),
        broken.join("\n\n")
    );
    Ok(())
}

#[test]
fn authorization_policies_allow_and_deny_as_written() -> Result<()> {
    all_hold(&fixture::up()?, AUTHORIZATION)
}

#[test]
fn peer_authentication_refuses_plaintext_where_it_is_strict_and_only_there() -> Result<()> {
    all_hold(&fixture::up()?, AUTHENTICATION)
}

#[test]
fn network_policies_hold_behind_the_tunnel() -> Result<()> {
    all_hold(&fixture::up()?, NETWORK)
}

#[test]
fn network_policies_are_not_looked_at_where_the_flag_says_so() -> Result<()> {
    let options = Options {
        daemon_args: vec!["--network-policy".to_owned(), "off".to_owned()],
        ..Options::default()
    };
    let lab = fixture::up_with([], options)?;
    let deny = NETWORK.first().copied().unwrap_or(NOTHING);
    Guide {
        allows: NOTHING.allows,
        ..deny
    }
    .holds(&lab)
}

/// The port of a policy is the pod's own, whatever the service in front of it has.
#[test]
fn a_policys_port_is_the_pods_own() -> Result<()> {
    let service = Service::new("foo", "httpbin", 80, "http");
    let lab = fixture::up_with([service.into()], Options::default())?;
    for (port, wanted) in [(80, Outcome::Answered), (HTTP, Outcome::Reset)] {
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
                let seen = connection.open_to(&lab, to)?;
                ensure!(seen == wanted, "port {port}: {from} to {to}: {seen:?}");
            }
        }
    }
    Ok(())
}

/// What an operator reads on both sides of one denied connection.
#[test]
fn a_denial_names_its_policy_wherever_an_operator_looks() -> Result<()> {
    let lab = fixture::up()?;
    let baseline = Baseline::take(&lab)?;
    let guide = AUTHORIZATION
        .iter()
        .find(|guide| guide.name == "deny-by-port");
    let _file = SourceFile::write(&lab, "p.yaml", guide.map_or("", |guide| guide.yaml))?;
    wait_synced(&lab)?;
    for from in [FOO, LEGACY] {
        let denied = Connection {
            from,
            to: "foo/far",
            family: IpFamily::V4,
            port: TCP,
        };
        let seen = denied.open(&lab)?;
        ensure!(seen == Outcome::Reset, "{denied}: {seen:?}");
    }
    let policy = "AuthorizationPolicy foo/tcp-policy";
    let told = [
        ("direction", "inbound"),
        ("reason", DENIED),
        ("policy", policy),
    ];
    for (client, identity) in [
        ("foo", "spiffe://cluster.local/ns/foo/sa/curl"),
        ("legacy", ""),
    ] {
        let client = [("src.namespace", client), ("src.workload", "curl")];
        let line = access_log::wait(&lab, "b", &[&told[..], &client].concat())?;
        ensure!(
            line.field("src.identity") == identity && line.level == "error",
            "{}",
            line.line
        );
        ensure!(line.field("error").contains(policy), "{}", line.line);
    }
    // The other side knows that it was refused, and by whom.
    let refused = [("direction", "outbound"), ("reason", "connect_rejected")];
    let line = access_log::wait(
        &lab,
        "a",
        &[&refused[..], &[("src.namespace", "foo")]].concat(),
    )?;
    ensure!(line.field("error").contains("401"), "{}", line.line);

    baseline.wait_counter(&lab, telemetry::DENIALS_TOTAL, &[("policy", policy)], 2)?;
    for (principal, security) in [
        ("spiffe://cluster.local/ns/foo/sa/curl", "mutual_tls"),
        ("unknown", "unknown"),
    ] {
        let failed = [
            ("reporter", "destination"),
            ("response_flags", "DENY"),
            ("source_principal", principal),
            ("connection_security_policy", security),
            ("destination_workload", "far"),
        ];
        metrics::wait(
            &lab,
            "b",
            "istio_tcp_connections_failed_total",
            &failed,
            1.0,
        )?;
    }
    let reason = [("direction", "inbound"), ("reason", DENIED)];
    baseline.wait_counter(&lab, "ambit_connection_failures_total", &reason, 2)
}

/// In the dump of each daemon, for `istioctl` and for people.
#[test]
fn the_dump_says_what_became_of_each_policy() -> Result<()> {
    let lab = fixture::up()?;
    let guide = AUTHORIZATION
        .iter()
        .find(|guide| guide.name == "deny-by-port");
    let _file = SourceFile::write(&lab, "p.yaml", guide.map_or("", |guide| guide.yaml))?;
    wait_synced(&lab)?;
    for node in ["a", "b"] {
        let policy = telemetry::policy(&lab, node, "AuthorizationPolicy", "foo", "tcp-policy")?;
        println!("{policy:#}");
        ensure!(telemetry::text(&policy, "action") == "Deny", "{policy:#}");
        ensure!(
            telemetry::text(&policy, "scope") == "WorkloadSelector",
            "{policy:#}"
        );
        ensure!(telemetry::is_accepted(&policy), "{policy:#}");
        let selects = policy
            .get("selects")
            .map(ToString::to_string)
            .unwrap_or_default();
        for pod in ["/foo/near/", "/foo/far/"] {
            ensure!(selects.contains(pod), "{pod} is not in {selects}");
        }
        ensure!(!selects.contains("/foo/curl/"), "{selects}");
    }
    Ok(())
}
