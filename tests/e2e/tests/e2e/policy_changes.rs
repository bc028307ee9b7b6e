//! What a policy change does to open connections: a connection that the new policy denies is reset
//! within a second, and a connection that it allows is not disturbed.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use ambit_e2e::input::SourceFile;
use ambit_e2e::manifest;
use ambit_e2e::policy::fixture::{self, BAR, FOO, HTTP, LEGACY, PRODUCTPAGE, TCP};
use ambit_e2e::policy::telemetry::{Baseline, Denial};
use ambit_e2e::policy::transfers::{ConnectionFlood, Route, Transfers, established, routes};
use ambit_e2e::sync::wait_synced;
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab};

/// Limit, in seconds, from just before a file is put in place until a daemon has closed the last
/// connection that it denies. The daemon's own log is used, because a busy machine delays what the
/// client observes.
const MAX_CLOSE_SECONDS: f64 = 1.0;

/// Limit of waits whose duration is not under test.
const DEADLINE: Duration = Duration::from_secs(20);

const SERVERS: [&str; 2] = ["foo/near", "foo/far"];

/// Open connections of a test by their expected outcome, as routes with a number of transfers each.
struct OpenConnections {
    denied: Vec<(Route, usize)>,
    allowed: Vec<(Route, usize)>,
}

/// The same number of transfers on each route.
fn transfers(routes: Vec<Route>, count: usize) -> Vec<(Route, usize)> {
    routes.into_iter().map(|route| (route, count)).collect()
}

impl OpenConnections {
    /// Opens all connections, makes the change and checks the outcome of each. Every denial must
    /// name `policy`.
    fn check_change(
        &self,
        lab: &Lab,
        policy: &str,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (mut denied, allowed) = (start(lab, &self.denied)?, start(lab, &self.allowed)?);
        let baseline = Baseline::take(lab)?;
        let changed_at = SystemTime::now();
        change()?;
        for transfers in &mut denied {
            transfers.wait_all_reset(lab, DEADLINE)?;
        }
        for transfers in allowed {
            let count = transfers.count();
            transfers.wait_all_complete(lab)?;
            println!("{count} connections were not disturbed");
        }
        baseline.wait_denials(lab, &self.denials(policy))?;
        check_close_time(lab, &baseline, changed_at)
    }

    fn denials(&self, policy: &str) -> BTreeMap<Denial, usize> {
        let mut denials = BTreeMap::new();
        for ((from, to, _), transfers) in &self.denied {
            // Each route also has one idle connection.
            for (port, count) in [(HTTP, *transfers), (TCP, 1)] {
                let denial = (
                    (*from).to_owned(),
                    (*to).to_owned(),
                    port,
                    policy.to_owned(),
                );
                *denials.entry(denial).or_insert(0) += count;
            }
        }
        denials
    }
}

/// Starts the transfers, grouped by their number per route.
fn start(lab: &Lab, routes: &[(Route, usize)]) -> Result<Vec<Transfers>> {
    routes
        .chunk_by(|x, y| x.1 == y.1)
        .map(|group| {
            let routes: Vec<Route> = group.iter().map(|(route, _)| *route).collect();
            Transfers::start(lab, &routes, group[0].1)
        })
        .collect()
}

/// Every connection that a change denies was closed within [`MAX_CLOSE_SECONDS`].
fn check_close_time(lab: &Lab, baseline: &Baseline, changed_at: SystemTime) -> Result<()> {
    let longest = baseline
        .longest_open_after(lab, changed_at)?
        .context("no connection was denied")?;
    println!("the last connection was closed {longest:.3} s after the change");
    ensure!(
        longest <= MAX_CLOSE_SECONDS,
        "the last connection was closed {longest:.3} s after the change"
    );
    Ok(())
}

/// An AuthorizationPolicy in namespace `foo`.
fn authorization(name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: foo, name: {name}}}, \
         spec: {spec}}}"
    )
}

#[test]
fn deny_resets_open_connections_that_it_matches_and_no_others() -> Result<()> {
    let lab = fixture::up()?;
    let open = OpenConnections {
        denied: transfers(routes(&[PRODUCTPAGE], &SERVERS), 12),
        allowed: [
            transfers(routes(&[FOO], &SERVERS), 7),
            transfers(routes(&[LEGACY], &SERVERS), 6),
        ]
        .concat(),
    };
    let deny = authorization(
        "no-productpage",
        "{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/productpage]}}]}]}",
    );
    let mut file = None;
    open.check_change(&lab, "AuthorizationPolicy foo/no-productpage", || {
        file = Some(SourceFile::write(&lab, "deny.yaml", deny)?);
        Ok(())
    })?;
    // Without the policy the client is served again.
    drop(file);
    wait_synced(&lab)?;
    Transfers::start(&lab, &routes(&[PRODUCTPAGE], &SERVERS), 1)?.wait_all_complete(&lab)
}

/// The limit also holds with 3000 other policies.
#[test]
fn deny_among_thousands_of_policies_resets_open_connections_in_time() -> Result<()> {
    let lab = fixture::up()?;
    let many = (0..3000).map(|number| {
        let spec = format!(
            "{{selector: {{matchLabels: {{app: app-{}}}}}, action: DENY, \
             rules: [{{from: [{{source: {{ipBlocks: [192.0.2.{}], namespaces: [n{number}]}}}}]}}]}}",
            number % 100,
            number % 250
        );
        authorization(&format!("many-{number}"), &spec)
    });
    let _many = SourceFile::write(&lab, "many.yaml", manifest::all(many))?;
    wait_synced(&lab)?;
    let open = OpenConnections {
        denied: transfers(routes(&[PRODUCTPAGE], &SERVERS), 3),
        allowed: transfers(routes(&[FOO], &SERVERS), 3),
    };
    let deny = authorization(
        "no-productpage",
        "{action: DENY, rules: [{from: [{source: {namespaces: [default]}}]}]}",
    );
    let mut file = None;
    open.check_change(&lab, "AuthorizationPolicy foo/no-productpage", || {
        file = Some(SourceFile::write(&lab, "deny.yaml", deny)?);
        Ok(())
    })
}

#[test]
fn strict_resets_open_plaintext_connections_and_no_others() -> Result<()> {
    let lab = fixture::up()?;
    let open = OpenConnections {
        denied: transfers(routes(&[LEGACY], &SERVERS), 4),
        allowed: transfers(routes(&[FOO, BAR, PRODUCTPAGE], &SERVERS), 4),
    };
    let strict = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
                  metadata: {namespace: istio-system, name: default}, spec: {mtls: {mode: STRICT}}}";
    let mut file = None;
    open.check_change(&lab, "PeerAuthentication istio-system/default", || {
        file = Some(SourceFile::write(&lab, "strict.yaml", strict)?);
        Ok(())
    })
}

#[test]
fn server_label_selected_by_a_deny_resets_connections_of_that_server() -> Result<()> {
    let lab = fixture::up()?;
    let quarantine = authorization(
        "quarantine",
        "{selector: {matchLabels: {quarantine: \"yes\"}}, action: DENY, rules: [{}]}",
    );
    let _file = SourceFile::write(&lab, "quarantine.yaml", quarantine)?;
    wait_synced(&lab)?;
    let clients = [PRODUCTPAGE, FOO, BAR, LEGACY];
    for (server, other) in [("foo/far", "foo/near"), ("foo/near", "foo/far")] {
        let open = OpenConnections {
            denied: transfers(routes(&clients, &[server]), 3),
            allowed: transfers(routes(&clients, &[other]), 3),
        };
        open.check_change(&lab, "AuthorizationPolicy foo/quarantine", || {
            lab.label("Pod", server, &[("quarantine", Some("yes"))])
        })?;
        lab.label("Pod", server, &[("quarantine", None)])?;
        wait_synced(&lab)?;
    }
    Ok(())
}

#[test]
fn client_namespace_label_change_resets_connections_no_longer_allowed() -> Result<()> {
    let lab = fixture::up()?;
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: foo, name: friends}, \
                  spec: {podSelector: {}, ingress: [\
                  {from: [{namespaceSelector: {matchLabels: {purpose: production}}}]}, \
                  {from: [{namespaceSelector: {matchExpressions: [\
                  {key: kubernetes.io/metadata.name, operator: In, values: [foo, legacy]}]}}]}]}}";
    let _file = SourceFile::write(&lab, "friends.yaml", policy)?;
    wait_synced(&lab)?;
    let open = OpenConnections {
        denied: transfers(routes(&[BAR], &SERVERS), 6),
        allowed: transfers(routes(&[FOO, LEGACY], &SERVERS), 3),
    };
    open.check_change(
        &lab,
        "NetworkPolicy: no ingress rule matched (foo/friends)",
        || lab.label("Namespace", "bar", &[("purpose", Some("testing"))]),
    )
}

#[test]
fn client_pod_label_change_resets_connections_no_longer_allowed() -> Result<()> {
    let lab = fixture::up()?;
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: foo, name: frontends}, \
                  spec: {podSelector: {matchLabels: {app: httpbin}}, ingress: [\
                  {from: [{podSelector: {matchLabels: {role: frontend}}}]}, \
                  {from: [{namespaceSelector: {matchLabels: {purpose: production}}}]}]}}";
    let _file = SourceFile::write(&lab, "frontends.yaml", policy)?;
    wait_synced(&lab)?;
    let open = OpenConnections {
        denied: transfers(routes(&[FOO], &SERVERS), 6),
        allowed: transfers(routes(&[BAR], &SERVERS), 6),
    };
    let denial = "NetworkPolicy: no ingress rule matched (foo/frontends)";
    open.check_change(&lab, denial, || {
        lab.label("Pod", FOO, &[("role", Some("backend"))])
    })
}

/// A connection is registered before its policy check. So a connection that is opened during a change
/// is either checked against the new policy or found by the check of open connections.
#[test]
fn connections_opened_during_a_change_are_all_closed() -> Result<()> {
    const ROUNDS: usize = 6;
    let lab = fixture::up()?;
    let meshed: Route = (PRODUCTPAGE, "foo/far", IpFamily::V4);
    let plain: Route = (LEGACY, "foo/near", IpFamily::V6);
    let floods = [
        (meshed, ConnectionFlood::start(&lab, &meshed)?),
        (plain, ConnectionFlood::start(&lab, &plain)?),
    ];
    let deny = authorization("deny-all", "{action: DENY, rules: [{}]}");
    for round in 0..ROUNDS {
        for (route, flood) in &floods {
            let before = flood.attempts();
            lab.wait_until("the flood to be admitted", DEADLINE, || {
                let has_attempts = flood.attempts() > before + 20;
                (has_attempts && established(&lab, route).ok()? > 10).then_some(())
            })
            .with_context(|| format!("round {round}, {route:?}"))?;
        }
        let baseline = Baseline::take(&lab)?;
        let changed_at = SystemTime::now();
        let file = SourceFile::write(&lab, "deny-all.yaml", &deny)?;
        for (route, flood) in &floods {
            lab.wait_until("all connections to be closed", DEADLINE, || {
                (established(&lab, route).ok()? == 0).then_some(())
            })
            .with_context(|| format!("round {round}, {route:?}"))?;
            let attempts = flood.attempts();
            lab.wait_until("20 more attempts", DEADLINE, || {
                (flood.attempts() > attempts + 20).then_some(())
            })?;
            let admitted = established(&lab, route)?;
            ensure!(
                admitted == 0,
                "round {round}: {admitted} denied connections are open on {route:?}"
            );
        }
        check_close_time(&lab, &baseline, changed_at).with_context(|| format!("round {round}"))?;
        drop(file);
        wait_synced(&lab)?;
    }
    Ok(())
}
