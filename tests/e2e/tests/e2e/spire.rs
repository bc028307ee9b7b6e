//! Identities from SPIRE with a real server and agents: issuing, rotation, an agent that is down, and a missing or wrong
//! registration entry.

use std::thread;
use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::identity::{CertTimeline, EchoStream, LoadPath, ShortConnections, cert_status};
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::programs::{self, PORT, curl, nginx, url};
use ambit_e2e::spire::{self, SpireAgent, SpireServer};
use lab::{IpFamily, Lab, Location, Options, Status};

const CLIENT: &str = "spiffe://cluster.local/ns/in/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/in/sa/server";

/// How long a change in SPIRE may take to reach a pod: the agent polls every second and pushes to the daemon.
const DEADLINE: Duration = Duration::from_secs(15);

/// The port of an echo server.
const ECHO: u16 = 9000;

/// A client on node `a`, and on node `b` an HTTP server and an echo server.
fn manifests() -> String {
    let server = Pod::new("in", "server").on("b").runs(nginx(&[PORT], "hi"));
    let listen = format!("TCP6-LISTEN:{ECHO},ipv6only=0,reuseaddr,fork");
    let echo = Pod::new("in", "echo").on("b");
    let echo = echo.runs(programs::words(&["socat", &listen, "EXEC:cat"]));
    let namespace = manifest::namespace("in", Some("ambient"));
    let client = Pod::new("in", "client").on("a").into();
    manifest::all([
        manifest::two_nodes(),
        namespace,
        client,
        server.into(),
        // Two pods with one identity.
        echo.spec("serviceAccountName", "server").into(),
    ])
}

fn up(agents: [&SpireAgent; 2]) -> Lab {
    Lab::up(manifests(), spire::lab_options(agents)).unwrap()
}

/// Brings up the lab without waiting for its pods: a pod without an identity never becomes ready.
fn up_without_waiting(agents: [&SpireAgent; 2]) -> Lab {
    let options = Options {
        wait_until_ready: false,
        ..spire::lab_options(agents)
    };
    Lab::up(manifests(), options).unwrap()
}

fn request(lab: &Lab) -> anyhow::Result<programs::CurlResponse> {
    let server = lab.pod_ip("server", IpFamily::V4)?;
    curl(lab, &Location::pod("client"), &url(server, PORT), &[])
}

/// Waits until the dump entry of an identity has this error code.
fn wait_error(lab: &Lab, node: &str, identity: &str, code: &str) {
    let what = format!("{identity} to fail with {code}");
    let failed = || {
        let entry = cert_status(lab, node, identity).ok()??.entry;
        entry.to_string().contains(code).then_some(())
    };
    lab.wait_until(&what, DEADLINE, failed).unwrap();
}

/// Waits until a request of the client succeeds.
fn wait_response(lab: &Lab) {
    lab.wait_until("a response", DEADLINE, || request(lab).ok())
        .unwrap();
}

/// Checks that the client has no traffic although the server is ready.
fn assert_no_traffic(lab: &Lab) {
    let server_is_ready = |status: &Status| status.pod("server").is_ok_and(|pod| pod.ready);
    lab.wait_status("the server", DEADLINE, server_is_ready)
        .unwrap();
    assert!(request(lab).is_err());
    assert!(!lab.status().unwrap().pod("client").unwrap().ready);
}

#[test]
fn daemons_request_only_identities_of_their_own_pods() {
    let spire = SpireServer::start().unwrap();
    let (a, b) = (
        spire.start_agent("a").unwrap(),
        spire.start_agent("b").unwrap(),
    );
    spire.register_workload("a", "in", "client", None).unwrap();
    spire.register_workload("b", "in", "server", None).unwrap();
    // SPIRE would issue all identities on both nodes.
    spire.register_workload("a", "in", "server", None).unwrap();
    spire.register_workload("b", "in", "client", None).unwrap();
    let lab = up([&a, &b]);
    wait_response(&lab);
    let fields = [
        ("direction", "inbound"),
        ("src.identity", CLIENT),
        ("dst.identity", SERVER),
    ];
    access_log::wait(&lab, "b", &fields).unwrap();
    for (node, agent, local, other) in [
        ("a", &a, "sa:client", "sa:server"),
        ("b", &b, "sa:server", "sa:client"),
    ] {
        let selectors = agent.subscribed_selectors().unwrap();
        let has = |account| selectors.iter().any(|one| one.contains(account));
        assert!(has(local) && !has(other), "{selectors:?}");
        let certificates = lab.config_dump(node).unwrap()["certificates"].clone();
        assert_eq!(certificates.as_array().unwrap().len(), 1, "{certificates}");
    }
}

#[test]
fn certificates_rotate_under_load_and_survive_an_agent_restart() {
    // SPIRE backdates certificates by 10 s and pushes the next one at half of their validity, so 10 s after issuing.
    const TTL: Duration = Duration::from_secs(30);
    let spire = SpireServer::start().unwrap();
    let (mut a, mut b) = (
        spire.start_agent("a").unwrap(),
        spire.start_agent("b").unwrap(),
    );
    spire
        .register_workload("a", "in", "client", Some(TTL))
        .unwrap();
    spire
        .register_workload("b", "in", "server", Some(TTL))
        .unwrap();
    let lab = up([&a, &b]);
    wait_response(&lab);
    let [server, echo] = ["server", "echo"].map(|pod| lab.pod_ip(pod, IpFamily::V4).unwrap());
    thread::scope(|scope| {
        let recorder = CertTimeline::record(scope, &lab, &["a", "b"]);
        let mut stream = EchoStream::start(&lab, "client", echo, ECHO, 64).unwrap();
        let load = ShortConnections::start(&lab, "client", server, 20).unwrap();
        let serials = || [("a", CLIENT), ("b", SERVER)].map(|(node, id)| serial(&lab, node, id));
        for _ in 0..2 {
            wait_rotation(&lab, serials(), TTL);
        }
        // Right after a rotation the certificates stay valid for longer than the agents are down.
        let last = serials();
        a.kill();
        b.kill();
        wait_error(&lab, "a", CLIENT, "spire_unreachable");
        wait_error(&lab, "b", SERVER, "spire_unreachable");
        assert_eq!(serials(), last, "the last certificates must stay in use");
        a.start().unwrap();
        b.start().unwrap();
        wait_rotation(&lab, last, TTL);
        stream.check_alive().unwrap();
        let (records, timeline) = (load.finish().unwrap(), recorder.stop());
        let path = LoadPath {
            node: "a",
            source: CLIENT,
            destination: SERVER,
        };
        assert!(records.len() > 100, "{} connections", records.len());
        assert_eq!(path.check_failures(&lab, &records, &timeline).unwrap(), 0);
        let gaps = [CLIENT, SERVER].map(|id| timeline.gaps(id));
        assert_eq!(gaps, [Vec::new(), Vec::new()]);
        assert!(stream.finish().unwrap() > 0);
    });
}

fn serial(lab: &Lab, node: &str, identity: &str) -> String {
    cert_status(lab, node, identity).unwrap().unwrap().serial
}

/// Waits until both identities have new certificates.
fn wait_rotation(lab: &Lab, before: [String; 2], timeout: Duration) {
    let changed = || {
        let now = [("a", CLIENT), ("b", SERVER)].map(|(node, id)| serial(lab, node, id));
        let all = now.iter().zip(&before).all(|(now, before)| now != before);
        all.then_some(())
    };
    lab.wait_until("a rotation on both nodes", timeout, changed)
        .unwrap();
}

#[test]
fn missing_entry_fails_closed_until_it_is_created() {
    let spire = SpireServer::start().unwrap();
    let (a, b) = (
        spire.start_agent("a").unwrap(),
        spire.start_agent("b").unwrap(),
    );
    spire.register_workload("b", "in", "server", None).unwrap();
    let lab = up_without_waiting([&a, &b]);
    wait_error(&lab, "a", CLIENT, "spire_no_entry");
    assert_no_traffic(&lab);
    let entry = spire.register_workload("a", "in", "client", None).unwrap();
    wait_response(&lab);
    // Deleting the entry does not revoke a valid certificate.
    spire.delete_entry(&entry).unwrap();
    wait_error(&lab, "a", CLIENT, "spire_no_entry");
    request(&lab).unwrap();
}

#[test]
fn identity_other_than_the_pods_own_is_refused() {
    let spire = SpireServer::start().unwrap();
    let (a, b) = (
        spire.start_agent("a").unwrap(),
        spire.start_agent("b").unwrap(),
    );
    spire.register_workload("b", "in", "server", None).unwrap();
    let admin = "spiffe://cluster.local/ns/in/sa/admin";
    spire
        .register_other_identity("a", "in", "client", admin)
        .unwrap();
    let lab = up_without_waiting([&a, &b]);
    wait_error(&lab, "a", CLIENT, "wrong_identity");
    assert_no_traffic(&lab);
    // Among several identities, the daemon takes the pod's own.
    spire.register_workload("a", "in", "client", None).unwrap();
    wait_response(&lab);
    let dump = lab.config_dump("a").unwrap()["certificates"].to_string();
    assert!(!dump.contains(&format!("\"{admin}\"")), "{dump}");
}

#[test]
fn pod_waits_for_an_agent_that_is_down_or_denies_the_daemon() {
    let spire = SpireServer::start().unwrap();
    let (mut a, b) = (
        spire.start_agent_without_delegate("a").unwrap(),
        spire.start_agent("b").unwrap(),
    );
    spire.register_workload("a", "in", "client", None).unwrap();
    spire.register_workload("b", "in", "server", None).unwrap();
    a.kill();
    let lab = up_without_waiting([&a, &b]);
    wait_error(&lab, "a", CLIENT, "spire_unreachable");
    assert_no_traffic(&lab);
    a.start().unwrap();
    wait_error(&lab, "a", CLIENT, "spire_denied");
    assert_no_traffic(&lab);
    spire.authorize_daemon("a").unwrap();
    wait_response(&lab);
}
