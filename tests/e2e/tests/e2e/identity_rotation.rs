//! Certificates of ten seconds under load, with an outage of their authority and a replacement of its root: connections
//! fail only while no certificate is valid.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use ambit_e2e::hostile::{
    ConnectResult, Netns, STREAM_WINDOW_BYTES, TestCa, TlsClient, Tunnel, run_in_netns,
};
use ambit_e2e::identity::{
    BackgroundLoad, CertTimeline, NODES, PATHS, cert_status, check_no_secrets_exposed,
    finish_and_check_failures, identity, roots, unix_now, up,
};
use ambit_e2e::metrics;
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{IdentitySource, IpFamily, Lab, Location, Options};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// The validity of every certificate: the least that daemon and authority allow.
const TTL: Duration = Duration::from_secs(10);

/// From the authority's restart until every certificate and connection is valid again. A daemon retries about once a
/// second for an identity that connections wait for; the rest is for a busy machine.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(15);

/// How long a connection may take to fail for want of a certificate: it waits 10 s for one.
const FAILURE_DEADLINE: Duration = Duration::from_secs(25);

/// The authority publishes a new root for one certificate lifetime before it signs with it, and the old root for one
/// more. A daemon sees each change at its next renewal, half a lifetime later.
const ROOT_REPLACEMENT_DEADLINE: Duration = Duration::from_secs(45);

#[test]
fn certificates_rotate_under_load_through_ca_outage_and_root_replacement() -> Result<()> {
    let options = Options {
        identity: IdentitySource::Ca,
        ..Options::default()
    };
    let lab = up(&["--cert-ttl", "10s"], options)?;
    let started = Instant::now();
    let mut load = BackgroundLoad::start(&lab)?;
    let (timeline, outage) = std::thread::scope(|scope| -> Result<_> {
        let recorder = CertTimeline::record(scope, &lab, &NODES);
        wait_renewed(&lab)?;
        wait_renewed(&lab)?;
        load.check_streams()?;
        let outage = ca_outage(&lab, &load)?;
        load.check_streams()?;
        replace_root(&lab)?;
        load.check_streams()?;
        Ok((recorder.stop(), outage))
    })?;
    check_no_secrets_exposed(&lab)?;
    let min_count = (started.elapsed() - outage).as_secs() / TTL.as_secs();
    for pod in pods() {
        let count = timeline.certificate_count(&identity(pod));
        let gaps = timeline.gaps(&identity(pod));
        println!("{pod}: {count} certificates, none valid in {gaps:?}");
        ensure!(
            gaps.len() <= 1,
            "{pod} had no valid certificate more than once: {gaps:?}"
        );
        ensure!(
            count as u64 >= min_count,
            "{pod} had {count} certificates, expected at least {min_count}"
        );
    }
    let failed = finish_and_check_failures(&lab, load, &timeline)?;
    println!("{failed} connections failed without a valid certificate");
    Ok(())
}

fn pods() -> BTreeSet<&'static str> {
    PATHS
        .iter()
        .flat_map(|path| [path.source, path.destination])
        .collect()
}

/// The node of a pod, the last letter of its name.
fn node(pod: &str) -> &str {
    &pod[pod.len() - 1..]
}

fn serial(lab: &Lab, pod: &str) -> Option<String> {
    let status = cert_status(lab, node(pod), &identity(pod)).ok()??;
    Some(status.serial).filter(|serial| !serial.is_empty())
}

/// Waits until every identity has a new certificate.
fn wait_renewed(lab: &Lab) -> Result<()> {
    let serials = || pods().into_iter().map(|pod| serial(lab, pod)).collect();
    let before: Vec<_> = serials();
    lab.wait_until("every certificate to be renewed", 2 * TTL, || {
        let now: Vec<_> = serials();
        let is_renewed = |(now, before): (&Option<String>, _)| now.is_some() && now != before;
        now.iter().zip(&before).all(is_renewed).then_some(())
    })
}

fn expiry(lab: &Lab, pod: &str) -> Option<f64> {
    let scrape = metrics::scrape(lab, node(pod)).ok()?;
    let identity = identity(pod);
    let labels = [("identity", identity.as_str())];
    let name = "ambit_certificate_expiry_timestamp_seconds";
    let found = scrape.iter().find(|sample| sample.matches(name, &labels))?;
    Some(found.value)
}

/// Kills the authority until connections fail, and restarts it. Certificates stay in use until they expire, and
/// connections succeed soon after the restart. Returns how long the authority was down.
fn ca_outage(lab: &Lab, load: &BackgroundLoad) -> Result<Duration> {
    lab.kill_ca()?;
    let killed = Instant::now();
    load.wait_progress(lab, 10, RECOVERY_DEADLINE)
        .context("with the certificates from before the outage")?;
    for node in NODES {
        wait_failures(
            lab,
            node,
            "ambit_certificate_failures_total",
            "ca_unreachable",
        )?;
    }
    wait_all(
        lab,
        "every certificate to expire",
        TTL + RECOVERY_DEADLINE,
        |pod| expiry(lab, pod).is_none_or(|at| at < unix_now()),
    )?;
    println!(
        "the last certificate expired {:?} after the authority was killed",
        killed.elapsed()
    );
    for node in NODES {
        wait_failures(
            lab,
            node,
            "ambit_connection_failures_total",
            "certificate_expired",
        )?;
    }
    lab.start_ca()?;
    let outage = killed.elapsed();
    wait_all(
        lab,
        "every certificate to be valid",
        RECOVERY_DEADLINE,
        |pod| expiry(lab, pod).is_some_and(|at| at > unix_now()),
    )?;
    println!(
        "every certificate is valid {:?} after the restart",
        killed.elapsed() - outage
    );
    load.wait_progress(lab, 10, RECOVERY_DEADLINE)
        .context("after the authority's restart")?;
    Ok(outage)
}

/// Waits until `is_done` holds for every pod.
fn wait_all(
    lab: &Lab,
    what: &str,
    timeout: Duration,
    is_done: impl Fn(&str) -> bool,
) -> Result<()> {
    lab.wait_until(what, timeout, || {
        pods().into_iter().all(&is_done).then_some(())
    })
}

/// Waits until a metric counts a failure with this reason.
fn wait_failures(lab: &Lab, node: &str, metric: &str, reason: &str) -> Result<()> {
    let what = format!("{metric} with reason {reason} on {node}");
    lab.wait_until(&what, FAILURE_DEADLINE, || {
        let scrape = metrics::scrape(lab, node).ok()?;
        (metrics::sum(&scrape, metric, &[("reason", reason)]) >= 1.0).then_some(())
    })
}

/// Replaces the authority's root. In the end every leaf chains to the new root, the old root is withdrawn, and leaves of
/// the old key are refused.
fn replace_root(lab: &Lab) -> Result<()> {
    let old = tempfile::tempdir()?;
    for file in ["root-cert.pem", "ca-key.pem"] {
        std::fs::copy(lab.ca_folder().join(file), old.path().join(file))?;
    }
    ensure!(
        is_accepted(lab, old.path())?,
        "a leaf of the current root was refused"
    );
    lab.replace_ca_root()?;
    let replaced = Instant::now();
    let root = |folder: &Path| CertificateDer::from_pem_file(folder.join("root-cert.pem"));
    let (old_root, new_root) = (root(old.path())?, root(&lab.ca_folder())?);
    let both = BTreeSet::from([old_root.to_vec(), new_root.to_vec()]);
    let published = |pod: &str| roots(lab, node(pod), &identity(pod)).unwrap_or_default();
    for (what, expected) in [
        ("both roots", both),
        ("the new root alone", BTreeSet::from([new_root.to_vec()])),
    ] {
        for pod in pods() {
            lab.wait_until(
                &format!("{what} in the dump entry of {pod}"),
                ROOT_REPLACEMENT_DEADLINE,
                || (published(pod) == expected).then_some(()),
            )?;
        }
        println!(
            "{what} in every dump entry {:?} after the replacement",
            replaced.elapsed()
        );
    }
    for pod in pods() {
        let leaf = cert_status(lab, node(pod), &identity(pod))?.and_then(|status| status.leaf);
        let leaf = leaf.with_context(|| format!("no certificate of {pod}"))?;
        ensure!(
            signed_by(&leaf, &new_root)?,
            "{pod} has a leaf of the old root"
        );
    }
    ensure!(
        !is_accepted(lab, old.path())?,
        "a leaf of the old root was accepted"
    );
    ensure!(
        is_accepted(lab, &lab.ca_folder())?,
        "a leaf of the new root was refused"
    );
    let labels = [("reason", "peer_untrusted")];
    metrics::wait(lab, "b", "ambit_connection_failures_total", &labels, 1.0).map(drop)
}

/// Whether a daemon accepts a leaf that the authority in this folder signs now.
fn is_accepted(lab: &Lab, folder: &Path) -> Result<bool> {
    let leaf = TestCa::from_folder(folder)?.leaf(&[&identity("client-a")])?;
    let netns = Netns {
        name: lab.netns(&Location::pod("outside/outsider"))?,
        is_marked: true,
    };
    let ip = lab.pod_ip("shop/web-b", IpFamily::V4)?;
    run_in_netns(&netns, Duration::from_secs(10), async |netns| {
        let client = TlsClient::with_certificate(&leaf);
        let Ok(mut tunnel) =
            Tunnel::open(&client, netns, (ip, 15008).into(), STREAM_WINDOW_BYTES).await
        else {
            return Ok(false);
        };
        let result = tunnel.connect(&format!("{ip}:{PORT}")).await?;
        Ok(result == ConnectResult::Status(200))
    })
}

/// Verifies a leaf with openssl, independently of the daemon's own libraries.
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
