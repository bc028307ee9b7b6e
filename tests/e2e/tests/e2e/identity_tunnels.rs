//! Tunnels and certificates: those that are old are replaced, those of a revoked certificate are
//! closed, roots in a folder are replaced, and clocks may be apart. Traffic notices what it must.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use ambit_e2e::access_log::{self, since_midnight};
use ambit_e2e::hostile::Authority as Signer;
use ambit_e2e::identity::{NODES, PATHS, Traffic, held, identity, manifests, now, unharmed, up};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, url};
use anyhow::{Context, Result, ensure};
use lab::{Clock, IdentitySource, IpFamily, Lab, LaunchOptions, Location, Options};
use mesh::certs::Authority;

/// What follows a file, or a change of one, does so within a few seconds.
const SOON: Duration = Duration::from_secs(10);

/// A pod's tunnels to others, as proc(5) lists them: its own end of each.
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
fn tunnels_that_are_old_are_replaced_and_no_connection_notices() -> Result<()> {
    /// The greatest age of a tunnel, less a little by chance.
    const AGE: Duration = Duration::from_secs(3);
    /// For the last short connection in it, and its own end.
    const END: Duration = Duration::from_secs(3);
    const LOAD: Duration = Duration::from_secs(15);
    let lab = up(&["--tunnel-max-age", "3s"], Options::default())?;
    let begun = Instant::now();
    let mut traffic = Traffic::start(&lab)?;
    // When each was seen first and last.
    let mut seen: BTreeMap<String, (Instant, Instant)> = BTreeMap::new();
    lab.wait_until("some ages of tunnels", LOAD + END, || {
        for tunnel in tunnels(&lab, "shop/client-a").unwrap_or_default() {
            let now = Instant::now();
            seen.entry(tunnel).or_insert((now, now)).1 = now;
        }
        (begun.elapsed() >= LOAD).then_some(())
    })?;
    traffic.streams_go_on()?;
    let lives = seen.values().map(|(first, last)| *last - *first);
    let old: Vec<Duration> = lives.filter(|life| *life > AGE + END).collect();
    // Only the tunnel with the long transfer is as old as that.
    ensure!(
        matches!(&old[..], [one] if *one > LOAD / 2),
        "tunnels of {old:?}"
    );
    ensure!(seen.len() >= 4, "{} tunnels", seen.len());
    println!(
        "{} tunnels in turn; {} connections",
        seen.len(),
        unharmed(traffic)?
    );
    Ok(())
}

/// Written beside and renamed: a reader sees the old file or the new one.
fn replace(file: &Path, text: &str) -> Result<()> {
    let staged = file.with_extension("staged");
    std::fs::write(&staged, text)?;
    std::fs::rename(&staged, file).context("rename")
}

#[test]
fn a_revoked_certificate_opens_nothing_and_its_tunnels_are_closed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let list = folder.path().join("crl.pem");
    // Nothing is revoked yet, and a list that revokes nothing takes an authority to be made.
    let nobody = Signer::foreign()?.revocation_list(&[])?;
    replace(&list, &nobody)?;
    let list_flag = list.to_string_lossy();
    let lab = up(&["--crl-path", &list_flag], Options::default())?;
    let mut traffic = Traffic::start(&lab)?;
    traffic.flows(&lab, 10, SOON)?;
    let leaf = held(&lab, "a", &identity("client-a"))?.and_then(|held| held.leaf);
    let leaf = leaf.context("no certificate of client-a")?;
    let signer = Signer::of(&lab.ca_folder())?;
    replace(&list, &signer.revocation_list(&[leaf])?)?;
    let revoked = Instant::now();
    let ip = lab.pod_ip("shop/client-a", IpFamily::V4)?.to_string();
    let line = lab.wait_until("the open connection to be closed", SOON, || {
        let lines = access_log::lines(&lab, "b").ok()?;
        let why = "peer_certificate_revoked";
        lines
            .into_iter()
            .find(|line| line.line.contains(&ip) && line.field("reason") == why)
    })?;
    println!("closed after {:?}: {}", revoked.elapsed(), line.line);
    lab.wait_until(
        "the long transfer of the revoked one to break",
        SOON,
        || {
            traffic
                .stream_of("client-a")
                .and_then(|stream| stream.going_on().err())
        },
    )?;
    let to = url(lab.pod_ip("shop/web-b", IpFamily::V4)?, PORT);
    ensure!(
        curl(&lab, &Location::pod("shop/client-a"), &to, &[]).is_err(),
        "a revoked certificate was let in"
    );
    let reason = [("reason", "peer_certificate_revoked")];
    metrics::wait(&lab, "b", "ambit_connection_failures_total", &reason, 1.0)?;
    traffic
        .stream_of("client-b")
        .context("client-b")?
        .going_on()?;
    replace(&list, &nobody)?;
    lab.wait_until("it to be let in again", SOON, || {
        curl(&lab, &Location::pod("shop/client-a"), &to, &[]).ok()
    })?;
    // The neighbours have noticed nothing of all that.
    let broken = traffic.end_with_broken("client-a")?;
    let neighbour = broken.iter().find(|(path, _)| path.source == "client-b");
    let (_, attempts) = neighbour.context("client-b")?;
    ensure!(
        attempts.iter().all(|one| one.failure.is_none()),
        "{attempts:?}"
    );
    Ok(())
}

#[test]
fn the_root_in_a_folder_is_replaced_step_by_step_without_a_failure() -> Result<()> {
    const TTL: Duration = Duration::from_secs(20);
    let lab = up(&["--cert-ttl", "20s"], Options::default())?;
    let mut traffic = Traffic::start(&lab)?;
    let next = tempfile::tempdir()?;
    let next = next.path().join("next");
    Authority::create(&next)?;
    let folder = lab.ca_folder();
    let read = |path: &Path| std::fs::read_to_string(path).context("read");
    let old_root = read(&folder.join("root-cert.pem"))?;
    let new_root = read(&next.join("root-cert.pem"))?;
    // Not a root at all: what was good stays in force.
    replace(&folder.join("root-cert.pem"), "no certificate\n")?;
    lab.wait_until("the daemon to say so", SOON, || {
        let log = lab.daemon_log("a").ok()?;
        log.contains("the last good one stays").then_some(())
    })?;
    replace(
        &folder.join("root-cert.pem"),
        &format!("{old_root}{new_root}"),
    )?;
    roots_are(&lab, 2)?;
    replace(&folder.join("ca-cert.pem"), &new_root)?;
    replace_private(&folder.join("ca-key.pem"), &read(&next.join("ca-key.pem"))?)?;
    let mut before: Vec<_> = serials(&lab)?;
    lab.wait_until("every certificate to be of the new root", 3 * TTL, || {
        let now = serials(&lab).ok()?;
        before.retain(|serial| now.contains(serial));
        before.is_empty().then_some(())
    })?;
    traffic.flows(&lab, 10, SOON)?;
    replace(&folder.join("root-cert.pem"), &new_root)?;
    roots_are(&lab, 1)?;
    traffic.flows(&lab, 20, SOON)?;
    traffic.streams_go_on()?;
    println!("{} connections", unharmed(traffic)?);
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
        let held = held(lab, &pod[pod.len() - 1..], &identity(pod))?;
        Ok(held.context("no certificate")?.serial)
    })
    .collect()
}

fn roots_are(lab: &Lab, count: usize) -> Result<()> {
    for (node, pod) in [("a", "client-a"), ("b", "web-b")] {
        lab.wait_until(&format!("{count} roots at {node}"), SOON, || {
            let roots = ambit_e2e::identity::roots(lab, node, &identity(pod)).ok()?;
            (roots.len() == count).then_some(())
        })?;
    }
    Ok(())
}

#[test]
fn clocks_may_be_five_minutes_apart() -> Result<()> {
    const APART: Duration = Duration::from_secs(300);
    let (ahead, behind) = (Clock::Ahead(APART), Clock::Behind(APART));
    let mut options = Options {
        identity: IdentitySource::Ca,
        daemon_args: vec!["--cert-ttl".to_owned(), "1h".to_owned()],
        ..Options::default()
    };
    options
        .node_launch
        .insert("a".to_owned(), LaunchOptions::default().clock(ahead));
    let lab = Lab::up(manifests(), options)?;
    all_reach_all(&lab).context("a daemon's clock is ahead")?;
    ensure!(
        goes_wrong_by(&lab.daemon_log("a")?, 300.0),
        "the clock of a is right"
    );
    lab.restart_daemon_with("a", LaunchOptions::default().clock(behind))?;
    all_reach_all(&lab).context("a daemon's clock is behind")?;
    ensure!(
        goes_wrong_by(&lab.daemon_log("a")?, -300.0),
        "the clock of a is right"
    );
    for (clock, what, by) in [(ahead, "ahead", 300.0), (behind, "behind", -300.0)] {
        lab.restart_ca_with(LaunchOptions::default().clock(clock))?;
        for node in NODES {
            lab.restart_daemon_with(node, LaunchOptions::default())?;
        }
        all_reach_all(&lab).with_context(|| format!("the authority's clock is {what}"))?;
        ensure!(
            goes_wrong_by(&lab.ca_log()?, by),
            "the authority's clock is right"
        );
    }
    Ok(())
}

/// Whether a log that was just written to was written by a clock that is wrong by so many seconds.
fn goes_wrong_by(log: &str, seconds: f64) -> bool {
    const JUST: f64 = 60.0;
    const DAY: f64 = 86_400.0;
    let shown = log.lines().rev().find_map(since_midnight);
    shown.is_some_and(|shown| {
        let apart = (shown - seconds - now()).rem_euclid(DAY);
        apart.min(DAY - apart) < JUST
    })
}

/// With certificates of now, and handshakes of now.
fn all_reach_all(lab: &Lab) -> Result<()> {
    lab.wait_ready()?;
    for path in PATHS {
        let to = url(
            lab.pod_ip(&format!("shop/{}", path.destination), IpFamily::V4)?,
            PORT,
        );
        let from = Location::pod(&format!("shop/{}", path.source));
        let answer = curl(lab, &from, &to, &[]).with_context(|| format!("{path:?}"))?;
        ensure!(answer.body == path.destination, "{path:?}: {}", answer.body);
    }
    for node in NODES {
        let scrape = metrics::scrape(lab, node)?;
        let failures = metrics::sum(&scrape, "ambit_certificate_failures_total", &[]);
        ensure!(
            failures < 0.5,
            "{failures} certificates were refused on {node}"
        );
    }
    Ok(())
}
