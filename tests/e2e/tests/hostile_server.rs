//! What a mesh daemon does when somebody else listens where a pod of the mesh should be.

use std::net::IpAddr;
use std::time::Duration;

use ambit_e2e::hostile::{
    Act, Arena, Authority, Impostor, Kind, MEMBER, Watch, frame, no_settings, status,
};
use ambit_e2e::input::Foreign;
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::Where;

/// A pod of the mesh as far as the objects say, at an address where an impostor listens.
fn at(ip: IpAddr, name: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{namespace: shop, name: {name}, uid: {name}-1}}, \
         spec: {{nodeName: b, serviceAccountName: {name}, containers: [{{name: main}}]}}, status: \
         {{phase: Running, podIPs: [{{ip: {ip}}}], conditions: [{{type: Ready, status: 'True'}}]}}}}"
    )
}

#[test]
fn a_server_that_is_not_the_pod_it_should_be_gets_not_one_byte() -> Result<()> {
    let mut arena = Arena::up()?;
    let marker = "marker-496d706f73746f72";
    let own = |name: &str| {
        arena
            .authority
            .leaf(&[&format!("spiffe://cluster.local/ns/shop/sa/{name}")])
    };
    let unauthorized = status(b"\x08\x03401", true);
    let bad_frame = frame(Kind::Data, 0, 0, b"x");
    let tunnel = |leaf, then| Act::Tunnel(leaf, no_settings(), then);
    let acts = [
        ("silent", "tls_handshake_timeout", Act::Silence),
        (
            "plain",
            "peer_not_hbone",
            Act::Say(b"HTTP/1.1 200 OK\r\n\r\n"),
        ),
        (
            "foreign",
            "peer_untrusted",
            tunnel(Authority::foreign()?.leaf(&[MEMBER])?, vec![]),
        ),
        (
            "nameless",
            "peer_untrusted",
            tunnel(arena.authority.leaf(&[])?, vec![]),
        ),
        (
            "stolen",
            "peer_identity_mismatch",
            tunnel(own("web")?, status(&[0x88], false)),
        ),
        (
            "mute",
            "h2_handshake_timeout",
            Act::Tunnel(own("mute")?, vec![], vec![]),
        ),
        (
            "pending",
            "connect_response_timeout",
            tunnel(own("pending")?, vec![]),
        ),
        (
            "refusing",
            "connect_rejected",
            tunnel(own("refusing")?, unauthorized),
        ),
        (
            "broken",
            "h2_protocol_error",
            tunnel(own("broken")?, bad_frame),
        ),
    ];
    let fabric = arena.lab.netns(&Where::Bridge)?;
    let (mut stage, mut requests) = (Vec::new(), Vec::new());
    let watch = Watch::start(&arena.lab, "a")?;
    for (index, (name, reason, act)) in (201..).zip(acts) {
        let ip: IpAddr = [10, 0, 0, index].into();
        let address = format!("{ip}/32");
        let within = Duration::from_secs(5);
        arena
            .lab
            .exec_within(
                &Where::Bridge,
                &["ip", "address", "add", &address, "dev", "br0"],
                within,
            )?
            .ok()?;
        let impostor = Impostor::start(fabric.clone(), ip, act)?;
        let pod = Foreign::write(&arena.lab, &format!("impostor-{name}.yaml"), at(ip, name))?;
        stage.push((name, reason, impostor, pod));
        arena
            .lab
            .wait_until("the daemon to know the pod", within, || {
                let dump = arena.lab.config_dump("a").ok()?;
                dump.get("workloads")?
                    .as_array()?
                    .iter()
                    .find(|w| w["name"] == name)
                    .map(drop)
            })?;
        let (header, url) = (
            format!("X-Marker: {marker}"),
            format!("http://{ip}:{PORT}/"),
        );
        requests.push(arena.lab.spawn(
            "neighbour",
            &["curl", "-sS", "-m", "25", "-H", &header, &url],
        )?);
    }
    for ((name, reason, impostor, _), request) in stage.iter().zip(requests) {
        let output = request
            .wait(Duration::from_secs(30))
            .with_context(|| (*name).to_owned())?;
        ensure!(!output.success(), "{name} has answered: {}", output.stdout);
        ensure!(
            !output.stderr.contains("timed out"),
            "{name}: not ended by the daemon"
        );
        let line = watch
            .explained(reason)
            .with_context(|| (*name).to_owned())?;
        ensure!(line.field("direction") == "outbound", "{}", line.line);
        let heard = impostor.heard();
        let proven = ["pending", "refusing", "broken"].contains(name);
        let told = heard
            .windows(marker.len())
            .any(|window| window == marker.as_bytes());
        ensure!(proven || !told, "{name} was told the payload");
    }
    watch.unharmed(64 * 1024 * 1024, 64)?;
    arena.neighbour()
}
