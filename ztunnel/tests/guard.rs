//! What the guard drops and what it accepts, with real packets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod namespaces;

use std::net::IpAddr;

use namespaces::{Node, Pod, accept, assert_carries};
use ztunnel::guard::{Guard, Sets};
use ztunnel::netns::NetnsThreads;

/// Arguments of `nft` that list the guard's table.
const LIST_TABLE: [&str; 4] = ["list", "table", "inet", "ambit-guard"];

/// A guard in the node's namespace, and a runtime for its async calls.
fn guard(node: &Node) -> (Guard, tokio::runtime::Runtime) {
    let guard =
        Guard::new(NetnsThreads::start_in(&node.inside.netns, "guard", 1).expect("a thread"));
    (
        guard,
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap(),
    )
}

fn sets(local: &[&Pod], meshed: &[&Pod]) -> Sets {
    let addresses = |pods: &[&Pod]| -> std::collections::BTreeSet<IpAddr> {
        pods.iter().flat_map(|pod| [pod.v4, pod.v6]).collect()
    };
    Sets {
        local: addresses(local),
        meshed: addresses(meshed),
    }
}

#[test]
fn plaintext_between_meshed_pods_is_dropped_and_counted() {
    let mut node = Node::new();
    let (pod, peer, outsider) = (node.pod(), node.pod(), node.pod());
    let (mut guard, runtime) = guard(&node);
    runtime
        .block_on(guard.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    for (family, to) in peer.both(80).into_iter().enumerate() {
        let app = peer.inside.listen(to);
        pod.inside.connect(to).expect_err("dropped on the way");
        let _from_outside = outsider
            .inside
            .connect(to)
            .expect("connections from a pod outside the mesh are accepted");
        accept(&app);
        let outside = outsider.inside.listen(outsider.both(80)[family]);
        let _to_outside = pod
            .inside
            .connect(outsider.both(80)[family])
            .expect("connections to a pod outside the mesh are accepted");
        accept(&outside);
        let hbone = peer.inside.listen(peer.both(15008)[family]);
        let client = pod.inside.connect(peer.both(15008)[family]).expect("HBONE");
        let (server, _) = accept(&hbone);
        assert_carries(&client, &server, b"there");
        assert_carries(&server, &client, b"and back");
    }
    let counter = node.inside.run(
        "nft",
        &["list", "counter", "inet", "ambit-guard", "plaintext"],
    );
    assert!(!counter.contains("packets 0 "), "{counter}");
}

#[test]
fn connections_established_before_enrolment_survive() {
    let mut node = Node::new();
    let (pod, peer) = (node.pod(), node.pod());
    let (mut guard, runtime) = guard(&node);
    runtime
        .block_on(guard.apply(Sets::default()))
        .expect("the rules");
    let app = peer.inside.listen(peer.both(80)[0]);
    let client = pod.inside.connect(peer.both(80)[0]).expect("no mesh yet");
    let (server, _) = accept(&app);
    runtime
        .block_on(guard.apply(sets(&[&pod, &peer], &[&pod, &peer])))
        .expect("the rules");
    assert_carries(&client, &server, b"still here");
    assert_carries(&server, &client, b"me too");
    pod.inside
        .connect(peer.both(80)[0])
        .expect_err("a new one is dropped");
}

#[test]
fn pod_that_left_the_mesh_may_send_plaintext() {
    let mut node = Node::new();
    let (pod, peer) = (node.pod(), node.pod());
    let (mut guard, runtime) = guard(&node);
    let app = peer.inside.listen(peer.both(80)[0]);
    runtime
        .block_on(guard.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    pod.inside.connect(peer.both(80)[0]).expect_err("dropped");
    runtime
        .block_on(guard.apply(sets(&[], &[&peer])))
        .expect("the rules");
    let _client = pod
        .inside
        .connect(peer.both(80)[0])
        .expect("accepted again");
    accept(&app);
}

#[test]
fn damaged_guard_is_repaired() {
    let mut node = Node::new();
    let (pod, peer) = (node.pod(), node.pod());
    let (mut guard, runtime) = guard(&node);
    runtime
        .block_on(guard.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    let applied = node.inside.run("nft", &LIST_TABLE);
    assert!(
        !runtime.block_on(guard.verify()).expect("verified"),
        "nothing to repair"
    );
    for damage in [
        "flush ruleset",
        "flush chain inet ambit-guard forward",
        "flush set inet ambit-guard meshed_ipv4",
    ] {
        node.inside
            .run("nft", &damage.split(' ').collect::<Vec<_>>());
        assert!(
            runtime.block_on(guard.verify()).expect("verified"),
            "{damage}"
        );
        assert_eq!(node.inside.run("nft", &LIST_TABLE), applied, "{damage}");
    }
    node.inside
        .run("nft", &["add", "table", "inet", "other_program"]);
    assert!(
        !runtime.block_on(guard.verify()).expect("verified"),
        "rules of other programs are not repaired"
    );
}

#[test]
fn guard_remains_after_the_daemon_exits_and_the_next_one_replaces_it() {
    let mut node = Node::new();
    let (pod, peer) = (node.pod(), node.pod());
    let _app = peer.inside.listen(peer.both(80)[0]);
    let (mut first, runtime) = guard(&node);
    runtime
        .block_on(first.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    drop(first);
    pod.inside
        .connect(peer.both(80)[0])
        .expect_err("the rules remain without a daemon");
    let (mut second, runtime) = guard(&node);
    runtime
        .block_on(second.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    pod.inside
        .connect(peer.both(80)[0])
        .expect_err("dropped as before");
}
