//! The daemon as its operators run it: the binary, a folder of objects, pods in namespaces,
//! signals.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../rig/mod.rs"]
mod rig;
mod world;

use std::io::Write;
use std::time::Instant;

use rig::{SOON, accept, carries, eventually};
use world::{Daemon, World};

/// The time in which a capture that was broken has to stand again, with the default period of
/// verification.
const REPAIRED_WITHIN: std::time::Duration = std::time::Duration::from_secs(2);

#[test]
fn pods_that_opted_in_are_enrolled_and_talk_to_each_other_through_the_mesh() {
    let mut world = World::new();
    let (client, server, outsider) = (
        world.pod("client", true),
        world.pod("server", true),
        world.pod("outsider", false),
    );
    let daemon = Daemon::start(&world);
    daemon.ready();
    assert_eq!(daemon.state(&client), Some("enrolled".to_string()));
    assert_eq!(
        daemon.state(&outsider),
        None,
        "it has nothing to do with the mesh"
    );
    for address in server.pod.both(80) {
        let app = server.pod.inside.listen(address);
        let opened = client.pod.inside.connect(address).expect("the daemon");
        let (accepted, from) = accept(&app);
        assert!(
            [client.pod.v4, client.pod.v6].contains(&from.ip()),
            "the application sees its client"
        );
        carries(&opened, &accepted, b"request");
        carries(&accepted, &opened, b"answer");
        let outside = outsider.pod.inside.connect(address).expect("the daemon");
        carries(&outside, &accept(&app).0, b"in clear");
    }
    assert!(daemon.metric("istio_tcp_connections_opened_total") > 0.0);
}

#[test]
fn flushed_rules_are_back_at_once_and_nothing_leaves_in_clear_meanwhile() {
    let mut world = World::new();
    let (client, server) = (world.pod("client", true), world.pod("server", true));
    let daemon = Daemon::start(&world);
    daemon.ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (accepted, _) = accept(&app);
    for repairs in 1..=5 {
        let broken = Instant::now();
        client.pod.inside.run("nft", &["flush", "ruleset"]);
        (&open)
            .write_all(b"secret")
            .expect("a full send buffer is far away");
        eventually("the rules are back", || {
            client
                .pod
                .inside
                .run("nft", &["list", "ruleset"])
                .contains("redirect to")
                .then_some(())
        });
        assert!(
            broken.elapsed() < REPAIRED_WITHIN,
            "took {:?}",
            broken.elapsed()
        );
        eventually("the repair is counted", || {
            (daemon.metric("ambit_capture_repairs_total") >= f64::from(repairs)).then_some(())
        });
        let mut got = [0; 6];
        std::io::Read::read_exact(&mut &accepted, &mut got)
            .expect("retransmitted, through the mesh");
    }
    carries(&accepted, &open, b"and back");
}

#[test]
fn a_daemon_that_was_killed_leaves_its_pods_closed_and_the_next_one_opens_them() {
    let mut world = World::new();
    let (client, server) = (world.pod("client", true), world.pod("server", true));
    let daemon = Daemon::start(&world);
    daemon.ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    daemon.kill();
    client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect_err("nobody listens, and the rules stand");
    client.pod.inside.run("nft", &["flush", "ruleset"]);
    client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect_err("the guard outlives the daemon");
    let next = Daemon::start(&world);
    next.ready();
    let opened = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    carries(&opened, &accept(&app).0, b"through the mesh again");
}

#[test]
fn a_pod_that_opts_out_keeps_its_connections_and_then_nothing_of_ours() {
    let mut world = World::new();
    let (client, server) = (world.pod("client", true), world.pod("server", true));
    client
        .pod
        .inside
        .run("nft", &["add", "table", "inet", "somebody_elses"]);
    let before = client.pod.inside.rules_and_routes();
    let daemon = Daemon::start(&world);
    daemon.ready();
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
    carries(&out, &out_accepted, b"request");
    carries(&inward, &inward_accepted, b"request");

    world.write(&client, false);
    eventually("the pod leaves", || {
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
        carries(one, other, b"still");
        carries(other, one, b"here");
    }
    drop((out, out_accepted, inward, inward_accepted));
    eventually("the pod has left", || {
        daemon.state(&client).is_none().then_some(())
    });
    assert_eq!(client.pod.inside.rules_and_routes(), before);

    world.write(&client, true);
    eventually("the pod is back", || {
        (daemon.state(&client)? == "enrolled").then_some(())
    });
}

#[test]
fn a_pod_that_comes_back_with_its_address_is_another_pod() {
    let mut world = World::new();
    let (client, server) = (world.pod("client", true), world.pod("server", true));
    let daemon = Daemon::start(&world);
    daemon.ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    carries(&open, &accept(&app).0, b"to the first");
    world.delete(&server);
    let again = world.pod_at("server", "other", true, 2);
    eventually("the new pod is enrolled", || {
        (daemon.state(&again)? == "enrolled").then_some(())
    });
    eventually("the old pod is forgotten", || {
        daemon.state(&server).is_none().then_some(())
    });
    let app = again.pod.inside.listen(again.pod.both(80)[0]);
    let opened = client
        .pod
        .inside
        .connect(again.pod.both(80)[0])
        .expect("the daemon");
    carries(&opened, &accept(&app).0, b"to the second");
}

#[test]
fn a_namespace_that_is_not_the_pods_is_refused_and_keeps_nobody_waiting() {
    let mut world = World::new();
    let (good, other) = (world.pod("good", true), world.pod("other", false));
    let thief = world.pod("thief", true);
    world.claim_netns(&thief, &other.pod.inside.path());
    let missing = world.pod("missing", true);
    world.claim_netns(&missing, "/run/netns/no-such-namespace".as_ref());
    let daemon = Daemon::start(&world);
    daemon.ready();
    assert_eq!(daemon.state(&good), Some("enrolled".into()));
    assert_eq!(daemon.state(&thief), Some("pending".into()));
    assert_eq!(daemon.state(&missing), Some("pending".into()));
    assert!(
        daemon.dump().contains("netns_without_pod_ip") && daemon.dump().contains("netns_unusable")
    );
    world.claim_netns(&thief, &thief.pod.inside.path());
    eventually("it is found", || {
        (daemon.state(&thief)? == "enrolled").then_some(())
    });
}

#[test]
fn a_daemon_out_of_descriptors_says_so_and_no_pod_loses_its_connections() {
    let mut world = World::new();
    let (client, server) = (world.pod("client", true), world.pod("server", true));
    let daemon = Daemon::start(&world);
    daemon.ready();
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let open = client.pod.inside.connect(server.pod.both(80)[0]);
    let open = open.expect("the daemon");
    let (accepted, _) = accept(&app);
    carries(&open, &accepted, b"before");
    let mut admin = daemon.admin();
    // With none left the pod's namespace cannot even be looked for; with one, it is found and cannot
    // be looked into.
    for (free, reason) in [(0, "capture_"), (1, "netns_unusable")] {
        daemon.leave_descriptors(free);
        eventually(reason, || {
            let (state, why) = admin.state(&client)?;
            (state == "pending" && why.starts_with(reason)).then_some(())
        });
        carries(&open, &accepted, b"meanwhile");
        carries(&accepted, &open, b"and back");
        daemon.limit_descriptors(1024);
        eventually("the pod is verified again", || {
            (admin.state(&client)?.0 == "enrolled").then_some(())
        });
    }
    carries(&open, &accepted, b"afterwards");
    assert_eq!(daemon.metric("ambit_capture_repairs_total"), 0.0);
}

#[test]
fn a_signal_drains_and_a_second_one_ends() {
    let mut world = World::new();
    let (client, server) = (world.pod("client", true), world.pod("server", true));
    let app = server.pod.inside.listen(server.pod.both(80)[0]);
    let daemon = Daemon::start(&world);
    daemon.ready();
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (accepted, _) = accept(&app);
    carries(&open, &accepted, b"before");
    daemon.signal("TERM");
    eventually("it stops accepting", || {
        client
            .pod
            .inside
            .connect(server.pod.both(80)[0])
            .is_err()
            .then_some(())
    });
    carries(&open, &accepted, b"what is open lives on");
    drop((open, accepted));
    assert_eq!(daemon.ended(), Some(0));

    let daemon = Daemon::start(&world);
    daemon.ready();
    let open = client
        .pod
        .inside
        .connect(server.pod.both(80)[0])
        .expect("the daemon");
    let (_accepted, _) = accept(&app);
    daemon.signal("TERM");
    eventually("it stops accepting", || {
        client
            .pod
            .inside
            .connect(server.pod.both(80)[0])
            .is_err()
            .then_some(())
    });
    let second = Instant::now();
    daemon.signal("INT");
    assert_eq!(daemon.ended(), Some(1), "connections were cut");
    assert!(second.elapsed() < SOON / 2);
    drop(open);
}

#[test]
fn a_pod_that_opted_out_while_no_daemon_ran_is_cleaned_up_by_the_next() {
    let mut world = World::new();
    let client = world.pod("client", true);
    client
        .pod
        .inside
        .run("nft", &["add", "table", "inet", "somebody_elses"]);
    let before = client.pod.inside.rules_and_routes();
    let daemon = Daemon::start(&world);
    daemon.ready();
    assert_ne!(client.pod.inside.rules_and_routes(), before);
    daemon.kill();
    world.write(&client, false);
    let _next = Daemon::start(&world);
    eventually("nothing of ours is left", || {
        (client.pod.inside.rules_and_routes() == before).then_some(())
    });
}

#[test]
fn a_guard_that_is_taken_away_is_put_back() {
    let mut world = World::new();
    let (client, _server) = (world.pod("client", true), world.pod("server", true));
    let daemon = Daemon::start(&world);
    daemon.ready();
    let guard = || world.node_runs("nft", &["list", "table", "inet", "ambit-guard"]);
    let before = guard();
    assert!(before.contains(&client.pod.v4.to_string()));
    world.node_runs("nft", &["flush", "ruleset"]);
    eventually("the guard stands", || {
        world
            .node_runs("nft", &["list", "ruleset"])
            .contains("ambit-guard")
            .then_some(())
    });
    assert_eq!(guard(), before);
}

#[test]
fn a_folder_that_is_not_there_ends_the_daemon_with_a_reason() {
    let world = World::new();
    let daemon = Daemon::start_with(&world, &["--source-folder", "/no/such/folder"]);
    assert_eq!(daemon.ended(), Some(1));
}

#[test]
fn a_command_line_that_cannot_be_used_is_64_and_says_all_that_is_wrong() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ztunnel"))
        .args(["--node-name", "a", "--cert-ttl", "tomorrow"])
        .env_clear()
        .output()
        .expect("the binary");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(64));
    for wrong in [
        "--source-folder",
        "--ca-dir",
        "--netns-dir",
        "--cert-ttl \"tomorrow\"",
    ] {
        assert!(said.contains(wrong), "{wrong} is not in\n{said}");
    }
}
