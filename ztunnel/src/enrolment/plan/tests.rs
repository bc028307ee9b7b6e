use super::*;

fn uid(name: &str) -> WorkloadUid {
    WorkloadUid::of_pod("Kubernetes", "shop", name, &format!("uid-{name}"))
}

fn pod(ip: &str) -> Arc<DesiredPod> {
    Arc::new(DesiredPod {
        kube_uid: "uid".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/default"
            .parse()
            .expect("an identity"),
        ips: vec![ip.parse().expect("an address")],
        redirection: Redirection::default(),
    })
}

fn desired_state(meshed: &[(&str, &str)], plain: &[&str]) -> DesiredState {
    DesiredState {
        meshed: meshed
            .iter()
            .map(|(name, ip)| (uid(name), pod(ip)))
            .collect(),
        plain: plain.iter().map(|name| (uid(name), "uid".into())).collect(),
    }
}

fn actual(phase: Phase, ip: &str) -> ActualPod {
    ActualPod {
        phase,
        busy: false,
        waiting: false,
        failed_as: None,
        due: false,
        enrolled_as: Some(pod(ip)),
    }
}

fn plan_of(desired: &DesiredState, actual: &[(&str, ActualPod)]) -> Vec<(WorkloadUid, Action)> {
    plan(
        desired,
        &actual
            .iter()
            .map(|(name, actual)| (uid(name), actual.clone()))
            .collect(),
    )
}

#[test]
fn new_pod_is_enrolled_and_plain_pod_is_swept_once() {
    let desired = desired_state(&[("in", "10.0.0.1")], &["out"]);
    assert_eq!(
        plan_of(&desired, &[]),
        [(uid("in"), Action::Enrol), (uid("out"), Action::Sweep)]
    );
    let settled = [
        ("in", actual(Phase::Enrolled, "10.0.0.1")),
        ("out", actual(Phase::Clean, "10.0.0.2")),
    ];
    assert_eq!(plan_of(&desired, &settled), []);
}

#[test]
fn failed_pod_waits_and_delays_no_other() {
    let desired = desired_state(&[("bad", "10.0.0.1"), ("good", "10.0.0.2")], &[]);
    let failed = ActualPod {
        waiting: true,
        failed_as: Some(pod("10.0.0.1")),
        enrolled_as: None,
        ..actual(Phase::Pending, "10.0.0.1")
    };
    assert_eq!(
        plan_of(&desired, &[("bad", failed.clone())]),
        [(uid("good"), Action::Enrol)]
    );
    let retry = ActualPod {
        waiting: false,
        ..failed
    };
    assert_eq!(
        plan_of(&desired, &[("bad", retry)]),
        [(uid("bad"), Action::Enrol), (uid("good"), Action::Enrol)]
    );
}

#[test]
fn changed_pod_is_retried_without_backoff() {
    let desired = desired_state(&[("a", "10.0.0.1")], &[]);
    let failed = ActualPod {
        waiting: true,
        failed_as: Some(pod("10.0.0.9")),
        enrolled_as: None,
        ..actual(Phase::Pending, "10.0.0.9")
    };
    assert_eq!(
        plan_of(&desired, &[("a", failed)]),
        [(uid("a"), Action::Enrol)]
    );
}

#[test]
fn enrolled_pod_is_verified_when_due_or_changed() {
    let desired = desired_state(&[("a", "10.0.0.1")], &[]);
    let enrolled = actual(Phase::Enrolled, "10.0.0.1");
    assert_eq!(plan_of(&desired, &[("a", enrolled.clone())]), []);
    assert_eq!(
        plan_of(
            &desired,
            &[(
                "a",
                ActualPod {
                    due: true,
                    ..enrolled
                }
            )]
        ),
        [(uid("a"), Action::Verify)]
    );
    assert_eq!(
        plan_of(&desired, &[("a", actual(Phase::Enrolled, "10.0.0.9"))]),
        [(uid("a"), Action::Verify)]
    );
}

#[test]
fn busy_pod_gets_no_step() {
    let desired = desired_state(&[], &["a"]);
    let busy = ActualPod {
        busy: true,
        due: true,
        ..actual(Phase::Enrolled, "10.0.0.1")
    };
    assert_eq!(plan_of(&desired, &[("a", busy)]), []);
}

#[test]
fn opted_out_pod_leaves_if_enrolled_and_is_swept_if_pending() {
    let desired = desired_state(&[], &["in", "half"]);
    let pods = [
        ("in", actual(Phase::Enrolled, "10.0.0.1")),
        ("half", actual(Phase::Pending, "10.0.0.2")),
    ];
    assert_eq!(
        plan_of(&desired, &pods),
        [(uid("half"), Action::Sweep), (uid("in"), Action::Leave)]
    );
}

#[test]
fn deleted_pod_is_forgotten_during_backoff_and_interrupted_while_leaving() {
    let nothing = desired_state(&[], &[]);
    let waiting = ActualPod {
        waiting: true,
        ..actual(Phase::Pending, "10.0.0.1")
    };
    let leaving = ActualPod {
        busy: true,
        ..actual(Phase::Leaving, "10.0.0.2")
    };
    assert_eq!(
        plan_of(&nothing, &[("a", waiting), ("b", leaving)]),
        [(uid("a"), Action::Forget), (uid("b"), Action::Interrupt)]
    );
}

#[test]
fn leaving_pod_that_opts_in_again_is_interrupted_then_enrolled() {
    let back = desired_state(&[("a", "10.0.0.1")], &[]);
    let leaving = ActualPod {
        busy: true,
        ..actual(Phase::Leaving, "10.0.0.1")
    };
    assert_eq!(
        plan_of(&back, &[("a", leaving.clone())]),
        [(uid("a"), Action::Interrupt)]
    );
    assert_eq!(
        plan_of(
            &back,
            &[(
                "a",
                ActualPod {
                    busy: false,
                    ..leaving
                }
            )]
        ),
        [(uid("a"), Action::Enrol)]
    );
}

#[test]
fn new_pod_waits_until_the_old_owner_of_its_address_is_forgotten() {
    let recreated = desired_state(&[("new", "10.0.0.1"), ("other", "10.0.0.2")], &[]);
    let old = [("old", actual(Phase::Enrolled, "10.0.0.1"))];
    assert_eq!(
        plan_of(&recreated, &old),
        [(uid("old"), Action::Forget), (uid("other"), Action::Enrol)]
    );
    let busy = [(
        "old",
        ActualPod {
            busy: true,
            ..actual(Phase::Enrolled, "10.0.0.1")
        },
    )];
    assert_eq!(plan_of(&recreated, &busy), [(uid("other"), Action::Enrol)]);
    assert_eq!(
        plan_of(&recreated, &[]),
        [(uid("new"), Action::Enrol), (uid("other"), Action::Enrol)]
    );
}
