//! What the rules do to real connections, in real network namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rig;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rig::{NODE_V4, NODE_V6, Node, Pod, accept, carries, nobody_connects};
use socket2::SockRef;
use ztunnel::capture::{Capture, Drift, NetnsWatch, PodListeners, Redirection, Rules, listeners};
use ztunnel::contract::DAEMON_MARK;

/// Somebody elsewhere, to whom there is a route and no more.
const ELSEWHERE: [&str; 2] = ["203.0.113.9:80", "[2001:db8::9]:80"];
const PROBE_PORT: u16 = 8080;

fn redirection() -> Redirection {
    let node_addresses = [NODE_V4, NODE_V6]
        .iter()
        .map(|ip| ip.parse().unwrap())
        .collect();
    Redirection {
        node_addresses,
        probe_ports: [PROBE_PORT].into(),
    }
}

/// Listeners and capture, as enrolment puts them in place.
fn captured(pod: &Pod) -> (PodListeners, Capture) {
    let listeners = listeners(&pod.inside.netns, 1)
        .expect("free ports")
        .remove(0);
    (
        listeners,
        Capture::apply(pod.inside.netns.clone(), Rules::Redirect(redirection()))
            .expect("the rules"),
    )
}

fn original(stream: &std::net::TcpStream, v6: bool) -> SocketAddr {
    let socket = SockRef::from(stream);
    let original = if v6 {
        socket.original_dst_v6()
    } else {
        socket.original_dst_v4()
    };
    original
        .expect("conntrack knows it")
        .as_socket()
        .expect("an IP address")
}

#[test]
fn what_the_pod_opens_goes_to_15001_with_its_destination_known() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, _capture) = captured(&pod);
    for to in ELSEWHERE.map(|to| to.parse::<SocketAddr>().unwrap()) {
        let client = pod.inside.connect(to).expect("accepted by the daemon");
        let (server, from) = accept(&listeners.outbound);
        assert_eq!(original(&server, to.is_ipv6()), to);
        assert_eq!(
            from.ip().to_canonical(),
            if to.is_ipv4() { pod.v4 } else { pod.v6 }
        );
        carries(&client, &server, b"request");
        carries(&server, &client, b"answer");
    }
}

#[test]
fn what_the_daemon_opens_and_what_stays_in_the_pod_is_not_redirected() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, _capture) = captured(&pod);
    for to in ELSEWHERE.map(|to| to.parse::<SocketAddr>().unwrap()) {
        pod.inside
            .connect_as(to, None, Some(DAEMON_MARK))
            .expect_err("nobody is there");
    }
    let own: [SocketAddr; 4] = [
        "127.0.0.1:9000".parse().unwrap(),
        "[::1]:9000".parse().unwrap(),
        pod.both(9000)[0],
        pod.both(9000)[1],
    ];
    for to in own {
        let app = pod.inside.listen(to);
        let client = pod.inside.connect(to).expect("the application");
        carries(&client, &accept(&app).0, b"to itself");
    }
    assert!(nobody_connects(&listeners.outbound) && nobody_connects(&listeners.inbound_plain));
}

#[test]
fn what_reaches_the_pod_goes_to_15006_unless_it_is_hbone() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    let (listeners, _capture) = captured(&pod);
    for (to, from) in pod.both(80).into_iter().zip([other.v4, other.v6]) {
        let client = other.inside.connect(to).expect("accepted by the daemon");
        let (server, peer) = accept(&listeners.inbound_plain);
        assert_eq!(original(&server, to.is_ipv6()), to);
        assert_eq!(peer.ip().to_canonical(), from);
        carries(&server, &client, b"server speaks first");
    }
    for port in [15001, 15006] {
        let _client = other
            .inside
            .connect(pod.both(port)[0])
            .expect("accepted by the daemon");
        let (server, _) = accept(&listeners.inbound_plain);
        assert_eq!(
            original(&server, false).port(),
            port,
            "the daemon sees which of its ports was meant, and can refuse"
        );
    }
    for to in pod.both(15008) {
        let client = other.inside.connect(to).expect("accepted by the daemon");
        carries(&client, &accept(&listeners.inbound_hbone).0, b"hello");
    }
    assert!(nobody_connects(&listeners.outbound));
}

#[test]
fn probes_from_the_node_reach_the_application_and_nothing_else_from_there_does() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    let (listeners, _capture) = captured(&pod);
    for (probed, from) in pod.both(PROBE_PORT).into_iter().zip([NODE_V4, NODE_V6]) {
        let app = pod.inside.listen(probed);
        let _probe = node.inside.connect(probed).expect("the application");
        assert_eq!(
            accept(&app).1.ip(),
            from.parse::<IpAddr>().unwrap(),
            "nothing is translated"
        );
        let _not_a_probe = node
            .inside
            .connect(SocketAddr::new(probed.ip(), 9000))
            .expect("the daemon");
        accept(&listeners.inbound_plain);
        let _not_the_node = other.inside.connect(probed).expect("the daemon");
        accept(&listeners.inbound_plain);
        assert!(nobody_connects(&app));
    }
}

#[test]
fn a_connection_opened_in_the_clients_name_finds_its_way_back() {
    let mut node = Node::new();
    let (pod, client) = (node.pod(), node.pod());
    let (_listeners, _capture) = captured(&pod);
    for strict in ["0", "1"] {
        for device in ["all", "lo", "eth0"] {
            pod.inside
                .sysctl(&format!("net.ipv4.conf.{device}.rp_filter={strict}"));
        }
        for (to, from) in pod.both(9000).into_iter().zip([client.v4, client.v6]) {
            let app = pod.inside.listen(to);
            let daemon = pod
                .inside
                .connect_as(to, Some(SocketAddr::new(from, 0)), Some(DAEMON_MARK))
                .expect("the application");
            let (server, seen) = accept(&app);
            assert_eq!(seen.ip(), from, "the application sees the client");
            carries(&daemon, &server, b"request");
            carries(&server, &daemon, &vec![7; 300_000]);
        }
    }
}

#[test]
fn a_connection_in_the_clients_name_may_have_the_ports_of_the_clients_own() {
    let mut node = Node::new();
    let (pod, client) = (node.pod(), node.pod());
    let (listeners, _capture) = captured(&pod);
    for (to, from) in pod.both(9000).into_iter().zip([client.v4, client.v6]) {
        let from = SocketAddr::new(from, 40_000);
        let app = pod.inside.listen(to);
        let outside = client
            .inside
            .connect_as(to, Some(from), None)
            .expect("the daemon");
        let (captured, _) = accept(&listeners.inbound_plain);
        let inside = pod
            .inside
            .connect_as(to, Some(from), Some(DAEMON_MARK))
            .expect("the application");
        let (server, seen) = accept(&app);
        assert_eq!(seen, from);
        carries(&outside, &captured, b"one connection");
        carries(&inside, &server, b"and another");
        carries(&server, &inside, b"back on this");
        carries(&captured, &outside, b"and on that");
    }
}

#[test]
fn connections_that_are_older_than_capture_stay_what_they_were() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    let pairs: Vec<_> = [(&pod, &other), (&other, &pod)]
        .iter()
        .flat_map(|(server, client)| {
            server
                .both(9000)
                .map(|to| (server.inside.listen(to), *client, to))
        })
        .map(|(app, client, to)| {
            (
                client.inside.connect(to).expect("no mesh yet"),
                accept(&app).0,
            )
        })
        .collect();
    let (listeners, _capture) = captured(&pod);
    for (client, server) in &pairs {
        carries(client, server, b"still here");
        carries(server, client, b"so am I");
    }
    assert!(nobody_connects(&listeners.outbound) && nobody_connects(&listeners.inbound_plain));
}

#[test]
fn whatever_is_taken_away_is_noticed_and_put_back() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, mut capture) = captured(&pod);
    let damages: [(&str, &[&str], Drift); 6] = [
        ("nft", &["flush", "ruleset"], Drift::TableGone),
        (
            "nft",
            &["flush", "chain", "inet", "ambit", "redirect_outbound"],
            Drift::RulesChanged,
        ),
        (
            "nft",
            &["add", "element", "inet", "ambit", "probe_ports", "{ 22 }"],
            Drift::RulesChanged,
        ),
        (
            "ip",
            &["rule", "del", "fwmark", "0x111/0xfff", "lookup", "100"],
            Drift::RoutingGone,
        ),
        (
            "ip",
            &["-6", "route", "flush", "table", "100"],
            Drift::RoutingGone,
        ),
        (
            "sysctl",
            &["-qw", "net.ipv6.conf.lo.disable_ipv6=1"],
            Drift::FamiliesChanged,
        ),
    ];
    for (program, arguments, drift) in damages {
        assert_eq!(capture.verify(true).expect("a look"), None);
        pod.inside.run(program, arguments);
        assert_eq!(
            capture.verify(true).expect("a look"),
            Some(drift),
            "{program} {arguments:?}"
        );
        capture =
            Capture::apply(pod.inside.netns.clone(), capture.rules().clone()).expect("the rules");
        assert_eq!(capture.verify(true).expect("a look"), None);
    }
    drop(listeners);
    assert_eq!(
        capture.verify(true).expect("a look"),
        Some(Drift::ListenersGone)
    );
    assert_eq!(capture.verify(false).expect("a look"), None);
}

#[test]
fn rules_of_others_are_no_drift() {
    let mut node = Node::new();
    let pod = node.pod();
    let (_listeners, mut capture) = captured(&pod);
    pod.inside
        .run("nft", &["add", "table", "inet", "somebody_elses"]);
    assert_eq!(capture.verify(true).expect("a look"), None);
}

#[test]
fn a_change_is_heard_at_once() {
    let mut node = Node::new();
    let pod = node.pod();
    let (_listeners, _capture) = captured(&pod);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let changes: [(&str, &[&str]); 2] = [
            ("nft", &["flush", "ruleset"]),
            ("ip", &["route", "flush", "table", "100"]),
        ];
        for (program, arguments) in changes {
            let watch = NetnsWatch::new(&pod.inside.netns).expect("two sockets");
            pod.inside.run(program, arguments);
            tokio::time::timeout(rig::SOON, watch.changed())
                .await
                .expect("heard")
                .expect("readable");
        }
    });
}

#[test]
fn a_pod_that_leaves_keeps_its_connections_and_then_nothing_of_ours() {
    let mut node = Node::new();
    let (pod, client) = (node.pod(), node.pod());
    // Somebody else's table, and conntrack in use, so that what is left can be compared with what
    // was.
    pod.inside
        .run("nft", &["add", "table", "inet", "somebody_elses"]);
    let before = pod.inside.rules_and_routes();
    let (listeners, _capture) = captured(&pod);
    let app = pod.inside.listen(pod.both(9000)[0]);
    let outbound = pod
        .inside
        .connect(ELSEWHERE[0].parse().unwrap())
        .expect("the daemon");
    let (outbound_daemon, _) = accept(&listeners.outbound);
    let inbound = client
        .inside
        .connect(pod.both(9000)[0])
        .expect("the daemon");
    let (inbound_daemon, _) = accept(&listeners.inbound_plain);
    let spoofed = pod
        .inside
        .connect_as(
            pod.both(9000)[0],
            Some(SocketAddr::new(client.v4, 0)),
            Some(DAEMON_MARK),
        )
        .expect("the app");
    let (spoofed_app, _) = accept(&app);

    let mut leaving =
        Capture::apply(pod.inside.netns.clone(), Rules::ReturnPath).expect("the rules");
    drop(listeners);
    for (one, other) in [
        (&outbound, &outbound_daemon),
        (&inbound, &inbound_daemon),
        (&spoofed, &spoofed_app),
    ] {
        carries(one, other, b"still");
        carries(other, one, b"here");
    }
    assert_eq!(leaving.verify(false).expect("a look"), None);
    let _direct = client
        .inside
        .connect(pod.both(9000)[0])
        .expect("the application itself");
    accept(&app);
    pod.inside
        .connect(ELSEWHERE[0].parse().unwrap())
        .expect_err("nobody is there, and no daemon in between");

    Capture::remove(&pod.inside.netns).expect("removed");
    assert_eq!(pod.inside.rules_and_routes(), before);
    Capture::remove(&pod.inside.netns).expect("removing nothing is no error");
}

#[test]
fn a_second_daemon_takes_the_rules_over_without_breaking_what_is_open() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, _capture) = captured(&pod);
    let client = pod
        .inside
        .connect(ELSEWHERE[0].parse().unwrap())
        .expect("the daemon");
    let (server, _) = accept(&listeners.outbound);
    assert!(Capture::is_present(&pod.inside.netns).expect("a look"));
    let (_second, mut capture) = captured(&pod);
    assert_eq!(capture.verify(true).expect("a look"), None);
    carries(&client, &server, b"through the first daemon");
    carries(&server, &client, b"still");
}

#[test]
fn a_pod_without_ipv6_is_captured_all_the_same() {
    let mut node = Node::new();
    let pod = node.pod();
    for device in ["all", "default", "lo", "eth0"] {
        pod.inside
            .sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6=1"));
    }
    let (listeners, mut capture) = captured(&pod);
    assert_eq!(capture.verify(true).expect("a look"), None);
    let client = pod
        .inside
        .connect(ELSEWHERE[0].parse().unwrap())
        .expect("the daemon");
    carries(&client, &accept(&listeners.outbound).0, b"over IPv4");
    assert_eq!(
        pod.inside.netns.addresses().expect("a look"),
        [pod.v4].into()
    );
}

#[test]
fn half_closed_connections_are_remembered_as_long_as_open_ones() {
    let mut node = Node::new();
    let pod = node.pod();
    let (_listeners, _capture) = captured(&pod);
    let option = |name: &str| pod.inside.run("sysctl", &["-n", name]);
    assert_eq!(
        option("net.netfilter.nf_conntrack_tcp_timeout_close_wait"),
        option("net.netfilter.nf_conntrack_tcp_timeout_established")
    );
    assert_eq!(option("net.ipv4.tcp_migrate_req").trim(), "1");
}

#[test]
fn the_addresses_of_a_namespace_prove_whose_it_is() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    assert_eq!(
        pod.inside.netns.addresses().expect("a look"),
        [pod.v4, pod.v6].into()
    );
    assert_eq!(
        other.inside.netns.addresses().expect("a look"),
        [other.v4, other.v6].into()
    );
    assert_ne!(pod.inside.netns.id(), other.inside.netns.id());
    assert_eq!(
        Arc::new(ztunnel::netns::Netns::open(&pod.inside.path()).unwrap()).id(),
        pod.inside.netns.id()
    );
}

#[test]
fn a_port_that_the_application_took_is_said() {
    let mut node = Node::new();
    let pod = node.pod();
    let _app = pod.inside.listen("0.0.0.0:15008".parse().unwrap());
    let error = listeners(&pod.inside.netns, 1).err().expect("taken");
    assert!(error.to_string().contains("port 15008"), "{error}");
}
