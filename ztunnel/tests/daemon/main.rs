//! The daemon as operators run it: the binary with a folder of objects, pods in network namespaces,
//! and signals.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fixture;
#[path = "../namespaces/mod.rs"]
mod namespaces;

use std::io::Write;
use std::time::{Duration, Instant};

use fixture::{Daemon, Fixture};
use namespaces::{TIMEOUT, accept, assert_carries, eventually};

/// Time within which a changed capture must be repaired: the default period of verification.
const REPAIR_DEADLINE: Duration = Duration::from_secs(2);

/// How long a limit of descriptors stays before it is set again: several verifications.
const RELIMIT_INTERVAL: Duration = Duration::from_secs(1);

#[test]
fn opted_in_pods_are_enrolled_and_connect_through_the_mesh() {
    let mut fixture = Fixture::new();
    let (client, server, outsider) = (
        fixture.pod("client", true),
        fixture.pod("server", true),
        fixture.pod("outsider", false),
    );
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    assert_eq!(daemon.state(&client), Some("enrolled".to_string()));
    assert_eq!(
        daemon.state(&outsider),
        None,
        "a pod outside the mesh has no state"
    );
    for address in server.pod.both(80) {
        let app = server.pod.inside.listen(address);
        let opened = client.pod.inside.connect(address).expect("the daemon");
        let (accepted, from) = accept(&app);
        assert!(
            [client.pod.v4, client.pod.v6].contains(&from.ip()),
            "the application sees the client's address"
        );
        assert_carries(&opened, &accepted, b"request");
        assert_carries(&accepted, &opened, b"answer");
        let outside = outsider.pod.inside.connect(address).expect("the daemon");
        assert_carries(&outside, &accept(&app).0, b"plaintext");
    }
    assert!(daemon.metric("istio_tcp_connections_opened_total") > 0.0);
}

#[test]
fn flushed_rules_are_repaired_and_no_plaintext_leaves() {
    let mut fixture = Fixture::new();
    let (client, server) = (fixture.pod("client", true), fixture.pod("server", true));
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (accepted, _) = accept(&app);
    for repairs in 1..=5 {
        let flushed = Instant::now();
        client.pod.inside.run("nft", &["flush", "ruleset"]);
        (&open)
            .write_all(b"secret")
            .expect("a full send buffer is far away");
        eventually("the rules are repaired", || {
            client
                .pod
                .inside
                .run("nft", &["list", "ruleset"])
                .contains("redirect to")
                .then_some(())
        });
        assert!(
            flushed.elapsed() < REPAIR_DEADLINE,
            "took {:?}",
            flushed.elapsed()
        );
        eventually("the repair is counted", || {
            (daemon.metric("ambit_capture_repairs_total") >= f64::from(repairs)).then_some(())
        });
        let mut received = [0; 6];
        std::io::Read::read_exact(&mut &accepted, &mut received)
            .expect("retransmitted, through the mesh");
    }
    assert_carries(&accepted, &open, b"and back");
}

#[test]
fn killed_daemon_leaves_pods_closed_until_the_next_one_starts() {
    let mut fixture = Fixture::new();
    let (client, server) = (fixture.pod("client", true), fixture.pod("server", true));
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    daemon.kill();
    client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect_err("redirected to a port without a listener");
    client.pod.inside.run("nft", &["flush", "ruleset"]);
    client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect_err("dropped by the guard, which remains");
    let next = Daemon::start(&fixture);
    next.wait_ready();
    let opened = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    assert_carries(&opened, &accept(&app).0, b"through the mesh again");
}

#[test]
fn established_connections_survive_opt_out_and_rules_are_removed_after_them() {
    let mut fixture = Fixture::new();
    let (client, server) = (fixture.pod("client", true), fixture.pod("server", true));
    client
        .pod
        .inside
        .run("nft", &["add", "table", "inet", "other_program"]);
    let before = client.pod.inside.rules_and_routes();
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let own = client.pod.inside.listen(client.pod.both(80)[0]);
    let out = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (out_accepted, _) = accept(&app);
    let inward = server
        .pod
        .inside
        .connect(client.pod.both(80)[0])
        .expect("the daemon");
    let (inward_accepted, _) = accept(&own);
    assert_carries(&out, &out_accepted, b"request");
    assert_carries(&inward, &inward_accepted, b"request");

    fixture.write(&client, false);
    eventually("the pod is leaving", || {
        (daemon.state(&client)? == "leaving").then_some(())
    });
    eventually("nothing new is redirected", || {
        (!client
            .pod
            .inside
            .run("nft", &["list", "table", "inet", "ambit"])
            .contains("redirect to"))
        .then_some(())
    });
    for (one, other) in [(&out, &out_accepted), (&inward, &inward_accepted)] {
        assert_carries(one, other, b"still");
        assert_carries(other, one, b"here");
    }
    drop((out, out_accepted, inward, inward_accepted));
    eventually("the pod has left", || {
        daemon.state(&client).is_none().then_some(())
    });
    assert_eq!(client.pod.inside.rules_and_routes(), before);

    fixture.write(&client, true);
    eventually("the pod is enrolled again", || {
        (daemon.state(&client)? == "enrolled").then_some(())
    });
}

#[test]
fn recreated_pod_with_the_same_address_is_a_new_pod() {
    let mut fixture = Fixture::new();
    let (client, server) = (fixture.pod("client", true), fixture.pod("server", true));
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    assert_carries(&open, &accept(&app).0, b"to the first");
    fixture.delete(&server);
    let again = fixture.pod_at("server", "other", true, 2);
    eventually("the new pod is enrolled", || {
        (daemon.state(&again)? == "enrolled").then_some(())
    });
    eventually("the old pod is removed", || {
        daemon.state(&server).is_none().then_some(())
    });
    let app = again.pod.inside.listen(again.pod.both(80)[0]);
    let opened = client
        .pod
        .inside
        .connect(again.pod.both(80)[0])
        .expect("the daemon");
    assert_carries(&opened, &accept(&app).0, b"to the second");
}

#[test]
fn wrong_or_missing_namespace_leaves_only_that_pod_pending() {
    let mut fixture = Fixture::new();
    let (good, other) = (fixture.pod("good", true), fixture.pod("other", false));
    let impostor = fixture.pod("impostor", true);
    fixture.write_netns(&impostor, &other.pod.inside.path());
    let missing = fixture.pod("missing", true);
    fixture.write_netns(&missing, "/run/netns/no-such-namespace".as_ref());
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    assert_eq!(daemon.state(&good), Some("enrolled".into()));
    assert_eq!(daemon.state(&impostor), Some("pending".into()));
    assert_eq!(daemon.state(&missing), Some("pending".into()));
    assert!(
        daemon.dump().contains("netns_without_pod_ip") && daemon.dump().contains("netns_unusable")
    );
    fixture.write_netns(&impostor, &impostor.pod.inside.path());
    eventually("the namespace is found", || {
        (daemon.state(&impostor)? == "enrolled").then_some(())
    });
}

#[test]
fn descriptor_exhaustion_is_reported_and_connections_survive() {
    let mut fixture = Fixture::new();
    let (client, server) = (fixture.pod("client", true), fixture.pod("server", true));
    let daemon = Daemon::start_with_objects(&fixture, &["--verify-interval", "200ms"]);
    daemon.wait_ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let open = client.pod.inside.connect(server.pod.both(80)[0]);
    let open = open.expect("the daemon");
    let (accepted, _) = accept(&app);
    assert_carries(&open, &accepted, b"before");
    // Without a free descriptor, not even the path of the pod's namespace can be read, nor its
    // rules. With one, the namespace is opened and cannot be inspected.
    for (free, reason) in [(0, "capture_"), (1, "netns_unusable")] {
        // One per case: the daemon closes an admin connection after 30 s.
        let mut admin = daemon.admin();
        let mut limited_at: Option<Instant> = None;
        eventually(reason, || {
            // The daemon may open and close other descriptors, which changes the number of free
            // ones.
            if limited_at.is_none_or(|at| at.elapsed() > RELIMIT_INTERVAL) {
                daemon.leave_descriptors(free);
                limited_at = Some(Instant::now());
            }
            let (state, why) = admin.state(&client)?;
            (state == "pending" && why.starts_with(reason)).then_some(())
        });
        assert_carries(&open, &accepted, b"meanwhile");
        assert_carries(&accepted, &open, b"and back");
        daemon.limit_descriptors(1024);
        eventually("the pod is verified again", || {
            (admin.state(&client)?.0 == "enrolled").then_some(())
        });
    }
    assert_carries(&open, &accepted, b"afterwards");
    assert_eq!(daemon.metric("ambit_capture_repairs_total"), 0.0);
}

#[test]
fn first_signal_drains_and_second_exits() {
    let mut fixture = Fixture::new();
    let (client, server) = (fixture.pod("client", true), fixture.pod("server", true));
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (accepted, _) = accept(&app);
    assert_carries(&open, &accepted, b"before");
    daemon.signal("TERM");
    eventually("the daemon stops accepting", || {
        client
            .pod
            .inside
            .connect(server.pod.both(80)[0])
            .is_err()
            .then_some(())
    });
    assert_carries(&open, &accepted, b"open connections continue");
    drop((open, accepted));
    assert_eq!(daemon.exit_code(), Some(0));

    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (_accepted, _) = accept(&app);
    daemon.signal("TERM");
    eventually("the daemon stops accepting", || {
        client
            .pod
            .inside
            .connect(server.pod.both(80)[0])
            .is_err()
            .then_some(())
    });
    let second_signal = Instant::now();
    daemon.signal("INT");
    assert_eq!(daemon.exit_code(), Some(1), "connections were cut");
    assert!(second_signal.elapsed() < TIMEOUT / 2);
    drop(open);
}

#[test]
fn pod_that_opted_out_without_a_daemon_is_cleaned_up_by_the_next() {
    let mut fixture = Fixture::new();
    let client = fixture.pod("client", true);
    client
        .pod
        .inside
        .run("nft", &["add", "table", "inet", "other_program"]);
    let before = client.pod.inside.rules_and_routes();
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    assert_ne!(client.pod.inside.rules_and_routes(), before);
    daemon.kill();
    fixture.write(&client, false);
    let _next = Daemon::start(&fixture);
    eventually("all rules of the daemon are removed", || {
        (client.pod.inside.rules_and_routes() == before).then_some(())
    });
}

#[test]
fn removed_guard_is_repaired() {
    let mut fixture = Fixture::new();
    let (client, _server) = (fixture.pod("client", true), fixture.pod("server", true));
    let daemon = Daemon::start(&fixture);
    daemon.wait_ready();
    let guard = || fixture.run_in_node("nft", &["list", "table", "inet", "ambit-guard"]);
    let before = guard();
    assert!(before.contains(&client.pod.v4.to_string()));
    fixture.run_in_node("nft", &["flush", "ruleset"]);
    eventually("the guard is repaired", || {
        fixture
            .run_in_node("nft", &["list", "ruleset"])
            .contains("ambit-guard")
            .then_some(())
    });
    assert_eq!(guard(), before);
}

#[test]
fn missing_source_folder_exits_with_1() {
    let fixture = Fixture::new();
    let daemon = Daemon::start_with(&fixture, &["--source-folder", "/no/such/folder"]);
    assert_eq!(daemon.exit_code(), Some(1));
}

#[test]
fn unusable_command_line_exits_with_64_and_lists_all_errors() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ztunnel"))
        .args(["--node-name", "a", "--cert-ttl", "tomorrow"])
        .env_clear()
        .output()
        .expect("the binary");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64));
    for flag in [
        "--source-folder",
        "--ca-dir",
        "--netns-dir",
        "--cert-ttl \"tomorrow\"",
    ] {
        assert!(message.contains(flag), "{flag} is not in\n{message}");
    }
}
