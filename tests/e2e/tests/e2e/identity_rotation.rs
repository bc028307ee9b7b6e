//! Certificates of 20 seconds under load, for three minutes, with an authority that is dead for 45
//! seconds of them and then gets a new root.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use ambit_e2e::hostile::{Answer, Authority, Hello, Origin, Tunnel, WINDOW, inside};
use ambit_e2e::identity::{
    NODES, PATHS, Timeline, Traffic, appear_nowhere, held, identity, judge, now, roots, up,
};
use ambit_e2e::metrics;
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{IdentitySource, IpFamily, Lab, Location, Options};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

const LOAD: Duration = Duration::from_secs(180);
const OUTAGE: Duration = Duration::from_secs(45);

/// A certificate's life.
const TTL: Duration = Duration::from_secs(20);

/// From the authority's return to certificates and connections that are good again: an identity that
/// is waited for is asked for about once a second. This leaves room for a busy machine.
const RECOVERY: Duration = Duration::from_secs(15);

/// The new root is handed out for one life of a certificate before it signs, and the old one for one
/// more; a daemon looks again at half of a life.
const ROOTS_REPLACED: Duration = Duration::from_secs(75);

#[test]
fn certificates_rotate_under_load_while_their_authority_dies_and_gets_a_new_root() -> Result<()> {
    let options = Options {
        identity: IdentitySource::Ca,
        ..Options::default()
    };
    let lab = up(&["--cert-ttl", "20s"], options)?;
    let begun = Instant::now();
    let mut traffic = Traffic::start(&lab)?;
    let timeline = std::thread::scope(|scope| -> Result<_> {
        let recording = Timeline::record(scope, &lab, &NODES);
        renewed(&lab, 2, 2 * TTL)?;
        traffic.streams_go_on()?;
        outage(&lab, &traffic)?;
        traffic.streams_go_on()?;
        another_root(&lab)?;
        traffic.streams_go_on()?;
        let left = LOAD.saturating_sub(begun.elapsed());
        lab.wait_until("the end of the load", left + TTL, || {
            (begun.elapsed() >= LOAD).then_some(())
        })?;
        Ok(recording.end())
    })?;
    appear_nowhere(&lab)?;
    for pod in pods() {
        let (seen, gaps) = (
            timeline.certificates(&identity(pod)),
            timeline.gaps(&identity(pod)),
        );
        println!("{pod}: {seen} certificates, none valid in {gaps:?}");
        ensure!(
            gaps.len() <= 1,
            "{pod} was without a certificate more than once: {gaps:?}"
        );
        let least = (LOAD - OUTAGE).as_secs() / TTL.as_secs();
        ensure!(seen as u64 >= least, "{pod} had {seen} certificates only");
    }
    let failed = judge(&lab, traffic, &timeline)?;
    println!("{failed} connections had no certificate to use");
    Ok(())
}

fn pods() -> BTreeSet<&'static str> {
    PATHS
        .iter()
        .flat_map(|path| [path.source, path.destination])
        .collect()
}

/// The node on which a pod of this suite runs.
fn node(pod: &str) -> &str {
    &pod[pod.len() - 1..]
}

fn serial(lab: &Lab, pod: &str) -> Option<String> {
    let held = held(lab, node(pod), &identity(pod)).ok()??;
    Some(held.serial).filter(|serial| !serial.is_empty())
}

/// Waits until every identity has another certificate, so many times.
fn renewed(lab: &Lab, times: usize, within: Duration) -> Result<()> {
    for _ in 0..times {
        for pod in pods() {
            let before = serial(lab, pod);
            lab.wait_until(&format!("the next certificate of {pod}"), within, || {
                serial(lab, pod).filter(|now| Some(now) != before.as_ref())
            })?;
        }
    }
    Ok(())
}

fn expiry(lab: &Lab, pod: &str) -> Option<f64> {
    let scrape = metrics::scrape(lab, node(pod)).ok()?;
    let wanted = identity(pod);
    let labels = [("identity", wanted.as_str())];
    let name = "ambit_certificate_expiry_timestamp_seconds";
    let found = scrape.iter().find(|sample| sample.is(name, &labels))?;
    Some(found.value)
}

/// The authority is killed and comes back: certificates that it gave last until they expire, and
/// connections are well soon after its return.
fn outage(lab: &Lab, traffic: &Traffic) -> Result<()> {
    lab.kill_ca()?;
    let dead = Instant::now();
    traffic
        .flows(lab, 10, RECOVERY)
        .context("right after the authority's death")?;
    for node in NODES {
        let labels = [("reason", "ca_unreachable")];
        let name = "ambit_certificate_failures_total";
        lab.wait_until("the failures to be counted", TTL, || {
            let scrape = metrics::scrape(lab, node).ok()?;
            (metrics::sum(&scrape, name, &labels) >= 1.0).then_some(())
        })?;
    }
    lab.wait_until("every certificate to expire", TTL + RECOVERY, || {
        pods()
            .iter()
            .all(|pod| expiry(lab, pod).is_none_or(|at| at < now()))
            .then_some(())
    })?;
    println!(
        "no certificate is valid {:?} after the authority's death",
        dead.elapsed()
    );
    // A connection waits a while for a certificate before it fails.
    for node in NODES {
        let labels = [("reason", "certificate_expired")];
        let name = "ambit_connection_failures_total";
        lab.wait_until("connections to fail with their reason", TTL, || {
            let scrape = metrics::scrape(lab, node).ok()?;
            (metrics::sum(&scrape, name, &labels) >= 1.0).then_some(())
        })?;
    }
    lab.wait_until("the outage to be long enough", OUTAGE, || {
        (dead.elapsed() >= OUTAGE).then_some(())
    })?;
    lab.start_ca()?;
    let back = Instant::now();
    lab.wait_until("every certificate to be renewed", RECOVERY, || {
        pods()
            .iter()
            .all(|pod| expiry(lab, pod).is_some_and(|at| at > now()))
            .then_some(())
    })?;
    println!(
        "every certificate is good {:?} after the authority's return",
        back.elapsed()
    );
    traffic
        .flows(lab, 10, RECOVERY)
        .context("after the authority's return")
}

/// The authority's root is replaced: every leaf is of the new one in the end, the old one is
/// forgotten, and what its key signs is refused.
fn another_root(lab: &Lab) -> Result<()> {
    let old = tempfile::tempdir()?;
    for file in ["root-cert.pem", "ca-key.pem"] {
        std::fs::copy(lab.ca_folder().join(file), old.path().join(file))?;
    }
    ensure!(
        accepted(lab, old.path())?,
        "a leaf of the root in force was refused"
    );
    lab.replace_ca_root()?;
    let replaced = Instant::now();
    let root = |folder: &Path| CertificateDer::from_pem_file(folder.join("root-cert.pem"));
    let (old_root, new_root) = (root(old.path())?, root(&lab.ca_folder())?);
    let both = BTreeSet::from([old_root.to_vec(), new_root.to_vec()]);
    let shown = |pod: &str| roots(lab, node(pod), &identity(pod)).unwrap_or_default();
    for (what, wanted) in [
        ("both roots", both),
        ("the new root alone", BTreeSet::from([new_root.to_vec()])),
    ] {
        for pod in pods() {
            lab.wait_until(&format!("{what} at {pod}"), ROOTS_REPLACED, || {
                (shown(pod) == wanted).then_some(())
            })?;
        }
        println!(
            "{what} everywhere {:?} after the replacement",
            replaced.elapsed()
        );
    }
    for pod in pods() {
        let leaf = held(lab, node(pod), &identity(pod))?.and_then(|held| held.leaf);
        let leaf = leaf.with_context(|| format!("no certificate of {pod}"))?;
        ensure!(
            signed_by(&leaf, &new_root)?,
            "{pod} shows a leaf of the old root"
        );
    }
    ensure!(
        !accepted(lab, old.path())?,
        "a leaf of the old root was accepted"
    );
    ensure!(
        accepted(lab, &lab.ca_folder())?,
        "a leaf of the new root was refused"
    );
    let labels = [("reason", "peer_untrusted")];
    metrics::wait(lab, "b", "ambit_connection_failures_total", &labels, 1.0).map(drop)
}

/// Whether a leaf that the authority in this folder signs now is let in.
fn accepted(lab: &Lab, folder: &Path) -> Result<bool> {
    let leaf = Authority::of(folder)?.leaf(&[&identity("client-a")])?;
    let origin = Origin {
        netns: lab.netns(&Location::pod("wild/stranger"))?,
        marked: true,
    };
    let ip = lab.pod_ip("shop/web-b", IpFamily::V4)?;
    inside(&origin, Duration::from_secs(10), async |origin| {
        let hello = Hello::of(&leaf);
        let Ok(mut tunnel) = Tunnel::open(&hello, origin, (ip, 15008).into(), WINDOW).await else {
            return Ok(false);
        };
        let answer = tunnel.connect(&format!("{ip}:{PORT}")).await?;
        Ok(answer == Answer::Status(200))
    })
}

/// Checked by openssl, which is none of ours.
fn signed_by(leaf: &CertificateDer<'_>, root: &CertificateDer<'_>) -> Result<bool> {
    let folder = tempfile::tempdir()?;
    let (leaf_file, root_file) = (folder.path().join("leaf"), folder.path().join("root"));
    for (der, pem) in [(leaf, &leaf_file), (root, &root_file)] {
        let plain = folder.path().join("der");
        std::fs::write(&plain, der)?;
        let done = std::process::Command::new("openssl")
            .args(["x509", "-inform", "DER", "-in"])
            .arg(plain)
            .arg("-out")
            .arg(pem)
            .status()?;
        ensure!(done.success(), "openssl x509");
    }
    let verified = std::process::Command::new("openssl")
        .args(["verify", "-CAfile"])
        .args([root_file, leaf_file])
        .output()?;
    Ok(verified.status.success())
}
