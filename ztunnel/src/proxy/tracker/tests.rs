//! The order of registration, authorization and reauthorization, step by step.

use mesh::Denial;

use super::super::fixture::{DENY_9090, cart, publish};
use super::super::reauthorize::check_now;
use super::*;

const POLICY: &str = "AuthorizationPolicy shop/deny-9090";

fn denied_dst() -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 2], 9090))
}

/// A connection from `web` that is registered and not yet authorized.
fn registered(pod: &Rc<PodContext>) -> ConnectionTracker {
    let source = SocketAddr::from(([10, 0, 0, 1], 40_000));
    let permit = pod.try_admit().unwrap();
    ConnectionTracker::start(pod, permit, Direction::Inbound, source, denied_dst())
}

fn policy_of(result: Result<(), Error>) -> Option<String> {
    let error = result.err()?;
    assert_eq!(error.code(), Denial::CODE);
    error.policy().map(ToString::to_string)
}

/// The sum of all series whose name and labels contain all of `parts`.
fn count(pod: &PodContext, parts: &[&str]) -> f64 {
    let text = pod.telemetry().scrape();
    let matches = |line: &&str| parts.iter().all(|part| line.contains(part));
    let values = text.lines().filter(matches);
    values
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

#[tokio::test]
async fn policy_between_registration_and_authorization_denies() {
    let (store, pod) = cart();
    let tracker = registered(&pod);
    publish(&store, &[DENY_9090]);
    // The pass over this version runs before the connection has set its request.
    check_now(&pod);
    assert_eq!(tracker.stop_signal().reason(), None);
    let result = tracker.authorize(denied_dst());
    assert_eq!(policy_of(result).as_deref(), Some(POLICY));
}

#[tokio::test]
async fn policy_during_the_dial_ends_the_dial() {
    let (store, pod) = cart();
    let tracker = registered(&pod);
    assert!(tracker.authorize(denied_dst()).is_ok());
    let dial = tracker.unless_stopped(std::future::pending::<Result<(), Error>>());
    let policy = async {
        publish(&store, &[DENY_9090]);
        check_now(&pod);
    };
    let (dialled, ()) = tokio::join!(dial, policy);
    assert_eq!(policy_of(dialled).as_deref(), Some(POLICY));
}

#[tokio::test]
async fn policy_between_dial_and_relay_stops_the_relay() {
    let (store, pod) = cart();
    let tracker = registered(&pod);
    assert!(tracker.authorize(denied_dst()).is_ok());
    assert!(tracker.unless_stopped(async { Ok(()) }).await.is_ok());
    publish(&store, &[DENY_9090]);
    check_now(&pod);
    // The relay checks this before it moves a byte.
    assert_eq!(tracker.relay_opts().stop.reason(), Some(Denial::CODE));
}

#[tokio::test]
async fn denial_counts_once_under_its_policy_at_every_stage() {
    let (store, pod) = cart();
    let open = registered(&pod);
    assert!(open.authorize(denied_dst()).is_ok());
    open.mark_opened();
    let cancelled = registered(&pod);
    assert!(cancelled.authorize(denied_dst()).is_ok());
    publish(&store, &[DENY_9090]);
    check_now(&pod);
    open.finish(&RelaySummary {
        sent: 0,
        received: 0,
        outcome: RelayOutcome::Stopped {
            reason: Denial::CODE,
        },
    });
    // The peer of this one disconnects at the same moment.
    drop(cancelled);
    let late = registered(&pod);
    let error = late.authorize(denied_dst()).err().unwrap();
    late.finish_failed(&error);
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
async fn unknown_pod_refuses_connections() {
    let (store, pod) = cart();
    let tracker = registered(&pod);
    store.apply(mesh::Model::default(), vec![]);
    let error = tracker.authorize(denied_dst()).err().unwrap();
    assert_eq!(error.code(), "workload_unknown");
}
