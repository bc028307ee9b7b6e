//! Identities from SPIRE: its own server and an agent for each node, its own ways to rotate, to be
//! away, and to have no or another answer.

use std::thread;
use std::time::Duration;

use ambit_e2e::access_log;
use ambit_e2e::identity::{Path, Short, Stream, Timeline, held};
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::programs::{self, PORT, curl, nginx, url};
use ambit_e2e::spire::{self, Agent, Spire};
use lab::{IpFamily, Lab, Location, Options, Status};

const CLIENT: &str = "spiffe://cluster.local/ns/in/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/in/sa/server";

/// How long something new in SPIRE may take to reach a pod: the agent looks every second, and the
/// daemon is told.
const SOON: Duration = Duration::from_secs(15);

/// The port of an echo server.
const ECHO: u16 = 9000;

/// A client on node `a`, and on node `b` a server of HTTP that also echoes.
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
        // One identity may have several pods.
        echo.spec("serviceAccountName", "server").into(),
    ])
}

fn lab_of(agents: [&Agent; 2]) -> Lab {
    Lab::up(manifests(), spire::options(agents)).unwrap()
}

/// The same, not waiting for pods: one whose identity cannot be proved is never started.
fn begun_with(agents: [&Agent; 2]) -> Lab {
    let options = Options {
        wait_until_ready: false,
        ..spire::options(agents)
    };
    Lab::up(manifests(), options).unwrap()
}

fn asks(lab: &Lab) -> anyhow::Result<programs::Curled> {
    let server = lab.pod_ip("server", IpFamily::V4)?;
    curl(lab, &Location::pod("client"), &url(server, PORT), &[])
}

/// Waits until the identity on the node failed with this code.
fn fails_with(lab: &Lab, node: &str, identity: &str, code: &str) {
    let what = format!("{identity} to fail with {code}");
    let failed = || {
        let entry = held(lab, node, identity).ok()??.entry;
        entry.to_string().contains(code).then_some(())
    };
    lab.wait_until(&what, SOON, failed).unwrap();
}

/// Waits until the client is answered.
fn is_answered(lab: &Lab) {
    lab.wait_until("an answer", SOON, || asks(lab).ok())
        .unwrap();
}

/// No traffic of the client gets through, although the server is there.
fn is_cut_off(lab: &Lab) {
    let server_is_there = |status: &Status| status.pod("server").is_ok_and(|pod| pod.ready);
    lab.wait_status("the server", SOON, server_is_there)
        .unwrap();
    assert!(asks(lab).is_err());
    assert!(!lab.status().unwrap().pod("client").unwrap().ready);
}

#[test]
fn pods_talk_with_the_identities_that_spire_gives_and_nobody_elses_are_asked_for() {
    let spire = Spire::start().unwrap();
    let (a, b) = (spire.agent("a").unwrap(), spire.agent("b").unwrap());
    spire.workload("a", "in", "client", None).unwrap();
    spire.workload("b", "in", "server", None).unwrap();
    // SPIRE would give both nodes all identities.
    spire.workload("a", "in", "server", None).unwrap();
    spire.workload("b", "in", "client", None).unwrap();
    let lab = lab_of([&a, &b]);
    is_answered(&lab);
    let proven = [
        ("direction", "inbound"),
        ("src.identity", CLIENT),
        ("dst.identity", SERVER),
    ];
    access_log::wait(&lab, "b", &proven).unwrap();
    for (node, agent, local, other) in [
        ("a", &a, "sa:client", "sa:server"),
        ("b", &b, "sa:server", "sa:client"),
    ] {
        let asked = agent.asked().unwrap();
        assert!(asked.iter().any(|one| one.contains(local)), "{asked:?}");
        assert!(!asked.iter().any(|one| one.contains(other)), "{asked:?}");
        let held = lab.config_dump(node).unwrap()["certificates"].clone();
        assert_eq!(held.as_array().unwrap().len(), 1, "{held}");
    }
}

#[test]
fn certificates_rotate_under_load_and_an_agent_that_is_killed_is_not_noticed() {
    const TTL: Duration = Duration::from_secs(60);
    let spire = Spire::start().unwrap();
    let (mut a, mut b) = (spire.agent("a").unwrap(), spire.agent("b").unwrap());
    spire.workload("a", "in", "client", Some(TTL)).unwrap();
    spire.workload("b", "in", "server", Some(TTL)).unwrap();
    let lab = lab_of([&a, &b]);
    is_answered(&lab);
    let [server, echo] = ["server", "echo"].map(|pod| lab.pod_ip(pod, IpFamily::V4).unwrap());
    thread::scope(|scope| {
        let timeline = Timeline::record(scope, &lab, &["a", "b"]);
        let mut stream = Stream::start(&lab, "client", echo, ECHO, 64).unwrap();
        let load = Short::start(&lab, "client", server, 20).unwrap();
        let serials = || [("a", CLIENT), ("b", SERVER)].map(|(node, id)| serial(&lab, node, id));
        // Both agents push each rotation at half of a life, which begins ten seconds before it is given.
        for _ in 0..2 {
            rotated(&lab, serials(), TTL);
        }
        // Right after a rotation what is held is good for longer than the agents are away.
        let last = serials();
        a.kill();
        b.kill();
        fails_with(&lab, "a", CLIENT, "spire_unreachable");
        fails_with(&lab, "b", SERVER, "spire_unreachable");
        assert_eq!(serials(), last, "the last good certificates are kept");
        a.start().unwrap();
        b.start().unwrap();
        rotated(&lab, last, TTL);
        stream.going_on().unwrap();
        let (attempts, timeline) = (load.end().unwrap(), timeline.end());
        let path = Path {
            node: "a",
            source: CLIENT,
            destination: SERVER,
        };
        assert!(attempts.len() > 100, "{} connections", attempts.len());
        assert_eq!(path.judge(&lab, &attempts, &timeline).unwrap(), 0);
        let gaps = [CLIENT, SERVER].map(|id| timeline.gaps(id));
        assert_eq!(gaps, [Vec::new(), Vec::new()]);
        assert!(stream.end().unwrap() > 0);
    });
}

fn serial(lab: &Lab, node: &str, identity: &str) -> String {
    held(lab, node, identity).unwrap().unwrap().serial
}

/// Waits until both have other certificates.
fn rotated(lab: &Lab, before: [String; 2], within: Duration) {
    let changed = || {
        let now = [("a", CLIENT), ("b", SERVER)].map(|(node, id)| serial(lab, node, id));
        let all = now.iter().zip(&before).all(|(now, before)| now != before);
        all.then_some(())
    };
    lab.wait_until("a rotation on both nodes", within, changed)
        .unwrap();
}

#[test]
fn without_an_entry_traffic_fails_closed_with_the_reason_until_there_is_one() {
    let spire = Spire::start().unwrap();
    let (a, b) = (spire.agent("a").unwrap(), spire.agent("b").unwrap());
    spire.workload("b", "in", "server", None).unwrap();
    let lab = begun_with([&a, &b]);
    fails_with(&lab, "a", CLIENT, "spire_no_entry");
    is_cut_off(&lab);
    let entry = spire.workload("a", "in", "client", None).unwrap();
    is_answered(&lab);
    // An entry that is withdrawn takes nothing back that is still valid.
    spire.withdraw(&entry).unwrap();
    fails_with(&lab, "a", CLIENT, "spire_no_entry");
    asks(&lab).unwrap();
}

#[test]
fn another_identity_is_refused_although_spire_has_it_for_the_workload() {
    let spire = Spire::start().unwrap();
    let (a, b) = (spire.agent("a").unwrap(), spire.agent("b").unwrap());
    spire.workload("b", "in", "server", None).unwrap();
    let admin = "spiffe://cluster.local/ns/in/sa/admin";
    spire.impostor("a", "in", "client", admin).unwrap();
    let lab = begun_with([&a, &b]);
    fails_with(&lab, "a", CLIENT, "wrong_identity");
    is_cut_off(&lab);
    // With several, the one that is the pod's own is taken.
    spire.workload("a", "in", "client", None).unwrap();
    is_answered(&lab);
    let dump = lab.config_dump("a").unwrap()["certificates"].to_string();
    assert!(!dump.contains(&format!("\"{admin}\"")), "{dump}");
}

#[test]
fn a_daemon_waits_for_an_agent_that_is_away_or_does_not_know_it() {
    let spire = Spire::start().unwrap();
    let (mut a, b) = (spire.lone_agent("a").unwrap(), spire.agent("b").unwrap());
    spire.workload("a", "in", "client", None).unwrap();
    spire.workload("b", "in", "server", None).unwrap();
    a.kill();
    let lab = begun_with([&a, &b]);
    fails_with(&lab, "a", CLIENT, "spire_unreachable");
    is_cut_off(&lab);
    a.start().unwrap();
    fails_with(&lab, "a", CLIENT, "spire_denied");
    is_cut_off(&lab);
    spire.delegate("a").unwrap();
    is_answered(&lab);
}
