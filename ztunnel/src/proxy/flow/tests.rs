//! The order of registration, authorization and re-check, step by step.

use mesh::Denial;

use super::*;
use crate::dataplane::recheck;
use crate::dataplane::recheck::tests::{DENY_9090, cart, publish};

const POLICY: &str = "AuthorizationPolicy shop/deny-9090";

fn denied() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 2], 9090))
}

/// A connection from `web` that is registered, and about which nothing is decided yet.
fn begun(pod: &Rc<PodContext>) -> Flow {
    let source = SocketAddr::from(([10, 0, 0, 1], 40_000));
    let slot = pod.admit().unwrap();
    Flow::begin(pod, slot, Direction::Inbound, source, denied())
}

fn policy_of(result: Result<(), Error>) -> Option<String> {
    let error = result.err()?;
    assert_eq!(error.code(), Denial::CODE);
    error.policy().map(ToString::to_string)
}

/// How often a series whose name and labels contain all of `parts` has counted.
fn count(pod: &PodContext, parts: &[&str]) -> f64 {
    let text = pod.telemetry.scrape();
    let of = |line: &&str| parts.iter().all(|part| line.contains(part));
    let values = text.lines().filter(of);
    values
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[tokio::test]
async fn a_policy_that_comes_between_registration_and_authorization_is_not_lost() {
    let (store, pod) = cart();
    let flow = begun(&pod);
    publish(&store, &[DENY_9090]);
    // The re-check of this version runs before the connection has said what it asks for.
    recheck::now(&pod);
    assert_eq!(flow.stop().reason(), None);
    assert_eq!(policy_of(flow.authorize(denied())).as_deref(), Some(POLICY));
}

#[tokio::test]
async fn a_policy_that_comes_while_the_application_is_dialled_ends_the_dial() {
    let (store, pod) = cart();
    let flow = begun(&pod);
    assert!(flow.authorize(denied()).is_ok());
    let dialling = flow.unless_stopped(std::future::pending::<Result<(), Error>>());
    let policy = async {
        publish(&store, &[DENY_9090]);
        recheck::now(&pod);
    };
    let (dialled, ()) = tokio::join!(dialling, policy);
    assert_eq!(policy_of(dialled).as_deref(), Some(POLICY));
}

#[tokio::test]
async fn a_policy_that_comes_when_the_dial_has_just_ended_is_not_lost() {
    let (store, pod) = cart();
    let flow = begun(&pod);
    assert!(flow.authorize(denied()).is_ok());
    assert!(flow.unless_stopped(async { Ok(()) }).await.is_ok());
    publish(&store, &[DENY_9090]);
    recheck::now(&pod);
    // The relay looks at this before it moves a byte.
    assert_eq!(flow.relay_opts().stop.reason(), Some(Denial::CODE));
}

#[tokio::test]
async fn a_denial_counts_once_and_under_its_policy_whenever_it_comes() {
    let (store, pod) = cart();
    let open = begun(&pod);
    assert!(open.authorize(denied()).is_ok());
    open.opened();
    let cancelled = begun(&pod);
    assert!(cancelled.authorize(denied()).is_ok());
    publish(&store, &[DENY_9090]);
    recheck::now(&pod);
    open.closed(&RelaySummary {
        sent: 0,
        received: 0,
        outcome: RelayOutcome::Stopped {
            reason: Denial::CODE,
        },
    });
    // Whoever opened this one went away in the same moment.
    drop(cancelled);
    let late = begun(&pod);
    let error = late.authorize(denied()).err().unwrap();
    late.failed(&error);
    for parts in [
        ["ambit_policy_denials_total", POLICY],
        [
            "ambit_connection_failures_total",
            "direction=\"inbound\",reason=\"policy_denied\"",
        ],
        [
            "istio_tcp_connections_failed_total",
            "response_flags=\"DENY\"",
        ],
    ] {
        assert_eq!(count(&pod, &parts), 3.0, "{parts:?}");
    }
}

#[tokio::test]
async fn a_pod_that_is_not_known_takes_nothing() {
    let (store, pod) = cart();
    let flow = begun(&pod);
    store.apply(mesh::Model::default(), vec![]);
    let error = flow.authorize(denied()).err().unwrap();
    assert_eq!(error.code(), "workload_unknown");
}
