//! How the capture rules redirect real connections, in real network namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod namespaces;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use namespaces::{NODE_V4, NODE_V6, Node, Pod, accept, assert_carries, no_connection_arrives};
use socket2::SockRef;
use ztunnel::capture::{Capture, Drift, NetnsWatch, PodListeners, Redirection, Rules, listeners};
use ztunnel::ports_and_marks::DAEMON_MARK;

/// Addresses outside the node with a route but no host.
const UNREACHABLE: [&str; 2] = ["203.0.113.9:80", "[2001:db8::9]:80"];
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

/// Opens listeners and applies the capture, as enrolment does.
fn capture(pod: &Pod) -> (PodListeners, Capture) {
    let listeners = listeners(&pod.inside.netns, 1)
        .expect("free ports")
        .remove(0);
    (
        listeners,
        Capture::apply(pod.inside.netns.clone(), Rules::Redirect(redirection()))
            .expect("the rules"),
    )
}

/// The original destination of a redirected connection.
fn original_dst(stream: &std::net::TcpStream, v6: bool) -> SocketAddr {
    let socket = SockRef::from(stream);
    let original = if v6 {
        socket.original_dst_v6()
    } else {
        socket.original_dst_v4()
    };
    original
        .expect("the connection is in conntrack")
        .as_socket()
        .expect("an IP address")
}

#[test]
fn outgoing_connections_are_redirected_to_15001_with_original_dst() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, _capture) = capture(&pod);
    for to in UNREACHABLE.map(|to| to.parse::<SocketAddr>().unwrap()) {
        let client = pod.inside.connect(to).expect("accepted by the daemon");
        let (server, from) = accept(&listeners.outbound);
        assert_eq!(original_dst(&server, to.is_ipv6()), to);
        assert_eq!(
            from.ip().to_canonical(),
            if to.is_ipv4() { pod.v4 } else { pod.v6 }
        );
        assert_carries(&client, &server, b"request");
        assert_carries(&server, &client, b"answer");
    }
}

#[test]
fn daemon_and_pod_local_connections_are_not_redirected() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, _capture) = capture(&pod);
    for to in UNREACHABLE.map(|to| to.parse::<SocketAddr>().unwrap()) {
        pod.inside
            .connect_as(to, None, Some(DAEMON_MARK))
            .expect_err("no host has this address");
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
        assert_carries(&client, &accept(&app).0, b"to itself");
    }
    assert!(
        no_connection_arrives(&listeners.outbound)
            && no_connection_arrives(&listeners.inbound_plain)
    );
}

#[test]
fn incoming_connections_are_redirected_to_15006_except_hbone() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    let (listeners, _capture) = capture(&pod);
    for (to, from) in pod.both(80).into_iter().zip([other.v4, other.v6]) {
        let client = other.inside.connect(to).expect("accepted by the daemon");
        let (server, peer) = accept(&listeners.inbound_plain);
        assert_eq!(original_dst(&server, to.is_ipv6()), to);
        assert_eq!(peer.ip().to_canonical(), from);
        assert_carries(&server, &client, b"server sends first");
    }
    for port in [15001, 15006] {
        let _client = other
            .inside
            .connect(pod.both(port)[0])
            .expect("accepted by the daemon");
        let (server, _) = accept(&listeners.inbound_plain);
        assert_eq!(
            original_dst(&server, false).port(),
            port,
            "the daemon can refuse connections to its own ports"
        );
    }
    for to in pod.both(15008) {
        let client = other.inside.connect(to).expect("accepted by the daemon");
        assert_carries(&client, &accept(&listeners.inbound_hbone).0, b"hello");
    }
    assert!(no_connection_arrives(&listeners.outbound));
}

#[test]
fn only_probes_from_the_node_bypass_redirection() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    let (listeners, _capture) = capture(&pod);
    for (probed, from) in pod.both(PROBE_PORT).into_iter().zip([NODE_V4, NODE_V6]) {
        let app = pod.inside.listen(probed);
        let _probe = node.inside.connect(probed).expect("the application");
        assert_eq!(
            accept(&app).1.ip(),
            from.parse::<IpAddr>().unwrap(),
            "the source address is unchanged"
        );
        let _not_a_probe = node
            .inside
            .connect(SocketAddr::new(probed.ip(), 9000))
            .expect("the daemon");
        accept(&listeners.inbound_plain);
        let _not_the_node = other.inside.connect(probed).expect("the daemon");
        accept(&listeners.inbound_plain);
        assert!(no_connection_arrives(&app));
    }
}

#[test]
fn replies_to_a_spoofed_client_address_return_to_the_daemon() {
    let mut node = Node::new();
    let (pod, client) = (node.pod(), node.pod());
    let (_listeners, _capture) = capture(&pod);
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
            assert_eq!(seen.ip(), from, "the application sees the client's address");
            assert_carries(&daemon, &server, b"request");
            assert_carries(&server, &daemon, &vec![7; 300_000]);
        }
    }
}

#[test]
fn spoofed_connection_may_reuse_the_clients_ports() {
    let mut node = Node::new();
    let (pod, client) = (node.pod(), node.pod());
    let (listeners, _capture) = capture(&pod);
    for (to, from) in pod.both(9000).into_iter().zip([client.v4, client.v6]) {
        let from = SocketAddr::new(from, 40_000);
        let app = pod.inside.listen(to);
        let outside = client
            .inside
            .connect_as(to, Some(from), None)
            .expect("the daemon");
        let (redirected, _) = accept(&listeners.inbound_plain);
        let inside = pod
            .inside
            .connect_as(to, Some(from), Some(DAEMON_MARK))
            .expect("the application");
        let (server, seen) = accept(&app);
        assert_eq!(seen, from);
        assert_carries(&outside, &redirected, b"one connection");
        assert_carries(&inside, &server, b"and another");
        assert_carries(&server, &inside, b"back on this");
        assert_carries(&redirected, &outside, b"and on that");
    }
}

#[test]
fn connections_established_before_capture_are_not_redirected() {
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
    let (listeners, _capture) = capture(&pod);
    for (client, server) in &pairs {
        assert_carries(client, server, b"still here");
        assert_carries(server, client, b"me too");
    }
    assert!(
        no_connection_arrives(&listeners.outbound)
            && no_connection_arrives(&listeners.inbound_plain)
    );
}

#[test]
fn every_drift_is_detected_and_repaired() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, mut capture) = capture(&pod);
    let changes: [(&str, &[&str], Drift); 6] = [
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
    for (program, arguments, drift) in changes {
        assert_eq!(capture.verify(true).expect("verified"), None);
        pod.inside.run(program, arguments);
        assert_eq!(
            capture.verify(true).expect("verified"),
            Some(drift),
            "{program} {arguments:?}"
        );
        capture =
            Capture::apply(pod.inside.netns.clone(), capture.rules().clone()).expect("the rules");
        assert_eq!(capture.verify(true).expect("verified"), None);
    }
    drop(listeners);
    assert_eq!(
        capture.verify(true).expect("verified"),
        Some(Drift::ListenersGone)
    );
    assert_eq!(capture.verify(false).expect("verified"), None);
}

#[test]
fn rules_of_other_programs_are_no_drift() {
    let mut node = Node::new();
    let pod = node.pod();
    let (_listeners, mut capture) = capture(&pod);
    pod.inside
        .run("nft", &["add", "table", "inet", "other_program"]);
    assert_eq!(capture.verify(true).expect("verified"), None);
}

#[test]
fn changes_of_rules_and_routes_are_notified() {
    let mut node = Node::new();
    let pod = node.pod();
    let (_listeners, _capture) = capture(&pod);
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
            tokio::time::timeout(namespaces::TIMEOUT, watch.changed())
                .await
                .expect("notified in time")
                .expect("readable");
        }
    });
}

#[test]
fn return_path_keeps_connections_and_removal_restores_the_namespace() {
    let mut node = Node::new();
    let (pod, client) = (node.pod(), node.pod());
    // The table of another program loads conntrack, so that the state before and after is
    // comparable.
    pod.inside
        .run("nft", &["add", "table", "inet", "other_program"]);
    let before = pod.inside.rules_and_routes();
    let (listeners, _capture) = capture(&pod);
    let app = pod.inside.listen(pod.both(9000)[0]);
    let outbound = pod
        .inside
        .connect(UNREACHABLE[0].parse().unwrap())
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
        assert_carries(one, other, b"still");
        assert_carries(other, one, b"here");
    }
    assert_eq!(leaving.verify(false).expect("verified"), None);
    let _direct = client
        .inside
        .connect(pod.both(9000)[0])
        .expect("the application itself");
    accept(&app);
    pod.inside
        .connect(UNREACHABLE[0].parse().unwrap())
        .expect_err("no host has this address, and the daemon does not accept");

    Capture::remove(&pod.inside.netns).expect("removed");
    assert_eq!(pod.inside.rules_and_routes(), before);
    Capture::remove(&pod.inside.netns).expect("removing nothing succeeds");
}

#[test]
fn second_daemon_replaces_rules_and_keeps_connections() {
    let mut node = Node::new();
    let pod = node.pod();
    let (listeners, _capture) = capture(&pod);
    let client = pod
        .inside
        .connect(UNREACHABLE[0].parse().unwrap())
        .expect("the daemon");
    let (server, _) = accept(&listeners.outbound);
    assert!(Capture::is_present(&pod.inside.netns).expect("listed"));
    let (_second, mut capture) = capture(&pod);
    assert_eq!(capture.verify(true).expect("verified"), None);
    assert_carries(&client, &server, b"through the first daemon");
    assert_carries(&server, &client, b"still");
}

#[test]
fn pod_without_ipv6_is_captured() {
    let mut node = Node::new();
    let pod = node.pod();
    for device in ["all", "default", "lo", "eth0"] {
        pod.inside
            .sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6=1"));
    }
    let (listeners, mut capture) = capture(&pod);
    assert_eq!(capture.verify(true).expect("verified"), None);
    let client = pod
        .inside
        .connect(UNREACHABLE[0].parse().unwrap())
        .expect("the daemon");
    assert_carries(&client, &accept(&listeners.outbound).0, b"over IPv4");
    assert_eq!(
        pod.inside.netns.addresses().expect("readable"),
        [pod.v4].into()
    );
}

#[test]
fn half_closed_connections_have_the_timeout_of_open_ones() {
    let mut node = Node::new();
    let pod = node.pod();
    let (_listeners, _capture) = capture(&pod);
    let option = |name: &str| pod.inside.run("sysctl", &["-n", name]);
    assert_eq!(
        option("net.netfilter.nf_conntrack_tcp_timeout_close_wait"),
        option("net.netfilter.nf_conntrack_tcp_timeout_established")
    );
    assert_eq!(option("net.ipv4.tcp_migrate_req").trim(), "1");
}

#[test]
fn namespace_addresses_identify_the_pod() {
    let mut node = Node::new();
    let (pod, other) = (node.pod(), node.pod());
    assert_eq!(
        pod.inside.netns.addresses().expect("readable"),
        [pod.v4, pod.v6].into()
    );
    assert_eq!(
        other.inside.netns.addresses().expect("readable"),
        [other.v4, other.v6].into()
    );
    assert_ne!(pod.inside.netns.id(), other.inside.netns.id());
    assert_eq!(
        Arc::new(ztunnel::netns::Netns::open(&pod.inside.path()).unwrap()).id(),
        pod.inside.netns.id()
    );
}

#[test]
fn port_in_use_by_the_application_is_named_in_the_error() {
    let mut node = Node::new();
    let pod = node.pod();
    let _app = pod.inside.listen("0.0.0.0:15008".parse().unwrap());
    let error = listeners(&pod.inside.netns, 1).err().expect("taken");
    assert!(error.to_string().contains("port 15008"), "{error}");
}
