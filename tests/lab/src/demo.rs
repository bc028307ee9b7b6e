//! `lab demo`: the mesh at work, in a few lines, each of them checked.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::capture::{Capture, Location};
use crate::lab::Lab;
use crate::options::{IpFamily, Options};
use crate::tools;

const NAME: &str = "demo";
const CLIENT: &str = "shop/client";
const SERVER: &str = "shop/web";
const OUTSIDE: &str = "default/outside";
const CLIENT_ID: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVER_ID: &str = "spiffe://cluster.local/ns/shop/sa/web";
const HBONE_PORT: u16 = 15008;

/// A connection's line is in the access log as soon as the connection has ended.
const LOG_DEADLINE: Duration = Duration::from_secs(5);

/// Brings the demo up, shows and checks it, and takes it down again unless it is to be kept.
pub(crate) fn run(name: Option<&str>, manifests: PathBuf, keep: bool) -> Result<ExitCode> {
    for (tool, package) in [("nginx", "nginx"), ("curl", "curl"), ("tcpdump", "tcpdump")] {
        tools::require(tool, package)?;
    }
    let started = Instant::now();
    let options = Options {
        name: Some(name.unwrap_or(NAME).to_owned()),
        ..Options::default()
    };
    let lab = Lab::up(manifests, options)?;
    let took = started.elapsed();
    if let Err(error) = show(&lab, took) {
        explain(&lab);
        return Err(error.context("the demo failed"));
    }
    if keep {
        println!(
            "\nThe lab stays up; `{} down --name {}` removes it.",
            program(),
            lab.name()
        );
        lab.keep()?;
    } else {
        lab.down()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(lab: &Lab, took: Duration) -> Result<()> {
    let status = lab.status()?;
    let (nodes, pods) = (status.nodes.len(), status.pods.len());
    println!(
        "{nodes} nodes, {pods} pods and a ztunnel per node came up in {:.1} s.",
        took.as_secs_f64()
    );
    println!("Namespace shop is in the mesh by its label; {OUTSIDE} is not.\n");
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    let meshed = request(lab, CLIENT)?;
    println!("\nWho spoke to whom, by their certificates (access logs of both nodes)");
    identities(lab, CLIENT, "outbound")?;
    identities(lab, SERVER, "inbound")?;
    println!("\nWhat crossed the wire between the nodes (tcpdump on the bridge)");
    encrypted(&bridge, &meshed)?;
    println!("\nThe same from outside the mesh, for comparison");
    let plain = request(lab, OUTSIDE)?;
    in_clear(&bridge, &plain)?;
    next_steps();
    Ok(())
}

/// What was sent, and how often it occurs in request and answer.
struct Payload {
    marker: String,
}

/// One request with a path that nothing else contains; the server repeats it in its answer.
fn request(lab: &Lab, from: &str) -> Result<Payload> {
    let random = std::fs::read_to_string("/proc/sys/kernel/random/uuid").context("randomness")?;
    let marker = format!("order-{}", random.split('-').next().unwrap_or_default());
    let url = format!("http://web.shop/{marker}");
    let status = lab.status()?;
    let (client, server) = (status.pod(from)?, status.pod(SERVER)?);
    println!("{from} on node {} asks {url}", client.node);
    let answer = lab
        .exec(from, &["curl", "-4", "-sS", "--max-time", "5", &url])?
        .ok()
        .context("curl")?;
    println!("{SERVER} on node {}: {}", server.node, answer.trim_end());
    ensure!(
        answer.contains(&marker),
        "the answer is not the server's: {answer:?}"
    );
    let ip = client
        .ip(IpFamily::V4)
        .context("the client has no IPv4 address")?
        .to_string();
    ensure!(
        answer.trim_end().ends_with(&ip),
        "the server saw another address than the client's {ip}"
    );
    Ok(Payload { marker })
}

/// The identities in the access log of a pod's node, which must be the right ones.
fn identities(lab: &Lab, pod: &str, direction: &str) -> Result<()> {
    let node = lab.status()?.pod(pod)?.node.clone();
    let line = lab.wait_until(
        &format!("the access log of node {node}"),
        LOG_DEADLINE,
        || {
            let log = lab.daemon_log(&node).ok()?;
            log.lines()
                .find(|line| field(line, "direction") == Some(direction))
                .map(str::to_owned)
        },
    )?;
    let client = field(&line, "src.identity").unwrap_or("nobody");
    let server = field(&line, "dst.identity").unwrap_or("nobody");
    println!("  node {node}, {direction:<8}  {client} -> {server}");
    ensure!(
        (client, server) == (CLIENT_ID, SERVER_ID),
        "not the identities of {CLIENT} and {SERVER}"
    );
    Ok(())
}

/// The value of `name="value"` in an access-log line.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

fn encrypted(bridge: &Capture, payload: &Payload) -> Result<()> {
    let clear = bridge.occurrences(&payload.marker)? * payload.marker.len();
    let (total, (tls, data)) = (bridge.tcp_bytes(HBONE_PORT)?, bridge.tls_bytes(HBONE_PORT)?);
    println!(
        "  {total} bytes on port {HBONE_PORT}, {tls} of them in TLS records, {data} encrypted"
    );
    println!("  {clear} bytes of {:?} in clear", payload.marker);
    if clear > 0 {
        bail!("the payload of a meshed connection crossed the wire in clear");
    }
    ensure!(
        data > 0,
        "nothing was encrypted: the connection did not go through the mesh"
    );
    ensure!(
        total == tls,
        "{} bytes on port {HBONE_PORT} are not TLS",
        total - tls
    );
    Ok(())
}

fn in_clear(bridge: &Capture, payload: &Payload) -> Result<()> {
    let times = bridge.occurrences(&payload.marker)?;
    let bytes = times * payload.marker.len();
    println!(
        "  {bytes} bytes of {:?} in clear: once in the request, once in the answer",
        payload.marker
    );
    ensure!(
        times >= 2,
        "expected twice, seen {times} times: the detector does not work"
    );
    Ok(())
}

fn next_steps() {
    let lab = program();
    println!(
        "\nWhere to look next, as root\n\
         \x20 {lab} up deploy/demo\n\
         \x20 {lab} exec shop/client -- curl -sv http://web\n\
         \x20 {lab} exec node/a -- curl -s localhost:15020/metrics\n\
         \x20 {lab} exec node/a -- curl -s localhost:15000/config_dump\n\
         \x20 {lab} logs a\n\
         \x20 {lab} down"
    );
}

/// This program as one would type it here.
fn program() -> String {
    let program = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let here = std::env::current_dir().unwrap_or_default();
    let short = program.strip_prefix(here).unwrap_or(&program);
    short.display().to_string()
}

/// What the daemons have to say about a failure, before they are gone.
fn explain(lab: &Lab) {
    let Ok(status) = lab.status() else { return };
    for node in status.nodes {
        let log = lab.daemon_log(&node.name).unwrap_or_default();
        let tail = log.lines().count().saturating_sub(20);
        eprintln!("\nnode {}, the last lines of its ztunnel:", node.name);
        log.lines()
            .skip(tail)
            .for_each(|line| eprintln!("  {line}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let line = "access complete src.identity=\"spiffe://a\" dst.identity=\"spiffe://b\" direction=\"inbound\"";
        assert_eq!(field(line, "dst.identity"), Some("spiffe://b"));
        assert_eq!(field(line, "direction"), Some("inbound"));
        assert_eq!(field(line, "reason"), None);
    }
}
