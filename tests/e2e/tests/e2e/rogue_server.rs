//! A rogue server at the address of a mesh pod: the client's daemon refuses it with a reason, and sends it no payload
//! unless it has proven the pod's identity.

use std::net::IpAddr;
use std::time::Duration;

use ambit_e2e::hostile::{
    AttackFixture, Behaviour, DaemonMonitor, FrameType, MEMBER_IDENTITY, RogueServer, TestCa,
    empty_settings, frame, response_headers,
};
use ambit_e2e::input::SourceFile;
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{Lab, Location, Process};

/// In the payload of each request.
const MARKER: &str = "marker-496d706f73746f72";

/// How long the daemon may take to end a connection to a rogue server.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(60);

/// A rogue server, and the reason with which the client's daemon must refuse it.
struct Case {
    name: &'static str,
    reason: &'static str,
    /// Whether its certificate proves the pod's identity.
    has_pod_identity: bool,
    behaviour: Behaviour,
}

fn cases(ca: &TestCa) -> Result<Vec<Case>> {
    let own = |name: &str| ca.leaf(&[&format!("spiffe://cluster.local/ns/shop/sa/{name}")]);
    let tls = |certificate, response| Behaviour::Tls {
        certificate,
        first: empty_settings(),
        response,
    };
    let case = |name, reason, has_pod_identity, behaviour| Case {
        name,
        reason,
        has_pod_identity,
        behaviour,
    };
    let plain = Behaviour::Plain(b"HTTP/1.1 200 OK\r\n\r\n");
    let foreign = TestCa::untrusted()?.leaf(&[MEMBER_IDENTITY])?;
    let nameless = ca.leaf(&[])?;
    let accepted = response_headers(&[0x88], false);
    let unauthorized = response_headers(b"\x08\x03401", true);
    let bad_frame = frame(FrameType::Data, 0, 0, b"x");
    let no_http2 = Behaviour::Tls {
        certificate: own("mute")?,
        first: vec![],
        response: vec![],
    };
    Ok(vec![
        case("silent", "tls_handshake_timeout", false, Behaviour::Silent),
        case("plain", "peer_not_hbone", false, plain),
        case("foreign", "peer_untrusted", false, tls(foreign, vec![])),
        case("nameless", "peer_untrusted", false, tls(nameless, vec![])),
        case(
            "stolen",
            "peer_identity_mismatch",
            false,
            tls(own("web")?, accepted),
        ),
        case("mute", "h2_handshake_timeout", false, no_http2),
        case(
            "pending",
            "connect_response_timeout",
            true,
            tls(own("pending")?, vec![]),
        ),
        case(
            "refusing",
            "connect_rejected",
            true,
            tls(own("refusing")?, unauthorized),
        ),
        case(
            "broken",
            "h2_protocol_error",
            true,
            tls(own("broken")?, bad_frame),
        ),
    ])
}

/// A pod in the mesh at an address where a rogue server listens.
fn pod_manifest(ip: IpAddr, name: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, name: {name}, uid: {name}-1}}, \
         spec: {{nodeName: b, serviceAccountName: {name}, containers: [{{name: main}}]}}, status: \
         {{phase: Running, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}}}"
    )
}

/// A case whose server listens, and a request to it.
struct RunningCase {
    name: &'static str,
    reason: &'static str,
    has_pod_identity: bool,
    ip: IpAddr,
    server: RogueServer,
    request: Process,
    _pod: SourceFile,
}

impl RunningCase {
    /// Starts the server at `ip` on the lab's bridge, adds the pod, and sends a request.
    fn start(lab: &Lab, ip: IpAddr, case: Case) -> Result<Self> {
        let deadline = Duration::from_secs(20);
        let add = ["ip", "address", "add", &format!("{ip}/32"), "dev", "br0"];
        lab.exec_in(&Location::Fabric, &add, deadline)?.ok()?;
        let server = RogueServer::start(lab.netns(&Location::Fabric)?, ip, case.behaviour)?;
        let name = case.name;
        let pod = SourceFile::write(lab, &format!("rogue-{name}.yaml"), pod_manifest(ip, name))?;
        lab.wait_until("the pod to be in the daemon's dump", deadline, || {
            let dump = lab.config_dump("a").ok()?;
            let mut workloads = dump.get("workloads")?.as_array()?.iter();
            workloads.any(|known| known["name"] == name).then_some(())
        })?;
        let header = format!("X-Marker: {MARKER}");
        let url = format!("http://{ip}:{PORT}/");
        let request = ["curl", "-sS", "-m", "50", "-H", &header, &url];
        Ok(Self {
            name,
            reason: case.reason,
            has_pod_identity: case.has_pod_identity,
            ip,
            server,
            request: lab.spawn("neighbour", &request)?,
            _pod: pod,
        })
    }

    /// Checks that the daemon has ended the request with the case's reason, and that the server has received the
    /// payload only with the pod's identity.
    fn check_refused(self, monitor: &DaemonMonitor<'_>) -> Result<()> {
        let output = self.request.wait(REFUSAL_DEADLINE)?;
        ensure!(!output.success(), "it was answered: {}", output.stdout);
        ensure!(
            !output.stderr.contains("timed out"),
            "the daemon did not end the request"
        );
        let line = monitor.wait_failure_of(&[self.reason], self.ip)?;
        ensure!(line.field("direction") == "outbound", "{}", line.line);
        let received = self.server.received();
        let has_payload = received
            .windows(MARKER.len())
            .any(|window| window == MARKER.as_bytes());
        ensure!(
            self.has_pod_identity || !has_payload,
            "the server received the payload"
        );
        Ok(())
    }
}

#[test]
fn server_without_the_pods_identity_receives_no_payload() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let monitor = DaemonMonitor::start(&fixture.lab, "a")?;
    let mut running = Vec::new();
    for (last, case) in (201..).zip(cases(&fixture.ca)?) {
        running.push(RunningCase::start(
            &fixture.lab,
            [10, 0, 0, last].into(),
            case,
        )?);
    }
    for case in running {
        let name = case.name;
        case.check_refused(&monitor).with_context(|| name)?;
    }
    monitor.check_bounded(64 * 1024 * 1024, 64)?;
    fixture.check_neighbour()
}
