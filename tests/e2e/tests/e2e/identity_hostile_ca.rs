//! An authority that means harm, or is broken: what it answers is refused with its reason, the
//! certificate that was good stays in use, and whoever never had a good one has no traffic.

use std::time::Duration;

use ambit_e2e::ca::{Answer, HostileCa};
use ambit_e2e::identity::{Held, held, identity};
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, nginx, url};
use anyhow::{Context, Result, ensure};
use lab::{IdentitySource, IpFamily, Lab, Location, Options};

/// Each kind of answer, its reason code, and a pod whose identity gets it.
const KINDS: [(Answer, &str, &str); 8] = [
    (Answer::Garbage, "issued_garbage", "garbage"),
    (
        Answer::AnotherIdentity,
        "wrong_identity",
        "another-identity",
    ),
    (Answer::Expired, "issued_expired", "expired"),
    (Answer::OverLong, "chain_too_long", "over-long"),
    (Answer::Untrusted, "chain_untrusted", "untrusted"),
    (Answer::AnotherKey, "key_mismatch", "another-key"),
    (Answer::Denied, "ca_denied", "denied"),
    (Answer::Silence, "issue_timeout", "silence"),
];

/// What the authority signs lives as long: renewed at half of it, and good for the rest.
const LIFE: Duration = Duration::from_secs(50);

/// A renewal is due at half of a life; an authority that is silent is given up after 10 s.
const REFUSED: Duration = Duration::from_secs(40);

/// After the authority is good again: the longest pause between attempts so far.
const RENEWED: Duration = Duration::from_secs(40);

fn up(ca: &mut HostileCa) -> Result<Lab> {
    let pods = KINDS.map(|(_, _, pod)| String::from(Pod::new("shop", pod).on("a")));
    let web = Pod::new("shop", "web").on("b").port(None, PORT);
    let all = [
        manifest::two_nodes(),
        manifest::namespace("shop", Some("ambient")),
        web.runs(nginx(&[PORT], "web")).into(),
    ];
    let at = ([10, 0, 0, 1], 15012).into();
    let options = Options {
        identity: IdentitySource::Custom,
        daemon_args: ca.daemon_args(at),
        wait_until_ready: false,
        ..Options::default()
    };
    let lab = Lab::up(manifest::all(all.into_iter().chain(pods)), options)?;
    ca.serve(lab.netns(&Location::Fabric)?, at)?;
    lab.wait_ready()?;
    Ok(lab)
}

fn of(lab: &Lab, pod: &str) -> Result<Held> {
    held(lab, "a", &identity(pod))?.with_context(|| format!("the identity of {pod}"))
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
fn what_a_hostile_authority_answers_is_refused_and_what_was_good_stays() -> Result<()> {
    let mut ca = HostileCa::new(LIFE)?;
    let lab = up(&mut ca)?;
    let to = url(lab.pod_ip("shop/web", IpFamily::V4)?, PORT);
    let ask = |pod: &str| curl(&lab, &Location::pod(&format!("shop/{pod}")), &to, &[]);
    let mut first = Vec::new();
    for (answer, _, pod) in KINDS {
        let held = lab.wait_until(&format!("the certificate of {pod}"), LIFE, || {
            of(&lab, pod).ok().filter(|held| !held.serial.is_empty())
        })?;
        first.push(held.serial);
        ca.answers(&identity(pod), answer);
    }
    for (_, reason, pod) in KINDS {
        lab.wait_until(&format!("{reason} to be counted"), REFUSED, || {
            (failures(&lab, reason) >= 1.0).then_some(())
        })?;
        ensure!(
            ca.asked(&identity(pod)) >= 2,
            "{pod} was not asked for again"
        );
    }
    let log = lab.daemon_log("a")?;
    for ((_, reason, pod), serial) in KINDS.iter().zip(&first) {
        // Nothing was sent before, so this is a handshake with the certificate that is refused nowhere.
        ensure!(ask(pod)?.body == "web", "{pod} got another answer");
        let now = of(&lab, pod)?;
        ensure!(
            now.serial == *serial,
            "{pod} has another certificate: {:?}",
            now.entry
        );
        let said = |line: &&str| line.contains(reason) && line.contains(&identity(pod));
        ensure!(
            log.lines().any(|line| said(&line)),
            "no line of {pod} with {reason}"
        );
    }
    a_pod_that_never_had_one_has_no_traffic(&lab, &ca)?;
    for (_, _, pod) in KINDS {
        ca.answers(&identity(pod), Answer::Good);
    }
    for ((_, _, pod), serial) in KINDS.iter().zip(&first) {
        lab.wait_until(&format!("the next certificate of {pod}"), RENEWED, || {
            let another = |held: &Held| !held.serial.is_empty() && held.serial != *serial;
            of(&lab, pod).ok().filter(another)
        })?;
        ensure!(ask(pod)?.body == "web", "{pod} got another answer");
    }
    Ok(())
}

/// A new pod, for whose identity the authority signs nothing: it is not enrolled, which holds its
/// start up, and nothing gets out of it; once the authority relents, it works.
fn a_pod_that_never_had_one_has_no_traffic(lab: &Lab, ca: &HostileCa) -> Result<()> {
    ca.answers(&identity("late"), Answer::Denied);
    lab.apply(String::from(Pod::new("shop", "late").on("a")))?;
    let refused = lab.wait_until("its identity to be refused", RENEWED, || {
        of(lab, "late")
            .ok()
            .filter(|held| held.state.contains("ca_denied"))
    })?;
    ensure!(refused.serial.is_empty(), "{:?}", refused.entry);
    let to = url(lab.pod_ip("shop/web", IpFamily::V4)?, PORT);
    let client = Location::pod("shop/late");
    let soon = ["--connect-timeout", "2"];
    ensure!(
        curl(lab, &client, &to, &soon).is_err(),
        "it had traffic without an identity"
    );
    let status = lab.status()?;
    let pod = status.pod("shop/late")?;
    ensure!(!pod.ready && pod.message.contains("pending"), "{pod:?}");
    ca.answers(&identity("late"), Answer::Good);
    lab.wait_ready()?;
    ensure!(
        curl(lab, &client, &to, &[])?.body == "web",
        "it got another answer"
    );
    lab.delete("Pod", "shop/late")?;
    lab.wait_until("its identity to be forgotten", RENEWED, || {
        held_no_more(lab, "late").then_some(())
    })
}

fn held_no_more(lab: &Lab, pod: &str) -> bool {
    matches!(held(lab, "a", &identity(pod)), Ok(None))
}
