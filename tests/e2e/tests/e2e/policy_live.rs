//! A change of policy meets connections that are already open: what is denied from now on is closed
//! within a second, what is allowed goes on as if nothing had happened.

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

/// From the moment before a file is put in its place until a daemon has denied the last connection, in
/// seconds. How soon a busy machine lets the client see it is not the daemon's.
const CLOSED_WITHIN: f64 = 1.0;

/// For what has no promised time.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections of a test, by what becomes of them.
struct Open {
    denied: Vec<(Route, usize)>,
    allowed: Vec<(Route, usize)>,
}

/// So many transfers on each route.
fn each(routes: Vec<Route>, count: usize) -> Vec<(Route, usize)> {
    routes.into_iter().map(|route| (route, count)).collect()
}

impl Open {
    /// Opens all of them, makes the change, and sees that it does what it must to each. `policy` is
    /// what each denial must name.
    fn meets(&self, lab: &Lab, policy: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let start = |routes: &[(Route, usize)]| -> Result<Vec<Transfers>> {
            routes
                .chunk_by(|x, y| x.1 == y.1)
                .map(|same| {
                    let routes: Vec<Route> = same.iter().map(|(route, _)| *route).collect();
                    Transfers::start(lab, &routes, same[0].1)
                })
                .collect()
        };
        let (mut denied, allowed) = (start(&self.denied)?, start(&self.allowed)?);
        let baseline = Baseline::take(lab)?;
        let since = SystemTime::now();
        change()?;
        for transfers in &mut denied {
            transfers.all_reset(lab, PATIENCE)?;
        }
        for transfers in allowed {
            let count = transfers.count();
            transfers.all_intact(lab)?;
            println!("{count} connections were not disturbed");
        }
        baseline.wait_denials(lab, &self.denials(policy))?;
        closed_in_time(lab, &baseline, since)
    }

    fn denials(&self, policy: &str) -> BTreeMap<Denial, usize> {
        let mut denials = BTreeMap::new();
        for ((from, to, _), transfers) in &self.denied {
            // Beside the transfers there is a silent connection on each route.
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

/// All that a change denies was closed within its time.
fn closed_in_time(lab: &Lab, baseline: &Baseline, change: SystemTime) -> Result<()> {
    let longest = baseline
        .longest_open_after(lab, change)?
        .context("nothing was denied")?;
    println!("the last connection was closed {longest:.3} s after the change");
    ensure!(longest <= CLOSED_WITHIN, "one only after {longest:.3} s");
    Ok(())
}

const SERVERS: [&str; 2] = ["foo/near", "foo/far"];

fn authorization(name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: foo, name: {name}}}, \
         spec: {spec}}}"
    )
}

#[test]
fn a_deny_closes_its_half_of_a_hundred_transfers_and_leaves_the_other_alone() -> Result<()> {
    let lab = fixture::up()?;
    let open = Open {
        denied: each(routes(&[PRODUCTPAGE], &SERVERS), 12),
        allowed: [
            each(routes(&[FOO], &SERVERS), 7),
            each(routes(&[LEGACY], &SERVERS), 6),
        ]
        .concat(),
    };
    let deny = authorization(
        "no-productpage",
        "{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/default/sa/productpage]}}]}]}",
    );
    let mut file = None;
    open.meets(&lab, "AuthorizationPolicy foo/no-productpage", || {
        file = Some(SourceFile::write(&lab, "deny.yaml", deny)?);
        Ok(())
    })?;
    // And back again.
    drop(file);
    wait_synced(&lab)?;
    Transfers::start(&lab, &routes(&[PRODUCTPAGE], &SERVERS), 1)?.all_intact(&lab)
}

/// The promise does not depend on how much else there is to read.
#[test]
fn among_thousands_of_policies_a_deny_is_as_quick() -> Result<()> {
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
    let open = Open {
        denied: each(routes(&[PRODUCTPAGE], &SERVERS), 3),
        allowed: each(routes(&[FOO], &SERVERS), 3),
    };
    let deny = authorization(
        "no-productpage",
        "{action: DENY, rules: [{from: [{source: {namespaces: [default]}}]}]}",
    );
    let mut file = None;
    open.meets(&lab, "AuthorizationPolicy foo/no-productpage", || {
        file = Some(SourceFile::write(&lab, "deny.yaml", deny)?);
        Ok(())
    })
}

#[test]
fn strict_closes_what_is_open_in_plaintext_and_nothing_else() -> Result<()> {
    let lab = fixture::up()?;
    let open = Open {
        denied: each(routes(&[LEGACY], &SERVERS), 4),
        allowed: each(routes(&[FOO, BAR, PRODUCTPAGE], &SERVERS), 4),
    };
    let strict = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, \
                  metadata: {namespace: istio-system, name: default}, spec: {mtls: {mode: STRICT}}}";
    let mut file = None;
    open.meets(&lab, "PeerAuthentication istio-system/default", || {
        file = Some(SourceFile::write(&lab, "strict.yaml", strict)?);
        Ok(())
    })
}

#[test]
fn a_pods_label_brings_it_a_policy_that_was_there_before() -> Result<()> {
    let lab = fixture::up()?;
    let quarantine = authorization(
        "quarantine",
        "{selector: {matchLabels: {quarantine: \"yes\"}}, action: DENY, rules: [{}]}",
    );
    let _file = SourceFile::write(&lab, "quarantine.yaml", quarantine)?;
    wait_synced(&lab)?;
    let clients = [PRODUCTPAGE, FOO, BAR, LEGACY];
    for (server, other) in [("foo/far", "foo/near"), ("foo/near", "foo/far")] {
        let open = Open {
            denied: each(routes(&clients, &[server]), 3),
            allowed: each(routes(&clients, &[other]), 3),
        };
        open.meets(&lab, "AuthorizationPolicy foo/quarantine", || {
            lab.label("Pod", server, &[("quarantine", Some("yes"))])
        })?;
        lab.label("Pod", server, &[("quarantine", None)])?;
        wait_synced(&lab)?;
    }
    Ok(())
}

#[test]
fn a_namespaces_label_takes_its_pods_out_of_a_network_policy() -> Result<()> {
    let lab = fixture::up()?;
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: foo, name: friends}, \
                  spec: {podSelector: {}, ingress: [\
                  {from: [{namespaceSelector: {matchLabels: {purpose: production}}}]}, \
                  {from: [{namespaceSelector: {matchExpressions: [\
                  {key: kubernetes.io/metadata.name, operator: In, values: [foo, legacy]}]}}]}]}}";
    let _file = SourceFile::write(&lab, "friends.yaml", policy)?;
    wait_synced(&lab)?;
    let open = Open {
        denied: each(routes(&[BAR], &SERVERS), 6),
        allowed: each(routes(&[FOO, LEGACY], &SERVERS), 3),
    };
    open.meets(
        &lab,
        "NetworkPolicy: no ingress rule matched (foo/friends)",
        || lab.label("Namespace", "bar", &[("purpose", Some("testing"))]),
    )
}

/// The policy speaks of the client's labels, and the client's pod is given another.
#[test]
fn a_clients_label_takes_it_out_of_a_network_policy() -> Result<()> {
    let lab = fixture::up()?;
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: foo, name: frontends}, \
                  spec: {podSelector: {matchLabels: {app: httpbin}}, ingress: [\
                  {from: [{podSelector: {matchLabels: {role: frontend}}}]}, \
                  {from: [{namespaceSelector: {matchLabels: {purpose: production}}}]}]}}";
    let _file = SourceFile::write(&lab, "frontends.yaml", policy)?;
    wait_synced(&lab)?;
    let open = Open {
        denied: each(routes(&[FOO], &SERVERS), 6),
        allowed: each(routes(&[BAR], &SERVERS), 6),
    };
    let denial = "NetworkPolicy: no ingress rule matched (foo/frontends)";
    open.meets(&lab, denial, || {
        lab.label("Pod", FOO, &[("role", Some("backend"))])
    })
}

/// A connection may be on its way in when the policy changes: it is registered before it is judged,
/// so it is either judged by the new policy or found by the check of what is open.
#[test]
fn what_is_opened_at_the_moment_of_a_change_does_not_slip_through() -> Result<()> {
    const ROUNDS: usize = 6;
    let lab = fixture::up()?;
    let meshed: Route = (PRODUCTPAGE, "foo/far", IpFamily::V4);
    let plain: Route = (LEGACY, "foo/near", IpFamily::V6);
    let floods = [
        (meshed, ConnectionFlood::start(&lab, &meshed)?),
        (plain, ConnectionFlood::start(&lab, &plain)?),
    ];
    let deny = authorization("nobody", "{action: DENY, rules: [{}]}");
    for round in 0..ROUNDS {
        for (route, flood) in &floods {
            let before = flood.tried();
            lab.wait_until("the flood to be let in", PATIENCE, || {
                let many = flood.tried() > before + 20;
                (many && established(&lab, route).ok()? > 10).then_some(())
            })
            .with_context(|| format!("round {round}, {route:?}"))?;
        }
        let baseline = Baseline::take(&lab)?;
        let since = SystemTime::now();
        let file = SourceFile::write(&lab, "nobody.yaml", &deny)?;
        for (route, flood) in &floods {
            lab.wait_until("all connections to be gone", PATIENCE, || {
                (established(&lab, route).ok()? == 0).then_some(())
            })
            .with_context(|| format!("round {round}, {route:?}"))?;
            let tried = flood.tried();
            lab.wait_until("the flood to go on", PATIENCE, || {
                (flood.tried() > tried + 20).then_some(())
            })?;
            let slipped = established(&lab, route)?;
            ensure!(slipped == 0, "round {round}: {slipped} got in on {route:?}");
        }
        closed_in_time(&lab, &baseline, since).with_context(|| format!("round {round}"))?;
        drop(file);
        wait_synced(&lab)?;
    }
    Ok(())
}
