//! Pods that join and leave the mesh, or are replaced, under traffic: established connections continue,
//! new ones take the new path, and no rules remain.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ambit_e2e::access_log;
use ambit_e2e::capture::{
    MARKER, REPAIR_DEADLINE, Traffic, network_state, server, shell, up, wait_for_response,
    wait_restored,
};
use ambit_e2e::manifest::{self, Pod, namespace};
use ambit_e2e::programs::{PORT, curl, url};
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Lab, Location};
use serde_json::json;

const AMBIENT: (&str, Option<&str>) = ("istio.io/dataplane-mode", Some("ambient"));
const NONE: (&str, Option<&str>) = ("istio.io/dataplane-mode", Some("none"));

#[test]
fn server_replaced_at_the_same_address_is_reached_with_its_new_identity() -> Result<()> {
    let lab = up([
        namespace("shop", Some("ambient")),
        Pod::new("shop", "client").on("a").into(),
    ])?;
    let server_at = |name: &str, ip: &str| {
        Pod::new("shop", name)
            .on("b")
            .runs(server(name))
            .metadata("annotations", json!({"lab.ambit.dev/ip": ip}))
    };
    lab.apply(String::from(
        Pod::new("shop", "old").on("b").runs(server("old")),
    ))?;
    lab.wait_ready()?;
    let ip = lab.pod_ip("old", IpFamily::V4)?;
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    let traffic = Traffic::start(&lab, "client", ip, MARKER)?;

    lab.delete_pod_with_grace("old", Duration::ZERO)?;
    lab.apply(String::from(server_at("new", &ip.to_string())))?;
    wait_for_response(&lab, "client", ip, "new")?;
    ensure!(
        lab.pod_ip("new", IpFamily::V4)? == ip,
        "the new pod has another address"
    );
    traffic.wait_new_flowing(&lab, REPAIR_DEADLINE)?;

    let responses = traffic.responses();
    let first = responses
        .iter()
        .position(|response| response.ends_with(" new"))
        .context("no response of the new pod")?;
    ensure!(
        !responses[first..]
            .iter()
            .any(|response| response.ends_with(" old")),
        "a response of the old pod after one of the new pod: {responses:?}"
    );
    let identity = "spiffe://cluster.local/ns/shop/sa/new";
    access_log::wait(
        &lab,
        "a",
        &[
            ("dst.workload", "new"),
            ("dst.identity", identity),
            ("reason", "closed"),
        ],
    )?;
    let has_other_identity = |line: &access_log::Entry| {
        line.field("dst.workload") == "new" && line.field("dst.identity") != identity
    };
    ensure!(
        !access_log::lines(&lab, "a")?.iter().any(has_other_identity),
        "a connection to the new pod has another identity"
    );
    ensure!(bridge.occurrences(MARKER)? == 0, "plaintext on the bridge");
    Ok(())
}

#[test]
fn client_replaced_at_the_same_address_connects_with_its_new_identity() -> Result<()> {
    let client_at = |name: &str, ip: Option<IpAddr>| {
        let pod = Pod::new("shop", name).on("a");
        match ip {
            Some(ip) => pod.metadata("annotations", json!({"lab.ambit.dev/ip": ip.to_string()})),
            None => pod,
        }
    };
    let lab = up([
        namespace("shop", Some("ambient")),
        client_at("first", None).into(),
        Pod::new("shop", "web").on("b").runs(server("web")).into(),
    ])?;
    let web = lab.pod_ip("web", IpFamily::V4)?;
    wait_for_response(&lab, "first", web, "web")?;
    let ip = lab.pod_ip("first", IpFamily::V4)?;
    lab.delete_pod_with_grace("first", Duration::ZERO)?;
    lab.apply(String::from(client_at("second", Some(ip))))?;
    lab.wait_ready()?;
    wait_for_response(&lab, "second", web, "web")?;
    access_log::wait(
        &lab,
        "b",
        &[
            ("src.identity", "spiffe://cluster.local/ns/shop/sa/second"),
            ("direction", "inbound"),
        ],
    )?;
    let lines = access_log::lines(&lab, "b")?;
    let last = lines
        .iter()
        .rfind(|line| line.field("direction") == "inbound")
        .context("no inbound connection in the access log")?;
    ensure!(last.field("src.workload") == "second", "{}", last.line);
    ensure!(
        last.field("src.addr").starts_with(&ip.to_string()),
        "{}",
        last.line
    );
    Ok(())
}

#[test]
fn established_connections_survive_opt_out_and_no_rules_remain() -> Result<()> {
    let out = Pod::new("shop", "client").on("a").label(NONE.0, "none");
    let lab = up([
        namespace("shop", Some("ambient")),
        out.into(),
        Pod::new("shop", "web").on("b").runs(server("web")).into(),
    ])?;
    let before = network_state(&lab, "client")?;
    lab.label("Pod", "shop/client", &[AMBIENT])?;
    lab.wait_workload_state("shop/client", Some("enrolled"), REPAIR_DEADLINE)?;
    ensure!(
        network_state(&lab, "client")? != before,
        "the opt-in added no rules"
    );

    let bridge = lab.capture(Location::Fabric, "tcp")?;
    let web = lab.pod_ip("web", IpFamily::V4)?;
    let mut traffic = Traffic::start(&lab, "client", web, MARKER)?;
    ensure!(
        bridge.occurrences(MARKER)? == 0,
        "plaintext on the bridge while the pod was in the mesh"
    );

    lab.label("Pod", "shop/client", &[NONE])?;
    lab.wait_until("new connections in plaintext", REPAIR_DEADLINE, || {
        (bridge.occurrences(MARKER).ok()? > 0).then_some(())
    })?;
    traffic.wait_flowing(&lab, REPAIR_DEADLINE)?;
    traffic.close_established();
    wait_restored(&lab, "client", &before, REPAIR_DEADLINE)?;
    traffic.wait_new_flowing(&lab, REPAIR_DEADLINE)
}

#[test]
fn foreign_tables_and_rules_in_a_pod_are_kept() -> Result<()> {
    let lab = up([
        namespace("shop", Some("ambient")),
        Pod::new("shop", "client")
            .on("a")
            .label(NONE.0, "none")
            .into(),
        Pod::new("shop", "web").on("b").runs(server("web")).into(),
    ])?;
    let web = lab.pod_ip("web", IpFamily::V4)?;
    shell(
        &lab,
        "client",
        "nft add table ip foreign; nft add chain ip foreign out '{ type nat hook output priority -100; }'; \
         nft add rule ip foreign out tcp dport 9 redirect to :10; nft add table inet ambit-not; \
         ip rule add fwmark 0x7/0x7 lookup 107; ip route add blackhole 192.0.2.0/24 table 107",
    )?;
    let before = network_state(&lab, "client")?;
    let foreign_state = || {
        shell(
            &lab,
            "client",
            "nft -s list table ip foreign; nft list table inet ambit-not; ip rule show table 107; ip route show table 107",
        )
    };
    let before_enrolment = foreign_state()?;
    lab.label("Pod", "shop/client", &[AMBIENT])?;
    lab.wait_workload_state("shop/client", Some("enrolled"), REPAIR_DEADLINE)?;
    wait_for_response(&lab, "client", web, "web")?;
    ensure!(
        foreign_state()? == before_enrolment,
        "enrolment changed a foreign table or rule"
    );
    let enrolled = network_state(&lab, "client")?;
    shell(&lab, "client", "nft flush table inet ambit")?;
    wait_restored(&lab, "client", &enrolled, REPAIR_DEADLINE)?;
    ensure!(
        foreign_state()? == before_enrolment,
        "a repair changed a foreign table or rule"
    );
    lab.label("Pod", "shop/client", &[NONE])?;
    wait_restored(&lab, "client", &before, REPAIR_DEADLINE)
}

/// 20 pods on alternating nodes, each a server and a client.
fn twenty_pods() -> Vec<Pod> {
    let pod = |number: usize| {
        let name = format!("p{number:02}");
        Pod::new("shop", &name)
            .on(if number.is_multiple_of(2) { "a" } else { "b" })
            .runs(server(&name))
    };
    (0..20).map(pod).collect()
}

/// Sends a request from each pod to the next one, which is on the other node.
fn check_requests_in_a_ring(lab: &Lab) -> Result<()> {
    for number in 0..20 {
        let (from, to) = (
            format!("p{number:02}"),
            format!("p{:02}", (number + 1) % 20),
        );
        let request = curl(
            lab,
            &Location::Pod(from.clone()),
            &url(lab.pod_ip(&to, IpFamily::V4)?, PORT),
            &["-H", &format!("X-Marker: {MARKER}")],
        );
        let response = request.with_context(|| format!("{from} to {to}"))?.body;
        ensure!(
            response == format!("{MARKER} {to}"),
            "{from} to {to}: {response}"
        );
    }
    Ok(())
}

#[test]
fn twenty_pods_are_recaptured_after_a_daemon_kill_with_flushed_and_replaced_pods() -> Result<()> {
    let lab = up([namespace("shop", Some("ambient"))])?;
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    lab.apply(manifest::all(twenty_pods()))?;
    lab.wait_ready()?;
    check_requests_in_a_ring(&lab)?;

    // On node a the daemon is killed, three pods lose their rules and three are replaced.
    lab.kill_daemon("a")?;
    let marked_request = ["curl", "-m", "1", "-H", &format!("X-Marker: {MARKER}")];
    for pod in ["p00", "p02", "p04"] {
        shell(&lab, pod, "nft flush ruleset")?;
        let to = url(lab.pod_ip("p01", IpFamily::V4)?, PORT);
        let output = lab.exec(pod, &[&marked_request[..], &[&to]].concat())?;
        ensure!(
            !output.success(),
            "a request of {pod} succeeded without rules and daemon: {}",
            output.stdout
        );
    }
    for number in [6, 8, 10] {
        lab.delete_pod_with_grace(&format!("p{number:02}"), Duration::ZERO)?;
        lab.apply(String::from(twenty_pods().swap_remove(number)))?;
    }
    let start = Instant::now();
    lab.start_daemon("a")?;
    lab.wait_ready()?;
    println!("recaptured after {:?}", start.elapsed());
    check_requests_in_a_ring(&lab)?;
    ensure!(bridge.occurrences(MARKER)? == 0, "plaintext on the bridge");
    Ok(())
}
