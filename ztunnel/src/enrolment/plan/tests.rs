use super::*;

fn uid(name: &str) -> WorkloadUid {
    WorkloadUid::of_pod("Kubernetes", "shop", name, &format!("uid-{name}"))
}

fn pod(ip: &str) -> Arc<Desired> {
    Arc::new(Desired {
        kube_uid: "uid".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/default"
            .parse()
            .expect("an identity"),
        ips: vec![ip.parse().expect("an address")],
        redirection: Redirection::default(),
    })
}

fn world(meshed: &[(&str, &str)], plain: &[&str]) -> World {
    World {
        meshed: meshed
            .iter()
            .map(|(name, ip)| (uid(name), pod(ip)))
            .collect(),
        plain: plain.iter().map(|name| (uid(name), "uid".into())).collect(),
    }
}

fn actual(phase: Phase, ip: &str) -> Actual {
    Actual {
        phase,
        busy: false,
        waiting: false,
        failed_as: None,
        due: false,
        enrolled_as: Some(pod(ip)),
    }
}

fn plan_of(world: &World, actual: &[(&str, Actual)]) -> Vec<(WorkloadUid, Action)> {
    plan(
        world,
        &actual
            .iter()
            .map(|(name, actual)| (uid(name), actual.clone()))
            .collect(),
    )
}

#[test]
fn a_new_pod_is_enrolled_and_a_pod_outside_the_mesh_is_swept_once() {
    let world = world(&[("in", "10.0.0.1")], &["out"]);
    assert_eq!(
        plan_of(&world, &[]),
        [(uid("in"), Action::Enrol), (uid("out"), Action::Sweep)]
    );
    let settled = [
        ("in", actual(Phase::Enrolled, "10.0.0.1")),
        ("out", actual(Phase::Clean, "10.0.0.2")),
    ];
    assert_eq!(plan_of(&world, &settled), []);
}

#[test]
fn a_pod_whose_step_failed_waits_and_hinders_no_other() {
    let world = world(&[("bad", "10.0.0.1"), ("good", "10.0.0.2")], &[]);
    let failed = Actual {
        waiting: true,
        failed_as: Some(pod("10.0.0.1")),
        enrolled_as: None,
        ..actual(Phase::Pending, "10.0.0.1")
    };
    assert_eq!(
        plan_of(&world, &[("bad", failed.clone())]),
        [(uid("good"), Action::Enrol)]
    );
    let retry = Actual {
        waiting: false,
        ..failed
    };
    assert_eq!(
        plan_of(&world, &[("bad", retry)]),
        [(uid("bad"), Action::Enrol), (uid("good"), Action::Enrol)]
    );
}

#[test]
fn a_pod_that_has_changed_since_its_step_failed_does_not_wait() {
    let world = world(&[("a", "10.0.0.1")], &[]);
    let failed = Actual {
        waiting: true,
        failed_as: Some(pod("10.0.0.9")),
        enrolled_as: None,
        ..actual(Phase::Pending, "10.0.0.9")
    };
    assert_eq!(
        plan_of(&world, &[("a", failed)]),
        [(uid("a"), Action::Enrol)]
    );
}

#[test]
fn an_enrolled_pod_is_verified_when_it_is_time_or_when_it_has_changed() {
    let world = world(&[("a", "10.0.0.1")], &[]);
    let stands = actual(Phase::Enrolled, "10.0.0.1");
    assert_eq!(plan_of(&world, &[("a", stands.clone())]), []);
    assert_eq!(
        plan_of(
            &world,
            &[(
                "a",
                Actual {
                    due: true,
                    ..stands
                }
            )]
        ),
        [(uid("a"), Action::Verify)]
    );
    assert_eq!(
        plan_of(&world, &[("a", actual(Phase::Enrolled, "10.0.0.9"))]),
        [(uid("a"), Action::Verify)]
    );
}

#[test]
fn nothing_is_started_for_a_pod_that_is_busy() {
    let world = world(&[], &["a"]);
    let busy = Actual {
        busy: true,
        due: true,
        ..actual(Phase::Enrolled, "10.0.0.1")
    };
    assert_eq!(plan_of(&world, &[("a", busy)]), []);
}

#[test]
fn a_pod_that_opts_out_leaves_and_one_that_never_came_in_is_swept() {
    let world = world(&[], &["in", "half"]);
    let pods = [
        ("in", actual(Phase::Enrolled, "10.0.0.1")),
        ("half", actual(Phase::Pending, "10.0.0.2")),
    ];
    assert_eq!(
        plan_of(&world, &pods),
        [(uid("half"), Action::Sweep), (uid("in"), Action::Leave)]
    );
}

#[test]
fn a_pod_that_is_gone_is_forgotten_whatever_it_waits_for() {
    let nothing = world(&[], &[]);
    let waiting = Actual {
        waiting: true,
        ..actual(Phase::Pending, "10.0.0.1")
    };
    let leaving = Actual {
        busy: true,
        ..actual(Phase::Leaving, "10.0.0.2")
    };
    assert_eq!(
        plan_of(&nothing, &[("a", waiting), ("b", leaving)]),
        [(uid("a"), Action::Forget), (uid("b"), Action::Interrupt)]
    );
}

#[test]
fn a_pod_that_leaves_and_comes_back_is_enrolled_again() {
    let back = world(&[("a", "10.0.0.1")], &[]);
    let leaving = Actual {
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
                Actual {
                    busy: false,
                    ..leaving
                }
            )]
        ),
        [(uid("a"), Action::Enrol)]
    );
}

#[test]
fn a_pod_waits_until_the_one_that_had_its_address_is_forgotten() {
    let recreated = world(&[("new", "10.0.0.1"), ("other", "10.0.0.2")], &[]);
    let old = [("old", actual(Phase::Enrolled, "10.0.0.1"))];
    assert_eq!(
        plan_of(&recreated, &old),
        [(uid("old"), Action::Forget), (uid("other"), Action::Enrol)]
    );
    let busy = [(
        "old",
        Actual {
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
