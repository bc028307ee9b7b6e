//! Capture is level-triggered and fails closed: whatever happens to rules and daemons, it is repaired
//! within seconds, and not one byte of the payload crosses the wire in clear meanwhile.

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

/// A meshed client on node a, meshed servers on both nodes, and all that could see plaintext between them.
struct Stage {
    lab: Lab,
    bridge: Capture,
    near: Capture,
    client: Capture,
}

impl Stage {
    fn up() -> Result<Self> {
        let lab = up([
            namespace("shop", Some("ambient")),
            Pod::new("shop", "client").on("a").into(),
            Pod::new("shop", "near").on("a").runs(server("near")).into(),
            Pod::new("shop", "web").on("b").runs(server("web")).into(),
            Service::new("shop", "near", PORT, PORT).into(),
            Service::new("shop", "web", PORT, PORT).into(),
        ])?;
        // Between pods of one node nothing crosses the bridge; what arrives at a pod is looked at
        // there. What leaves a pod that is broken has not arrived anywhere.
        let arriving = |pod: &str| -> Result<Capture> {
            let [v4, v6] = [
                lab.pod_ip(pod, IpFamily::V4)?,
                lab.pod_ip(pod, IpFamily::V6)?,
            ];
            lab.capture(
                Location::pod(pod),
                &format!("tcp and (dst host {v4} or dst host {v6})"),
            )
        };
        let (near, client) = (arriving("near")?, arriving("client")?);
        let bridge = lab.capture(Location::Fabric, "tcp")?;
        Ok(Self {
            lab,
            bridge,
            near,
            client,
        })
    }

    fn traffic(&self) -> Result<[Traffic; 2]> {
        let to = |pod: &str, family| {
            Traffic::start(&self.lab, "client", self.lab.pod_ip(pod, family)?, MARKER)
        };
        Ok([to("web", IpFamily::V4)?, to("near", IpFamily::V6)?])
    }

    /// Breaks something while traffic runs, and expects the namespaces to be as before, traffic to
    /// flow again, established connections too, and nothing in clear meanwhile.
    fn survives(&self, pods: &[&str], breaks: &str) -> Result<()> {
        for traffic in self.repaired(pods, breaks)? {
            traffic.wait_flowing(&self.lab, REPAIR_DEADLINE)?;
        }
        self.nothing_in_clear()
    }

    /// As [`Self::survives`], for what conntrack does not forgive an established connection.
    fn recovers(&self, pods: &[&str], breaks: &str) -> Result<()> {
        for traffic in self.repaired(pods, breaks)? {
            traffic.wait_new_flowing(&self.lab, REPAIR_DEADLINE)?;
        }
        self.nothing_in_clear()
    }

    fn repaired(&self, pods: &[&str], breaks: &str) -> Result<[Traffic; 2]> {
        let traffic = self.traffic()?;
        let state = |pod: &&str| network_state(&self.lab, pod);
        let before: Vec<_> = pods.iter().map(state).collect::<Result<_>>()?;
        for pod in pods {
            shell(&self.lab, pod, breaks)?;
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
                "no line says why: {line:?}"
            );
        }
        Ok(traffic)
    }

    /// Requests of the client to these pods are refused, by each of their own addresses and by those of their
    /// services.
    fn all_refused(&self, pods: &[&str]) -> Result<()> {
        for pod in pods {
            for family in IpFamily::ALL {
                refused(&self.lab, "client", self.lab.pod_ip(pod, family)?)?;
                let service = self.lab.service_ip(&format!("shop/{pod}"), family)?;
                refused(&self.lab, "client", service)?;
            }
        }
        Ok(())
    }

    fn nothing_in_clear(&self) -> Result<()> {
        for (place, capture) in [
            ("the bridge", &self.bridge),
            ("near", &self.near),
            ("client", &self.client),
        ] {
            let seen = capture.occurrences(MARKER)?;
            ensure!(
                seen == 0,
                "the marker was seen {seen} times in clear at {place}"
            );
        }
        let tls = self.bridge.tls_bytes(15008)?.records;
        ensure!(tls > 0, "no HBONE at all was seen on the bridge");
        Ok(())
    }
}

/// A request with the marker in it has no answer, and soon.
fn refused(lab: &Lab, from: &str, to: IpAddr) -> Result<()> {
    let header = format!("X-Marker: {MARKER}");
    let output = lab.exec(
        from,
        &["curl", "-sS", "-m", "3", "-H", &header, &url(to, PORT)],
    )?;
    ensure!(
        !output.success(),
        "a request of {from} was answered: {}",
        output.stdout
    );
    Ok(())
}

#[test]
fn rules_flushed_in_a_client_are_repaired_and_nothing_leaves_in_clear() -> Result<()> {
    Stage::up()?.survives(&["client"], "nft flush ruleset")
}

#[test]
fn rules_flushed_in_a_server_are_repaired_and_nothing_leaves_in_clear() -> Result<()> {
    Stage::up()?.survives(&["web", "near"], "nft flush ruleset")
}

#[test]
fn rules_flushed_in_every_pod_at_once_are_repaired_and_nothing_leaves_in_clear() -> Result<()> {
    Stage::up()?.survives(&["client", "near", "web"], "nft flush ruleset")
}

#[test]
fn rules_flushed_again_and_again_are_repaired_when_that_ends() -> Result<()> {
    // Long enough to hit every moment of a repair, also that between applying and reading back.
    let storm = "for i in $(seq 300); do nft flush ruleset; done";
    Stage::up()?.recovers(&["client", "web"], storm)
}

#[test]
fn policy_rules_and_routes_that_somebody_deletes_are_repaired() -> Result<()> {
    let breaks = "for family in -4 -6; do while ip $family rule del lookup 100 2>/dev/null; do :; done; \
                  ip $family route flush table 100; done";
    Stage::up()?.survives(&["client", "near", "web"], breaks)
}

#[test]
fn chains_that_somebody_empties_are_repaired() -> Result<()> {
    let flush = "nft list table inet ambit | awk '/^\tchain/ {print $2}' | \
                 while read chain; do nft flush chain inet ambit $chain; done";
    Stage::up()?.recovers(&["client", "near", "web"], flush)
}

#[test]
fn one_rule_that_somebody_adds_is_noticed() -> Result<()> {
    let stage = Stage::up()?;
    stage.survives(
        &["client"],
        "nft insert rule inet ambit redirect_outbound accept",
    )?;
    // A connection that changes its conntrack zone is another one to the kernel.
    let accept = "for chain in separate redirect_inbound mark_connection mark_answer; do \
                  nft insert rule inet ambit $chain accept; done";
    stage.recovers(&["near", "web"], accept)
}

#[test]
fn the_guard_of_a_node_is_put_back_and_does_not_stand_in_the_way_of_others() -> Result<()> {
    let stage = Stage::up()?;
    let traffic = stage.traffic()?;
    let nft = |node: &str, args: &[&str]| {
        let command = [&["nft"], args].concat();
        stage
            .lab
            .exec_in(&Location::node(node), &command, REPAIR_DEADLINE)?
            .ok()
    };
    for node in ["a", "b"] {
        let rules = |node| nft(node, &["-s", "list", "table", "inet", "ambit-guard"]);
        let before = rules(node)?;
        for verb in ["delete", "flush"] {
            nft(node, &[verb, "table", "inet", "ambit-guard"])?;
            stage
                .lab
                .wait_until(&format!("the guard of {node}"), REPAIR_DEADLINE, || {
                    (rules(node).ok()? == before).then_some(())
                })?;
        }
        metrics::wait(
            &stage.lab,
            node,
            "ambit_capture_repairs_total",
            &[("reason", "guard")],
            2.0,
        )?;
    }
    for traffic in &traffic {
        traffic.wait_flowing(&stage.lab, REPAIR_DEADLINE)?;
    }
    stage.nothing_in_clear()
}

#[test]
fn a_dead_daemon_means_no_traffic_and_no_plaintext_and_a_new_one_takes_over() -> Result<()> {
    let stage = Stage::up()?;
    let lab = &stage.lab;
    // Of node a it is both the client's and the near server's daemon that dies, of node b the far server's.
    for (node, pods, cut) in [
        ("a", &["client", "near"][..], &["near", "web"][..]),
        ("b", &["web"], &["web"]),
    ] {
        let [far, near] = stage.traffic()?;
        lab.kill_daemon(node)?;
        far.wait_cut(lab)?;
        match node {
            "a" => near.wait_cut(lab)?,
            _ => near.wait_flowing(lab, REPAIR_DEADLINE)?,
        }
        stage.all_refused(cut)?;
        // What a pod does to its own rules does not open a way while the daemon is dead.
        for pod in pods {
            shell(lab, pod, "nft flush ruleset")?;
            stage.all_refused(cut)?;
        }
        lab.start_daemon(node)?;
        far.wait_new_flowing(lab, REPAIR_DEADLINE)?;
        near.wait_new_flowing(lab, REPAIR_DEADLINE)?;
    }
    stage.nothing_in_clear()
}

#[test]
fn a_daemon_that_is_told_to_stop_exits_well_and_leaves_the_rules_in_place() -> Result<()> {
    let stage = Stage::up()?;
    let (lab, web) = (&stage.lab, stage.lab.pod_ip("web", IpFamily::V4)?);
    wait_for_response(lab, "client", web, "web")?;
    let before = network_state(lab, "client")?;
    lab.stop_daemon("a")?;
    let ProgramState::Exited(how) = lab.status()?.node("a")?.daemon.clone() else {
        anyhow::bail!("the daemon still runs");
    };
    ensure!(how.contains('0'), "it exited with {how}");
    ensure!(
        network_state(lab, "client")? == before,
        "the rules are not as they were"
    );
    refused(lab, "client", web)?;
    lab.start_daemon("a")?;
    wait_for_response(lab, "client", web, "web")?;
    stage.nothing_in_clear()
}
