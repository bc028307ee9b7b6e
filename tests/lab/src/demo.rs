//! `lab demo`: shows in a few lines that the mesh works, and checks each line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::capture::Capture;
use crate::lab::Lab;
use crate::location::Location;
use crate::options::{IpFamily, Options};
use crate::tools;

const NAME: &str = "demo";
const CLIENT: &str = "shop/client";
const SERVER: &str = "shop/web";
const OUTSIDE: &str = "default/outside";
const CLIENT_ID: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SERVER_ID: &str = "spiffe://cluster.local/ns/shop/sa/web";
const HBONE_PORT: u16 = 15008;

/// The access log has a connection's line as soon as the connection is closed.
const LOG_TIMEOUT: Duration = Duration::from_secs(5);

/// Brings the demo up, shows and checks it, and takes it down unless `keep` is set.
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
    let startup = started.elapsed();
    if let Err(error) = show(&lab, startup) {
        print_daemon_logs(&lab);
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

fn show(lab: &Lab, startup: Duration) -> Result<()> {
    let status = lab.status()?;
    let (nodes, pods) = (status.nodes.len(), status.pods.len());
    println!(
        "{nodes} nodes, {pods} pods and a ztunnel per node came up in {:.1} s.",
        startup.as_secs_f64()
    );
    println!("Namespace shop is in the mesh by its label; {OUTSIDE} is not.\n");
    let bridge = lab.capture(Location::Fabric, "tcp")?;
    let meshed = request(lab, CLIENT)?;
    println!("\nClient and server identities from their certificates (access logs of both nodes)");
    check_identities(lab, CLIENT, "outbound")?;
    check_identities(lab, SERVER, "inbound")?;
    println!("\nTraffic between the nodes (tcpdump on the bridge)");
    check_encrypted(&bridge, &meshed)?;
    println!("\nThe same request from outside the mesh, for comparison");
    let plain = request(lab, OUTSIDE)?;
    check_plaintext(&bridge, &plain)?;
    print_next_steps();
    Ok(())
}

/// Sends one request whose path contains a unique marker, which the server repeats in its response.
/// Returns the marker.
fn request(lab: &Lab, from: &str) -> Result<String> {
    let random = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .context("cannot read a random number")?;
    let marker = format!("order-{}", random.split('-').next().unwrap_or_default());
    let url = format!("http://web.shop/{marker}");
    let status = lab.status()?;
    let (client, server) = (status.pod(from)?, status.pod(SERVER)?);
    println!("{from} on node {} requests {url}", client.node);
    let response = lab
        .exec(from, &["curl", "-4", "-sS", "--max-time", "5", &url])?
        .ok()
        .context("curl")?;
    println!("{SERVER} on node {}: {}", server.node, response.trim_end());
    ensure!(
        response.contains(&marker),
        "the response is not the server's: {response:?}"
    );
    let ip = client
        .ip(IpFamily::V4)
        .context("the client has no IPv4 address")?
        .to_string();
    ensure!(
        response.trim_end().ends_with(&ip),
        "the server did not see the client's address {ip}"
    );
    Ok(marker)
}

/// Prints the identities in the access log of a pod's node and checks them.
fn check_identities(lab: &Lab, pod: &str, direction: &str) -> Result<()> {
    let node = lab.status()?.pod(pod)?.node.clone();
    let line = lab.wait_until(
        &format!("the access log of node {node}"),
        LOG_TIMEOUT,
        || {
            let log = lab.daemon_log(&node).ok()?;
            log.lines()
                .find(|line| field(line, "direction") == Some(direction))
                .map(str::to_owned)
        },
    )?;
    let client = field(&line, "src.identity").unwrap_or("none");
    let server = field(&line, "dst.identity").unwrap_or("none");
    println!("  node {node}, {direction:<8}  {client} -> {server}");
    ensure!(
        (client, server) == (CLIENT_ID, SERVER_ID),
        "these are not the identities of {CLIENT} and {SERVER}"
    );
    Ok(())
}

/// The value of `name="value"` in an access-log line.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("{name}=\""))?;
    rest.split_once('"').map(|(value, _)| value)
}

fn check_encrypted(bridge: &Capture, marker: &str) -> Result<()> {
    let plaintext = bridge.occurrences(marker)? * marker.len();
    let (total, tls) = (bridge.tcp_bytes(HBONE_PORT)?, bridge.tls_bytes(HBONE_PORT)?);
    println!(
        "  {total} bytes on port {HBONE_PORT}, {} of them in TLS records, {} encrypted",
        tls.records, tls.application_data
    );
    println!("  {plaintext} bytes of {marker:?} in plaintext");
    ensure!(
        plaintext == 0,
        "the payload of a meshed connection was sent in plaintext"
    );
    ensure!(
        tls.application_data > 0,
        "nothing was encrypted: the connection did not go through the mesh"
    );
    ensure!(
        total == tls.records,
        "{} bytes on port {HBONE_PORT} are not TLS",
        total - tls.records
    );
    Ok(())
}

fn check_plaintext(bridge: &Capture, marker: &str) -> Result<()> {
    let times = bridge.occurrences(marker)?;
    let bytes = times * marker.len();
    println!(
        "  {bytes} bytes of {marker:?} in plaintext: once in the request, once in the response"
    );
    ensure!(
        times >= 2,
        "expected the marker twice, found it {times} times: the capture does not work"
    );
    Ok(())
}

fn print_next_steps() {
    let lab = program();
    println!(
        "\nNext steps, as root\n\
         \x20 {lab} up deploy/demo\n\
         \x20 {lab} exec shop/client -- curl -sv http://web\n\
         \x20 {lab} exec node/a -- curl -s localhost:15020/metrics\n\
         \x20 {lab} exec node/a -- curl -s localhost:15000/config_dump\n\
         \x20 {lab} logs a\n\
         \x20 {lab} down"
    );
}

/// The path of this program, relative to the current folder if it is below.
fn program() -> String {
    let program = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let current = std::env::current_dir().unwrap_or_default();
    let relative = program.strip_prefix(current).unwrap_or(&program);
    relative.display().to_string()
}

/// Prints the end of the daemons' logs after a failure, before the lab is removed.
fn print_daemon_logs(lab: &Lab) {
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
    fn field_is_found_by_its_full_name() {
        let line = "access complete src.identity=\"spiffe://a\" dst.identity=\"spiffe://b\" direction=\"inbound\"";
        assert_eq!(field(line, "dst.identity"), Some("spiffe://b"));
        assert_eq!(field(line, "direction"), Some("inbound"));
        assert_eq!(field(line, "reason"), None);
    }
}
