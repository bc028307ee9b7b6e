//! What a mesh daemon does when somebody else listens where a pod of the mesh should be.

use std::net::IpAddr;
use std::time::Duration;

use ambit_e2e::hostile::{
    Act, Arena, Authority, Impostor, Kind, MEMBER, Watch, frame, no_settings, status,
};
use ambit_e2e::input::SourceFile;
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{Lab, Location, Process};

/// A pod of the mesh as far as the objects say, at an address where an impostor listens.
fn at(ip: IpAddr, name: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, name: {name}, uid: {name}-1}}, \
         spec: {{nodeName: b, serviceAccountName: {name}, containers: [{{name: main}}]}}, status: \
         {{phase: Running, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}}}"
    )
}

/// In the payload, which nobody is told who has not proven to be the pod.
const MARKER: &str = "marker-496d706f73746f72";

/// How long a connection to an impostor may take to be given up, whatever the impostor does.
const GIVEN_UP: Duration = Duration::from_secs(60);

/// A pod that is another one, and what it does to who connects.
struct Part {
    name: &'static str,
    /// The reason of the client's daemon.
    reason: &'static str,
    /// Whether it is the pod as far as its certificate says.
    proven: bool,
    act: Act,
}

/// One of each kind.
fn parts(authority: &Authority) -> Result<Vec<Part>> {
    let own = |name: &str| authority.leaf(&[&format!("spiffe://cluster.local/ns/shop/sa/{name}")]);
    let tunnel = |leaf, then| Act::Tunnel(leaf, no_settings(), then);
    let unproven = |name, reason, act| Part {
        name,
        reason,
        proven: false,
        act,
    };
    let proven = |name, reason, act| Part {
        name,
        reason,
        proven: true,
        act,
    };
    let hello = Act::Say(b"HTTP/1.1 200 OK\r\n\r\n");
    let foreign = Authority::foreign()?.leaf(&[MEMBER])?;
    let accepted = status(&[0x88], false);
    let unauthorized = status(b"\x08\x03401", true);
    let bad_frame = frame(Kind::Data, 0, 0, b"x");
    Ok(vec![
        unproven("silent", "tls_handshake_timeout", Act::Silence),
        unproven("plain", "peer_not_hbone", hello),
        unproven("foreign", "peer_untrusted", tunnel(foreign, vec![])),
        unproven(
            "nameless",
            "peer_untrusted",
            tunnel(authority.leaf(&[])?, vec![]),
        ),
        unproven(
            "stolen",
            "peer_identity_mismatch",
            tunnel(own("web")?, accepted),
        ),
        unproven(
            "mute",
            "h2_handshake_timeout",
            Act::Tunnel(own("mute")?, vec![], vec![]),
        ),
        proven(
            "pending",
            "connect_response_timeout",
            tunnel(own("pending")?, vec![]),
        ),
        proven(
            "refusing",
            "connect_rejected",
            tunnel(own("refusing")?, unauthorized),
        ),
        proven(
            "broken",
            "h2_protocol_error",
            tunnel(own("broken")?, bad_frame),
        ),
    ])
}

/// A part that is played, and a request to it.
struct Played {
    name: &'static str,
    reason: &'static str,
    proven: bool,
    ip: IpAddr,
    impostor: Impostor,
    request: Process,
    _pod: SourceFile,
}

impl Played {
    /// Begins to play at an address of its own in the fabric, and to be asked there.
    fn start(lab: &Lab, ip: IpAddr, part: Part) -> Result<Self> {
        let soon = Duration::from_secs(20);
        let add = ["ip", "address", "add", &format!("{ip}/32"), "dev", "br0"];
        lab.exec_in(&Location::Fabric, &add, soon)?.ok()?;
        let impostor = Impostor::start(lab.netns(&Location::Fabric)?, ip, part.act)?;
        let name = part.name;
        let pod = SourceFile::write(lab, &format!("impostor-{name}.yaml"), at(ip, name))?;
        lab.wait_until("the daemon to know the pod", soon, || {
            let dump = lab.config_dump("a").ok()?;
            let mut workloads = dump.get("workloads")?.as_array()?.iter();
            workloads.any(|known| known["name"] == name).then_some(())
        })?;
        let header = format!("X-Marker: {MARKER}");
        let url = format!("http://{ip}:{PORT}/");
        let request = ["curl", "-sS", "-m", "50", "-H", &header, &url];
        Ok(Self {
            name,
            reason: part.reason,
            proven: part.proven,
            ip,
            impostor,
            request: lab.spawn("neighbour", &request)?,
            _pod: pod,
        })
    }

    /// The daemon has ended the request with the reason of this part, and told the payload to nobody.
    fn ends_refused(self, watch: &Watch<'_>) -> Result<()> {
        let output = self.request.wait(GIVEN_UP)?;
        ensure!(!output.success(), "it has answered: {}", output.stdout);
        ensure!(
            !output.stderr.contains("timed out"),
            "not ended by the daemon"
        );
        let line = watch.explained_of(self.reason, self.ip)?;
        ensure!(line.field("direction") == "outbound", "{}", line.line);
        let heard = self.impostor.heard();
        let told = heard
            .windows(MARKER.len())
            .any(|window| window == MARKER.as_bytes());
        ensure!(self.proven || !told, "it was told the payload");
        Ok(())
    }
}

#[test]
fn a_server_that_is_not_the_pod_it_should_be_gets_not_one_byte() -> Result<()> {
    let mut arena = Arena::up()?;
    let watch = Watch::start(&arena.lab, "a")?;
    let mut stage = Vec::new();
    for (last, part) in (201..).zip(parts(&arena.authority)?) {
        stage.push(Played::start(&arena.lab, [10, 0, 0, last].into(), part)?);
    }
    for played in stage {
        let name = played.name;
        played.ends_refused(&watch).with_context(|| name)?;
    }
    watch.unharmed(64 * 1024 * 1024, 64)?;
    arena.neighbour()
}
