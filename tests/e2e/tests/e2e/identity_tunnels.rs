//! Tunnels and certificates over time: old tunnels are replaced, tunnels of a revoked certificate are closed, roots in a
//! folder are replaced, and clocks differ. No other connection fails.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use ambit_e2e::access_log::{self, seconds_since_midnight};
use ambit_e2e::hostile::TestCa;
use ambit_e2e::identity::{
    BackgroundLoad, NODES, PATHS, cert_status, finish_without_failures, identity, manifests,
    unix_now, up,
};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, url};
use anyhow::{Context, Result, ensure};
use lab::{Clock, IdentitySource, IpFamily, Lab, LaunchOptions, Location, Options};
use mesh::certs::Authority;

/// How long a changed file may take to have its effect.
const DEADLINE: Duration = Duration::from_secs(10);

/// The local addresses of a pod's outbound tunnels, from `/proc/net/tcp`.
fn tunnels(lab: &Lab, pod: &str) -> Result<BTreeSet<String>> {
    let text = lab
        .exec(pod, &["cat", "/proc/net/tcp", "/proc/net/tcp6"])?
        .ok()?;
    let port = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, local, remote, "01", ..] = words[..] else {
            return None;
        };
        remote.ends_with(":3AA0").then(|| local.to_owned())
    };
    Ok(text.lines().filter_map(port).collect())
}

#[test]
fn old_tunnels_are_replaced_without_a_failed_connection() -> Result<()> {
    /// How old a tunnel may be when it gets its last connection.
    const MAX_AGE: Duration = Duration::from_secs(3);
    /// How long the last short connection and the tunnel's shutdown may take.
    const SHUTDOWN: Duration = Duration::from_secs(3);
    const LOAD: Duration = Duration::from_secs(15);
    let lab = up(&["--tunnel-max-age", "3s"], Options::default())?;
    let started = Instant::now();
    let mut load = BackgroundLoad::start(&lab)?;
    // When each tunnel was first and last seen.
    let mut seen: BTreeMap<String, (Instant, Instant)> = BTreeMap::new();
    lab.wait_until("several generations of tunnels", LOAD + SHUTDOWN, || {
        for tunnel in tunnels(&lab, "shop/client-a").unwrap_or_default() {
            let now = Instant::now();
            seen.entry(tunnel).or_insert((now, now)).1 = now;
        }
        (started.elapsed() >= LOAD).then_some(())
    })?;
    load.check_streams()?;
    let ages = seen.values().map(|(first, last)| *last - *first);
    let old: Vec<Duration> = ages.filter(|age| *age > MAX_AGE + SHUTDOWN).collect();
    // Only the tunnel with the echo stream stays longer.
    ensure!(
        matches!(&old[..], [one] if *one > LOAD / 2),
        "tunnels of these ages were still open: {old:?}"
    );
    ensure!(seen.len() >= 4, "{} tunnels", seen.len());
    println!(
        "{} tunnels; {} connections",
        seen.len(),
        finish_without_failures(load)?
    );
    Ok(())
}

/// Replaces a file by a rename, so that a reader sees the old or the new content.
fn replace(file: &Path, text: &str) -> Result<()> {
    let staged = file.with_extension("staged");
    std::fs::write(&staged, text)?;
    std::fs::rename(&staged, file).context("rename")
}

#[test]
fn revoked_certificate_is_refused_and_its_tunnels_are_closed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let list = folder.path().join("crl.pem");
    // A list without entries; any authority can sign it.
    let empty = TestCa::untrusted()?.revocation_list(&[])?;
    replace(&list, &empty)?;
    let list_flag = list.to_string_lossy();
    let lab = up(&["--crl-path", &list_flag], Options::default())?;
    let mut load = BackgroundLoad::start(&lab)?;
    load.wait_progress(&lab, 10, DEADLINE)?;
    let leaf = cert_status(&lab, "a", &identity("client-a"))?.and_then(|status| status.leaf);
    let leaf = leaf.context("no certificate of client-a")?;
    let ca = TestCa::from_folder(&lab.ca_folder())?;
    replace(&list, &ca.revocation_list(&[leaf])?)?;
    let revoked = Instant::now();
    let ip = lab.pod_ip("shop/client-a", IpFamily::V4)?.to_string();
    let line = lab.wait_until("the open connection to be closed", DEADLINE, || {
        let lines = access_log::lines(&lab, "b").ok()?;
        let reason = "peer_certificate_revoked";
        lines
            .into_iter()
            .find(|line| line.line.contains(&ip) && line.field("reason") == reason)
    })?;
    println!("closed after {:?}: {}", revoked.elapsed(), line.line);
    lab.wait_until("the revoked client's stream to break", DEADLINE, || {
        load.stream_of("client-a")
            .and_then(|stream| stream.check_alive().err())
    })?;
    let to = url(lab.pod_ip("shop/web-b", IpFamily::V4)?, PORT);
    ensure!(
        curl(&lab, &Location::pod("shop/client-a"), &to, &[]).is_err(),
        "a revoked certificate was accepted"
    );
    let reason = [("reason", "peer_certificate_revoked")];
    metrics::wait(&lab, "b", "ambit_connection_failures_total", &reason, 1.0)?;
    load.stream_of("client-b")
        .context("client-b")?
        .check_alive()?;
    replace(&list, &empty)?;
    lab.wait_until("the certificate to be accepted again", DEADLINE, || {
        curl(&lab, &Location::pod("shop/client-a"), &to, &[]).ok()
    })?;
    // The other client has lost no connection.
    let finished = load.finish_except("client-a")?;
    let neighbour = finished.iter().find(|(path, _)| path.source == "client-b");
    let (_, records) = neighbour.context("client-b")?;
    ensure!(
        records.iter().all(|record| record.failure.is_none()),
        "{records:?}"
    );
    Ok(())
}

#[test]
fn root_in_a_folder_is_replaced_step_by_step_without_a_failed_connection() -> Result<()> {
    const TTL: Duration = Duration::from_secs(10);
    let lab = up(&["--cert-ttl", "10s"], Options::default())?;
    let mut load = BackgroundLoad::start(&lab)?;
    let next = tempfile::tempdir()?;
    let next = next.path().join("next");
    Authority::create(&next)?;
    let folder = lab.ca_folder();
    let read = |path: &Path| std::fs::read_to_string(path).context("read");
    let old_root = read(&folder.join("root-cert.pem"))?;
    let new_root = read(&next.join("root-cert.pem"))?;
    // Not a certificate: the last valid roots stay in use.
    replace(&folder.join("root-cert.pem"), "no certificate\n")?;
    lab.wait_until("the daemon to log the invalid root", DEADLINE, || {
        let log = lab.daemon_log("a").ok()?;
        log.contains("reloading the certificate authority failed")
            .then_some(())
    })?;
    replace(
        &folder.join("root-cert.pem"),
        &format!("{old_root}{new_root}"),
    )?;
    wait_root_count(&lab, 2)?;
    replace(&folder.join("ca-cert.pem"), &new_root)?;
    replace_private(&folder.join("ca-key.pem"), &read(&next.join("ca-key.pem"))?)?;
    let mut before: Vec<_> = serials(&lab)?;
    lab.wait_until(
        "every certificate to be signed by the new root",
        3 * TTL,
        || {
            let now = serials(&lab).ok()?;
            before.retain(|serial| now.contains(serial));
            before.is_empty().then_some(())
        },
    )?;
    load.wait_progress(&lab, 10, DEADLINE)?;
    replace(&folder.join("root-cert.pem"), &new_root)?;
    wait_root_count(&lab, 1)?;
    load.wait_progress(&lab, 20, DEADLINE)?;
    load.check_streams()?;
    println!("{} connections", finish_without_failures(load)?);
    Ok(())
}

fn replace_private(file: &Path, text: &str) -> Result<()> {
    let staged = file.with_extension("staged");
    std::fs::copy(file, &staged)?;
    std::fs::write(&staged, text)?;
    std::fs::rename(&staged, file).context("rename")
}

fn serials(lab: &Lab) -> Result<Vec<String>> {
    let pods = PATHS
        .iter()
        .flat_map(|path| [path.source, path.destination]);
    pods.map(|pod| {
        let status = cert_status(lab, &pod[pod.len() - 1..], &identity(pod))?;
        Ok(status.context("no certificate")?.serial)
    })
    .collect()
}

fn wait_root_count(lab: &Lab, count: usize) -> Result<()> {
    for (node, pod) in [("a", "client-a"), ("b", "web-b")] {
        lab.wait_until(&format!("{count} roots at {node}"), DEADLINE, || {
            let roots = ambit_e2e::identity::roots(lab, node, &identity(pod)).ok()?;
            (roots.len() == count).then_some(())
        })?;
    }
    Ok(())
}

#[test]
fn clocks_five_minutes_apart_are_tolerated() -> Result<()> {
    const OFFSET: Duration = Duration::from_secs(300);
    let (ahead, behind) = (Clock::Ahead(OFFSET), Clock::Behind(OFFSET));
    let mut options = Options {
        identity: IdentitySource::Ca,
        daemon_args: vec!["--cert-ttl".to_owned(), "1h".to_owned()],
        ..Options::default()
    };
    options
        .node_launch
        .insert("a".to_owned(), LaunchOptions::default().clock(ahead));
    let lab = Lab::up(manifests(), options)?;
    check_all_paths(&lab).context("a daemon's clock is ahead")?;
    ensure!(
        has_clock_offset(&lab.daemon_log("a")?, 300.0),
        "the clock of node a has no offset"
    );
    lab.restart_daemon_with("a", LaunchOptions::default().clock(behind))?;
    check_all_paths(&lab).context("a daemon's clock is behind")?;
    ensure!(
        has_clock_offset(&lab.daemon_log("a")?, -300.0),
        "the clock of node a has no offset"
    );
    for (clock, what, by) in [(ahead, "ahead", 300.0), (behind, "behind", -300.0)] {
        lab.restart_ca_with(LaunchOptions::default().clock(clock))?;
        for node in NODES {
            lab.restart_daemon_with(node, LaunchOptions::default())?;
        }
        check_all_paths(&lab).with_context(|| format!("the authority's clock is {what}"))?;
        ensure!(
            has_clock_offset(&lab.ca_log()?, by),
            "the authority's clock has no offset"
        );
    }
    Ok(())
}

/// Whether the last line of a log, just written, has a time that is wrong by this many seconds.
fn has_clock_offset(log: &str, seconds: f64) -> bool {
    const TOLERANCE: f64 = 60.0;
    const DAY: f64 = 86_400.0;
    let shown = log.lines().rev().find_map(seconds_since_midnight);
    shown.is_some_and(|shown| {
        let distance = (shown - seconds - unix_now()).rem_euclid(DAY);
        distance.min(DAY - distance) < TOLERANCE
    })
}

/// Checks that every path works with new certificates and handshakes.
fn check_all_paths(lab: &Lab) -> Result<()> {
    lab.wait_ready()?;
    for path in PATHS {
        let to = url(
            lab.pod_ip(&format!("shop/{}", path.destination), IpFamily::V4)?,
            PORT,
        );
        let from = Location::pod(&format!("shop/{}", path.source));
        let response = curl(lab, &from, &to, &[]).with_context(|| format!("{path:?}"))?;
        ensure!(
            response.body == path.destination,
            "{path:?}: {}",
            response.body
        );
    }
    for node in NODES {
        let scrape = metrics::scrape(lab, node)?;
        let failures = metrics::sum(&scrape, "ambit_certificate_failures_total", &[]);
        ensure!(
            failures < 0.5,
            "{failures} certificate requests failed on {node}"
        );
    }
    Ok(())
}
