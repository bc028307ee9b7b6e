//! A certificate authority whose responses are invalid: the daemon refuses each with its reason, keeps the last valid
//! certificate in use, and a pod without one has no traffic.

use std::time::Duration;

use ambit_e2e::ca::{CaResponse, FakeCa};
use ambit_e2e::identity::{CertStatus, cert_status, identity};
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, nginx, url};
use anyhow::{Context, Result, ensure};
use lab::{IdentitySource, IpFamily, Lab, Location, Options};

/// Each invalid response, its reason code, and the pod whose identity gets it.
const CASES: [(CaResponse, &str, &str); 8] = [
    (CaResponse::Garbage, "issued_garbage", "garbage"),
    (
        CaResponse::WrongIdentity,
        "wrong_identity",
        "wrong-identity",
    ),
    (CaResponse::Expired, "issued_expired", "expired"),
    (CaResponse::ChainTooLong, "chain_too_long", "chain-too-long"),
    (CaResponse::Untrusted, "chain_untrusted", "untrusted"),
    (CaResponse::WrongKey, "key_mismatch", "wrong-key"),
    (CaResponse::Denied, "ca_denied", "denied"),
    (CaResponse::NoResponse, "issue_timeout", "no-response"),
];

/// The validity of the authority's certificates.
const TTL: Duration = Duration::from_secs(40);

/// The validity that the daemon requests. It renews at half of this: the certificate is then still valid for longer
/// than all refusals take.
const REQUESTED_TTL: &str = "20s";

/// How long all refusals may take: a renewal is due after 10 s, and a request without a response ends after 10 s.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(30);

/// How long a renewal may take once the authority's responses are valid: the longest backoff so far.
const RENEWAL_DEADLINE: Duration = Duration::from_secs(40);

fn up(ca: &mut FakeCa) -> Result<Lab> {
    let pods = CASES.map(|(_, _, pod)| String::from(Pod::new("shop", pod).on("a")));
    let web = Pod::new("shop", "web").on("b").port(None, PORT);
    let all = [
        manifest::two_nodes(),
        manifest::namespace("shop", Some("ambient")),
        web.runs(nginx(&[PORT], "web")).into(),
    ];
    let at = ([10, 0, 0, 1], 15012).into();
    let mut daemon_args = ca.daemon_args(at);
    daemon_args.extend(["--cert-ttl".to_owned(), REQUESTED_TTL.to_owned()]);
    let options = Options {
        identity: IdentitySource::Custom,
        daemon_args,
        wait_until_ready: false,
        ..Options::default()
    };
    let lab = Lab::up(manifest::all(all.into_iter().chain(pods)), options)?;
    ca.serve(lab.netns(&Location::Fabric)?, at)?;
    lab.wait_ready()?;
    Ok(lab)
}

fn status_of(lab: &Lab, pod: &str) -> Result<CertStatus> {
    cert_status(lab, "a", &identity(pod))?.with_context(|| format!("the identity of {pod}"))
}

fn failures(lab: &Lab, reason: &str) -> f64 {
    let scrape = metrics::scrape(lab, "a").unwrap_or_default();
    metrics::sum(
        &scrape,
        "ambit_certificate_failures_total",
        &[("reason", reason)],
    )
}

#[test]
fn invalid_ca_responses_are_refused_and_the_last_certificate_stays_in_use() -> Result<()> {
    let mut ca = FakeCa::new(TTL)?;
    let lab = up(&mut ca)?;
    let to = url(lab.pod_ip("shop/web", IpFamily::V4)?, PORT);
    let request = |pod: &str| curl(&lab, &Location::pod(&format!("shop/{pod}")), &to, &[]);
    let mut first_serials = Vec::new();
    for (response, _, pod) in CASES {
        let status = lab.wait_until(&format!("the certificate of {pod}"), TTL, || {
            status_of(&lab, pod)
                .ok()
                .filter(|status| !status.serial.is_empty())
        })?;
        first_serials.push(status.serial);
        ca.set_response(&identity(pod), response);
    }
    for (_, reason, pod) in CASES {
        lab.wait_until(&format!("{reason} to be counted"), REFUSAL_DEADLINE, || {
            (failures(&lab, reason) >= 1.0).then_some(())
        })?;
        ensure!(
            ca.request_count(&identity(pod)) >= 2,
            "no renewal was requested for {pod}"
        );
    }
    let log = lab.daemon_log("a")?;
    for ((_, reason, pod), serial) in CASES.iter().zip(&first_serials) {
        // The pod's first connection, so a new handshake with the certificate that was kept.
        ensure!(request(pod)?.body == "web", "{pod} got another response");
        let now = status_of(&lab, pod)?;
        ensure!(
            now.serial == *serial,
            "{pod} has another certificate: {:?}",
            now.entry
        );
        let has_reason = |line: &str| line.contains(reason) && line.contains(&identity(pod));
        ensure!(
            log.lines().any(has_reason),
            "no log line of {pod} with {reason}"
        );
    }
    check_pod_without_certificate(&lab, &ca)?;
    for (_, _, pod) in CASES {
        ca.set_response(&identity(pod), CaResponse::Valid);
    }
    for ((_, _, pod), serial) in CASES.iter().zip(&first_serials) {
        lab.wait_until(
            &format!("the next certificate of {pod}"),
            RENEWAL_DEADLINE,
            || {
                let is_new =
                    |status: &CertStatus| !status.serial.is_empty() && status.serial != *serial;
                status_of(&lab, pod).ok().filter(is_new)
            },
        )?;
        ensure!(request(pod)?.body == "web", "{pod} got another response");
    }
    Ok(())
}

/// Adds a pod for whose identity the authority denies a certificate: the pod is not enrolled, does not become ready, and
/// has no traffic. It works once the authority signs.
fn check_pod_without_certificate(lab: &Lab, ca: &FakeCa) -> Result<()> {
    ca.set_response(&identity("late"), CaResponse::Denied);
    lab.apply(String::from(Pod::new("shop", "late").on("a")))?;
    let refused = lab.wait_until("the identity to be refused", RENEWAL_DEADLINE, || {
        status_of(lab, "late")
            .ok()
            .filter(|status| status.state.contains("ca_denied"))
    })?;
    ensure!(refused.serial.is_empty(), "{:?}", refused.entry);
    let to = url(lab.pod_ip("shop/web", IpFamily::V4)?, PORT);
    let client = Location::pod("shop/late");
    let timeout = ["--connect-timeout", "2"];
    ensure!(
        curl(lab, &client, &to, &timeout).is_err(),
        "the pod had traffic without an identity"
    );
    let status = lab.status()?;
    let pod = status.pod("shop/late")?;
    ensure!(!pod.ready && pod.message.contains("pending"), "{pod:?}");
    ca.set_response(&identity("late"), CaResponse::Valid);
    lab.wait_ready()?;
    ensure!(
        curl(lab, &client, &to, &[])?.body == "web",
        "the pod got another response"
    );
    lab.delete("Pod", "shop/late")?;
    lab.wait_until("the identity to be removed", RENEWAL_DEADLINE, || {
        is_removed(lab, "late").then_some(())
    })
}

fn is_removed(lab: &Lab, pod: &str) -> bool {
    matches!(cert_status(lab, "a", &identity(pod)), Ok(None))
}
