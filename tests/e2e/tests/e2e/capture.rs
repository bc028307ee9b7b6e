//! Traffic capture is level-triggered and fails closed: changed rules and killed daemons are repaired
//! within seconds, and no payload crosses the wire unencrypted meanwhile.

use std::net::IpAddr;

use ambit_e2e::capture::{
    MARKER, REPAIR_DEADLINE, Traffic, network_state, server, shell, up, wait_for_response,
    wait_restored,
};
use ambit_e2e::manifest::{Pod, Service, namespace};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, url};
use anyhow::{Result, ensure};
use lab::{Capture, IpFamily, Lab, Location, ProgramState};

/// A meshed client on node a, meshed servers on both nodes, and packet captures of all paths between
/// them.
struct Fixture {
    lab: Lab,
    bridge: Capture,
    near: Capture,
    client: Capture,
}

impl Fixture {
    fn up() -> Result<Self> {
        let lab = up([
            namespace("shop", Some("ambient")),
            Pod::new("shop", "client").on("a").into(),
            Pod::new("shop", "near").on("a").runs(server("near")).into(),
            Pod::new("shop", "web").on("b").runs(server("web")).into(),
            Service::new("shop", "near", PORT, PORT).into(),
            Service::new("shop", "web", PORT, PORT).into(),
        ])?;
        // Traffic between pods of one node does not cross the bridge, so it is recorded where it arrives.
        // Packets that leave a pod without rules are dropped later, and must not count.
        let capture_arriving = |pod: &str| -> Result<Capture> {
            let [v4, v6] = [
                lab.pod_ip(pod, IpFamily::V4)?,
                lab.pod_ip(pod, IpFamily::V6)?,
            ];
            lab.capture(
                Location::pod(pod),
                &format!("tcp and (dst host {v4} or dst host {v6})"),
            )
        };
        let (near, client) = (capture_arriving("near")?, capture_arriving("client")?);
        let bridge = lab.capture(Location::Fabric, "tcp")?;
        Ok(Self {
            lab,
            bridge,
            near,
            client,
        })
    }

    fn start_traffic(&self) -> Result<[Traffic; 2]> {
        let to = |pod: &str, family| {
            Traffic::start(&self.lab, "client", self.lab.pod_ip(pod, family)?, MARKER)
        };
        Ok([to("web", IpFamily::V4)?, to("near", IpFamily::V6)?])
    }

    /// Runs `script` in these pods under traffic. Their network state must be restored, new connections
    /// and established ones that were idle must flow again, and no plaintext may cross the wire meanwhile.
    fn check_repair(&self, pods: &[&str], script: &str) -> Result<()> {
        for traffic in self.wait_repaired(pods, script)? {
            traffic.wait_flowing(&self.lab, REPAIR_DEADLINE)?;
        }
        self.check_no_plaintext()
    }

    /// As [`Self::check_repair`], for changes after which conntrack drops established connections.
    fn check_repair_of_new_connections(&self, pods: &[&str], script: &str) -> Result<()> {
        for traffic in self.wait_repaired(pods, script)? {
            traffic.wait_new_flowing(&self.lab, REPAIR_DEADLINE)?;
        }
        self.check_no_plaintext()
    }

    /// The established connections are idle during the repair: bytes that arrive while a pod has no NAT
    /// rules are answered by its kernel with a reset, so bytes in flight may end a connection.
    fn wait_repaired(&self, pods: &[&str], script: &str) -> Result<[Traffic; 2]> {
        let traffic = self.start_traffic()?;
        for traffic in &traffic {
            traffic.pause_established(&self.lab, REPAIR_DEADLINE)?;
        }
        let state = |pod: &&str| network_state(&self.lab, pod);
        let before: Vec<_> = pods.iter().map(state).collect::<Result<_>>()?;
        for pod in pods {
            shell(&self.lab, pod, script)?;
        }
        for (pod, before) in pods.iter().zip(before) {
            wait_restored(&self.lab, pod, &before, REPAIR_DEADLINE)?;
        }
        for pod in pods {
            let node = self.lab.status()?.pod(pod)?.node.clone();
            metrics::wait(&self.lab, &node, "ambit_capture_repairs_total", &[], 1.0)?;
            let log = self.lab.daemon_log(&node)?;
            let line = log
                .lines()
                .find(|line| line.contains("repaired") && line.contains(pod));
            ensure!(
                line.is_some_and(|line| line.contains("reason=")),
                "no log line of {pod} has the reason of the repair: {line:?}"
            );
        }
        for traffic in &traffic {
            traffic.resume_established()?;
        }
        Ok(traffic)
    }

    /// Requests of the client to these pods and to their services fail, over both families.
    fn check_all_refused(&self, pods: &[&str]) -> Result<()> {
        for pod in pods {
            for family in IpFamily::ALL {
                check_refused(&self.lab, "client", self.lab.pod_ip(pod, family)?)?;
                let service = self.lab.service_ip(&format!("shop/{pod}"), family)?;
                check_refused(&self.lab, "client", service)?;
            }
        }
        Ok(())
    }

    fn check_no_plaintext(&self) -> Result<()> {
        for (location, capture) in [
            ("the bridge", &self.bridge),
            ("near", &self.near),
            ("client", &self.client),
        ] {
            let count = capture.occurrences(MARKER)?;
            ensure!(
                count == 0,
                "the marker was captured {count} times unencrypted at {location}"
            );
        }
        let tls = self.bridge.tls_bytes(15008)?.records;
        ensure!(tls > 0, "no HBONE was captured on the bridge");
        Ok(())
    }
}

/// A request with the marker fails.
fn check_refused(lab: &Lab, from: &str, to: IpAddr) -> Result<()> {
    let header = format!("X-Marker: {MARKER}");
    let output = lab.exec(
        from,
        &["curl", "-sS", "-m", "3", "-H", &header, &url(to, PORT)],
    )?;
    ensure!(
        !output.success(),
        "a request of {from} succeeded: {}",
        output.stdout
    );
    Ok(())
}

#[test]
fn rules_flushed_in_a_client_are_repaired_without_plaintext() -> Result<()> {
    Fixture::up()?.check_repair(&["client"], "nft flush ruleset")
}

#[test]
fn rules_flushed_in_servers_are_repaired_without_plaintext() -> Result<()> {
    Fixture::up()?.check_repair(&["web", "near"], "nft flush ruleset")
}

#[test]
fn rules_flushed_in_all_pods_are_repaired_without_plaintext() -> Result<()> {
    Fixture::up()?.check_repair(&["client", "near", "web"], "nft flush ruleset")
}

#[test]
fn rules_flushed_repeatedly_are_repaired() -> Result<()> {
    // 300 flushes hit every step of a repair, also between applying and reading back.
    let flushes = "for i in $(seq 300); do nft flush ruleset; done";
    Fixture::up()?.check_repair_of_new_connections(&["client", "web"], flushes)
}

#[test]
fn deleted_policy_rules_and_routes_are_repaired() -> Result<()> {
    let script = "for family in -4 -6; do while ip $family rule del lookup 100 2>/dev/null; do :; done; \
                  ip $family route flush table 100; done";
    Fixture::up()?.check_repair(&["client", "near", "web"], script)
}

#[test]
fn flushed_chains_are_repaired() -> Result<()> {
    let flush = "nft list table inet ambit | awk '/^\tchain/ {print $2}' | \
                 while read chain; do nft flush chain inet ambit $chain; done";
    Fixture::up()?.check_repair_of_new_connections(&["client", "near", "web"], flush)
}

#[test]
fn added_rule_is_removed() -> Result<()> {
    let fixture = Fixture::up()?;
    fixture.check_repair(
        &["client"],
        "nft insert rule inet ambit redirect_outbound accept",
    )?;
    // After a change of the conntrack zone the kernel does not find the established connection.
    let accept = "for chain in separate redirect_inbound mark_connection mark_answer; do \
                  nft insert rule inet ambit $chain accept; done";
    fixture.check_repair_of_new_connections(&["near", "web"], accept)
}

#[test]
fn deleted_node_guard_is_restored_without_disturbing_traffic() -> Result<()> {
    let fixture = Fixture::up()?;
    let traffic = fixture.start_traffic()?;
    let nft = |node: &str, args: &[&str]| {
        let command = [&["nft"], args].concat();
        fixture
            .lab
            .exec_in(&Location::node(node), &command, REPAIR_DEADLINE)?
            .ok()
    };
    for node in ["a", "b"] {
        let rules = |node| nft(node, &["-s", "list", "table", "inet", "ambit-guard"]);
        let before = rules(node)?;
        for verb in ["delete", "flush"] {
            nft(node, &[verb, "table", "inet", "ambit-guard"])?;
            fixture.lab.wait_until(
                &format!("the guard of node {node} to be restored"),
                REPAIR_DEADLINE,
                || (rules(node).ok()? == before).then_some(()),
            )?;
        }
        metrics::wait(
            &fixture.lab,
            node,
            "ambit_capture_repairs_total",
            &[("reason", "guard")],
            2.0,
        )?;
    }
    for traffic in &traffic {
        traffic.wait_flowing(&fixture.lab, REPAIR_DEADLINE)?;
    }
    fixture.check_no_plaintext()
}

#[test]
fn killed_daemon_stops_traffic_without_plaintext_until_it_restarts() -> Result<()> {
    let fixture = Fixture::up()?;
    let lab = &fixture.lab;
    // The daemon of node a serves the client and the near server, that of node b the far server.
    for (node, pods, unreachable) in [
        ("a", &["client", "near"][..], &["near", "web"][..]),
        ("b", &["web"], &["web"]),
    ] {
        let [far, near] = fixture.start_traffic()?;
        lab.kill_daemon(node)?;
        far.wait_cut(lab)?;
        match node {
            "a" => near.wait_cut(lab)?,
            _ => near.wait_flowing(lab, REPAIR_DEADLINE)?,
        }
        fixture.check_all_refused(unreachable)?;
        // Flushing a pod's rules does not open a plaintext path without a daemon.
        for pod in pods {
            shell(lab, pod, "nft flush ruleset")?;
            fixture.check_all_refused(unreachable)?;
        }
        lab.start_daemon(node)?;
        far.wait_new_flowing(lab, REPAIR_DEADLINE)?;
        near.wait_new_flowing(lab, REPAIR_DEADLINE)?;
    }
    fixture.check_no_plaintext()
}

#[test]
fn stopped_daemon_exits_with_0_and_keeps_rules() -> Result<()> {
    let fixture = Fixture::up()?;
    let (lab, web) = (&fixture.lab, fixture.lab.pod_ip("web", IpFamily::V4)?);
    wait_for_response(lab, "client", web, "web")?;
    let before = network_state(lab, "client")?;
    lab.stop_daemon("a")?;
    let ProgramState::Exited(how) = lab.status()?.node("a")?.daemon.clone() else {
        anyhow::bail!("the daemon is still running");
    };
    ensure!(how == "ended: exit status: 0", "unexpected exit: {how}");
    ensure!(
        network_state(lab, "client")? == before,
        "the network state has changed"
    );
    check_refused(lab, "client", web)?;
    lab.start_daemon("a")?;
    wait_for_response(lab, "client", web, "web")?;
    fixture.check_no_plaintext()
}
