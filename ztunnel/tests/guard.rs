//! What the guard lets out of a node and what it does not, with real packets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rig;

use std::net::IpAddr;

use rig::{Node, Pod, accept, carries};
use ztunnel::guard::{Guard, Sets};
use ztunnel::netns::NetnsThreads;

const TABLE: [&str; 4] = ["list", "table", "inet", "ambit-guard"];

/// A guard in the node's namespace, and the runtime that it is asked on.
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
fn plaintext_between_pods_of_the_mesh_is_dropped_and_counted() {
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
            .expect("a pod outside the mesh is not the guard's business");
        accept(&app);
        let outside = outsider.inside.listen(outsider.both(80)[family]);
        let _to_outside = pod
            .inside
            .connect(outsider.both(80)[family])
            .expect("outside the mesh plaintext is what there is");
        accept(&outside);
        let hbone = peer.inside.listen(peer.both(15008)[family]);
        let client = pod.inside.connect(peer.both(15008)[family]).expect("HBONE");
        let (server, _) = accept(&hbone);
        carries(&client, &server, b"there");
        carries(&server, &client, b"and back");
    }
    let counter = node.inside.run(
        "nft",
        &["list", "counter", "inet", "ambit-guard", "plaintext"],
    );
    assert!(!counter.contains("packets 0 "), "{counter}");
}

#[test]
fn connections_from_before_a_pod_joined_live_on() {
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
    carries(&client, &server, b"still here");
    carries(&server, &client, b"so am I");
    pod.inside
        .connect(peer.both(80)[0])
        .expect_err("a new one is dropped");
}

#[test]
fn a_pod_that_left_is_let_go() {
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
    let _client = pod.inside.connect(peer.both(80)[0]).expect("its own again");
    accept(&app);
}

#[test]
fn what_is_taken_away_is_put_back() {
    let mut node = Node::new();
    let (pod, peer) = (node.pod(), node.pod());
    let (mut guard, runtime) = guard(&node);
    runtime
        .block_on(guard.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    let whole = node.inside.run("nft", &TABLE);
    assert!(
        !runtime.block_on(guard.verify()).expect("a look"),
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
            runtime.block_on(guard.verify()).expect("a look"),
            "{damage}"
        );
        assert_eq!(node.inside.run("nft", &TABLE), whole, "{damage}");
    }
    node.inside
        .run("nft", &["add", "table", "inet", "somebody_elses"]);
    assert!(
        !runtime.block_on(guard.verify()).expect("a look"),
        "rules of others are nothing to repair"
    );
}

#[test]
fn it_stands_when_the_daemon_has_ended_and_the_next_one_takes_it_over() {
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
        .expect_err("nobody lives, the rules do");
    let (mut second, runtime) = guard(&node);
    runtime
        .block_on(second.apply(sets(&[&pod], &[&pod, &peer])))
        .expect("the rules");
    pod.inside
        .connect(peer.both(80)[0])
        .expect_err("dropped as before");
}
