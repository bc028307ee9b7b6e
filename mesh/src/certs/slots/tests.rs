mod property;

use std::sync::Arc;

use zeroize::Zeroizing;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
/// In the middle: nothing is spread.
const MIDDLE: fn() -> f64 = || 0.5;

fn id(name: &str) -> SpiffeId {
    format!("spiffe://cluster.local/ns/shop/sa/{name}")
        .parse()
        .unwrap()
}

fn ids(names: &[&str]) -> BTreeSet<SpiffeId> {
    names.iter().map(|name| id(name)).collect()
}

fn start() -> Now {
    Now {
        wall: SystemTime::UNIX_EPOCH + 500 * 24 * HOUR,
        steady: Instant::now(),
    }
}

impl Now {
    fn after(self, time: Duration) -> Self {
        Self {
            wall: self.wall + time,
            steady: self.steady + time,
        }
    }
}

/// Nobody looks at its chain here.
fn certificate(identity: &SpiffeId, now: Now, life: Duration) -> Certificate {
    Certificate {
        identity: identity.clone(),
        chain: vec![],
        not_before: now.wall,
        not_after: now.wall + life,
        serial: "01".to_owned(),
        ends: now.steady + life,
        key: Zeroizing::default(),
    }
}

fn down(identity: &SpiffeId) -> IssueError {
    IssueError::new(identity, IssueError::UNREACHABLE, "nobody is there")
}

fn denied(identity: &SpiffeId) -> IssueError {
    IssueError::new(identity, IssueError::DENIED, "not for you")
}

struct Bench {
    slots: CertStore,
    now: Now,
}

impl Bench {
    fn new(names: &[&str]) -> Self {
        let (mut slots, now) = (CertStore::new(24 * HOUR), start());
        slots.want(&ids(names), now);
        Self { slots, now }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
    }

    fn start(&mut self, free: usize) -> Vec<Attempt> {
        self.slots.start(self.now, free)
    }

    fn started(&mut self, free: usize) -> Vec<String> {
        let name = |attempt: &Attempt| {
            attempt
                .identity
                .path()
                .rsplit('/')
                .next()
                .unwrap()
                .to_owned()
        };
        self.start(free).iter().map(name).collect()
    }

    fn fail(&mut self, attempt: &Attempt, with: fn(&SpiffeId) -> IssueError) -> Finished {
        let error = Err(with(&attempt.identity));
        self.slots.finish(attempt, error, self.now, MIDDLE).unwrap()
    }

    fn succeed(&mut self, attempt: &Attempt, life: Duration) -> Finished {
        let issued = certificate(&attempt.identity, self.now, life);
        self.slots
            .finish(attempt, Ok(issued), self.now, MIDDLE)
            .unwrap()
    }

    /// Issues for everything that is due.
    fn serve(&mut self, life: Duration) {
        for attempt in self.start(100) {
            self.succeed(&attempt, life);
        }
    }

    fn until_due(&self) -> Duration {
        let next = self.slots.next(self.now, true).unwrap();
        next.saturating_duration_since(self.now.steady)
    }
}

#[test]
fn what_a_connection_waits_for_comes_first_then_what_has_nothing_then_what_expires_first() {
    let mut bench = Bench::new(&["late", "soon"]);
    let attempts = bench.start(2);
    bench.succeed(&attempts[0], 10 * HOUR);
    bench.succeed(&attempts[1], 8 * HOUR);
    bench.pass(6 * HOUR);
    let all = ids(&["late", "new", "soon", "waited", "zero"]);
    bench.slots.want(&all, bench.now);
    bench.slots.prioritize(&id("new"), Priority::Pod, bench.now);
    bench
        .slots
        .prioritize(&id("waited"), Priority::Connection, bench.now);
    bench
        .slots
        .prioritize(&id("waited"), Priority::Pod, bench.now);
    assert_eq!(bench.started(1), ["waited"]);
    // The fourth place is for who has been due for longest.
    assert_eq!(bench.started(1), ["soon"]);
    assert_eq!(bench.started(9), ["new", "zero", "late"]);
    assert_eq!(bench.started(9), [""; 0], "all are under way");
}

#[test]
fn a_rush_of_the_urgent_lets_one_in_four_of_the_others_through() {
    let urgent: Vec<String> = (0..12).map(|i| format!("urgent{i:02}")).collect();
    let mut names: Vec<&str> = urgent.iter().map(String::as_str).collect();
    names.push("patient");
    let mut bench = Bench::new(&["patient"]);
    bench.pass(SECOND);
    bench.slots.want(&ids(&names), bench.now);
    for name in &urgent {
        bench
            .slots
            .prioritize(&id(name), Priority::Connection, bench.now);
    }
    assert_eq!(bench.started(4)[3], "patient");
}

#[test]
fn a_failure_is_followed_by_longer_and_longer_waits() {
    let mut bench = Bench::new(&["web"]);
    let mut waits = vec![];
    for _ in 0..10 {
        let attempt = bench.start(1).remove(0);
        bench.fail(&attempt, denied);
        waits.push(bench.until_due().as_secs());
        bench.pass(bench.until_due());
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
}

#[test]
fn while_a_connection_waits_it_is_tried_every_second() {
    let mut bench = Bench::new(&["web"]);
    for _ in 0..8 {
        let attempt = bench.start(1).remove(0);
        bench.fail(&attempt, denied);
        bench.pass(bench.until_due());
    }
    let attempt = bench.start(1).remove(0);
    bench.fail(&attempt, denied);
    assert_eq!(bench.until_due(), 150 * SECOND);
    bench
        .slots
        .prioritize(&id("web"), Priority::Connection, bench.now);
    assert_eq!(bench.until_due(), SECOND);
    bench.pass(SECOND);
    let attempt = bench.start(1).remove(0);
    bench
        .slots
        .prioritize(&id("web"), Priority::Connection, bench.now);
    bench.fail(&attempt, denied);
    assert_eq!(bench.until_due(), SECOND);
    // Nobody says it again: back to the long waits.
    bench.pass(3 * SECOND);
    let attempt = bench.start(1).remove(0);
    bench.fail(&attempt, denied);
    assert_eq!(bench.until_due(), 150 * SECOND);
}

#[test]
fn a_renewal_that_fails_keeps_the_certificate_and_is_tried_more_often_towards_its_end() {
    let mut bench = Bench::new(&["web"]);
    bench.serve(HOUR);
    let held = bench.slots.status()[0].certificate.clone().unwrap();
    let mut attempts = 0;
    while bench.now.steady < held.ends - SECOND {
        bench.pass(bench.until_due());
        assert!(bench.slots.expire(bench.now).is_empty());
        if let Some(attempt) = bench.start(1).first() {
            bench.fail(attempt, denied);
            attempts += 1;
            let left = held.ends.saturating_duration_since(bench.now.steady);
            assert!(bench.until_due() <= (left / 4).max(SECOND), "{left:?} left");
        }
        let status = &bench.slots.status()[0];
        assert_eq!(status.state, IdentityState::Available);
        assert!(Arc::ptr_eq(status.certificate.as_ref().unwrap(), &held));
    }
    assert!((20..60).contains(&attempts), "{attempts}");
    bench.pass(SECOND);
    assert_eq!(bench.slots.expire(bench.now), [id("web")]);
    let status = &bench.slots.status()[0];
    let at = held.not_after;
    assert_eq!(status.state, IdentityState::Expired { at });
    assert_eq!(status.last_error.as_ref().unwrap().code, "ca_denied");
}

#[test]
fn half_of_a_life_counts_from_now_and_not_from_before() {
    let mut bench = Bench::new(&["web"]);
    let attempt = bench.start(1).remove(0);
    let mut issued = certificate(&attempt.identity, bench.now, HOUR);
    issued.not_before = bench.now.wall - HOUR;
    bench.slots.finish(&attempt, Ok(issued), bench.now, MIDDLE);
    assert_eq!(bench.until_due(), HOUR / 2);
}

#[test]
fn a_clock_that_is_behind_does_not_make_lives_longer() {
    let (mut slots, now) = (CertStore::new(20 * SECOND), start());
    slots.want(&ids(&["web"]), now);
    let attempt = slots.start(now, 1).remove(0);
    // Issued for 20 seconds by somebody whose clock shows five minutes more.
    let issued = certificate(&attempt.identity, now, 320 * SECOND);
    slots.finish(&attempt, Ok(issued), now, MIDDLE);
    assert_eq!(slots.next(now, true), Some(now.steady + 10 * SECOND));
}

#[test]
fn setting_the_clock_by_five_minutes_ends_no_certificate_and_moves_no_renewal() {
    for forward in [true, false] {
        let mut bench = Bench::new(&["web"]);
        bench.serve(4 * 60 * SECOND);
        bench.pass(60 * SECOND);
        let skew = SKEW - SECOND;
        bench.now.wall = match forward {
            true => bench.now.wall + skew,
            false => bench.now.wall - skew,
        };
        assert!(
            bench.slots.expire(bench.now).is_empty(),
            "forward: {forward}"
        );
        assert_eq!(bench.until_due(), 60 * SECOND, "forward: {forward}");
    }
}

#[test]
fn a_machine_that_slept_for_long_has_no_certificate_any_more_and_asks_at_once() {
    let mut bench = Bench::new(&["web"]);
    bench.serve(HOUR);
    bench.now.wall += 5 * HOUR;
    assert_eq!(bench.slots.expire(bench.now), [id("web")]);
    assert_eq!(bench.started(1), ["web"]);
}

#[test]
fn in_an_outage_one_attempt_at_a_time_feels_for_its_end_and_then_all_go_on() {
    let names: Vec<String> = (0..100).map(|i| format!("sa{i:03}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut bench = Bench::new(&names);
    for attempt in bench.start(8) {
        bench.fail(&attempt, down);
    }
    let mut attempts = 0;
    for _ in 0..400 {
        bench.pass(SECOND / 10);
        for name in &names {
            bench
                .slots
                .prioritize(&id(name), Priority::Connection, bench.now);
        }
        for attempt in bench.start(8) {
            attempts += 1;
            bench.fail(&attempt, down);
        }
    }
    assert!((70..=81).contains(&attempts), "two a second: {attempts}");
    // It is back. Whoever is asked for next ends the outage.
    let back = bench.now;
    let mut recovered = false;
    while bench
        .slots
        .status()
        .iter()
        .any(|one| one.certificate.is_none())
    {
        bench.pass(SECOND / 100);
        let attempts = bench.start(8);
        assert!(attempts.len() <= if recovered { 8 } else { 1 });
        for attempt in attempts {
            recovered |= bench.succeed(&attempt, HOUR).recovered;
        }
    }
    let took = bench.now.steady - back.steady;
    assert!(took <= 2 * SECOND, "{took:?}");
}

#[test]
fn a_refusal_is_an_answer_and_ends_an_outage() {
    let names: Vec<String> = (0..9).map(|i| format!("sa{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut bench = Bench::new(&names);
    for attempt in bench.start(8) {
        bench.fail(&attempt, down);
    }
    bench.pass(SECOND);
    let attempt = bench.start(8).remove(0);
    assert!(bench.fail(&attempt, denied).recovered);
}

#[test]
fn those_that_still_have_a_certificate_come_back_spread_out() {
    let names: Vec<String> = (0..50).map(|i| format!("sa{i:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut bench = Bench::new(&names);
    bench.serve(HOUR);
    bench.pass(HOUR / 2);
    while bench
        .slots
        .status()
        .iter()
        .any(|one| one.last_error.is_none())
    {
        for attempt in bench.start(8) {
            bench.fail(&attempt, down);
        }
        bench.pass(SECOND / 2);
    }
    let mut dice = fastrand::Rng::with_seed(7);
    bench.pass(10 * SECOND);
    let probe = bench.start(1).remove(0);
    let issued = certificate(&probe.identity, bench.now, HOUR);
    bench
        .slots
        .finish(&probe, Ok(issued), bench.now, || dice.f64());
    let mut most = 0;
    for _ in 0..300 {
        bench.pass(SECOND / 10);
        let started = bench.start(50);
        most = most.max(started.len());
        for attempt in started {
            bench.succeed(&attempt, HOUR);
        }
    }
    assert!(
        bench
            .slots
            .status()
            .iter()
            .all(|one| one.last_error.is_none())
    );
    assert!(most < 25, "{most} at once");
}

#[test]
fn a_rotation_is_fetched_at_once_also_when_an_attempt_was_under_way() {
    let mut bench = Bench::new(&["web"]);
    bench.serve(HOUR);
    bench.slots.rotated(&id("web"), bench.now);
    let attempt = bench.start(1).remove(0);
    bench.slots.rotated(&id("web"), bench.now);
    bench.succeed(&attempt, HOUR);
    assert_eq!(bench.started(1), ["web"], "what came may be the one before");
}

#[test]
fn a_certificate_that_does_not_chain_to_the_new_bundle_is_replaced_within_a_second() {
    let mut bench = Bench::new(&["web"]);
    bench.serve(HOUR);
    bench
        .slots
        .trust(&TrustBundle::default(), bench.now, || 1.0);
    assert_eq!(bench.until_due(), SECOND);
    let status = &bench.slots.status()[0];
    assert_eq!(
        status.state,
        IdentityState::Available,
        "and serves until then"
    );
}

#[test]
fn an_attempt_that_was_given_up_has_no_outcome() {
    let mut bench = Bench::new(&["web"]);
    let first = bench.start(1).remove(0);
    bench.slots.want(&ids(&[]), bench.now);
    bench.slots.want(&ids(&["web"]), bench.now);
    assert!(!bench.slots.awaits(&first));
    let second = bench.start(1).remove(0);
    let issued = certificate(&first.identity, bench.now, HOUR);
    assert_eq!(
        bench.slots.finish(&first, Ok(issued), bench.now, MIDDLE),
        None
    );
    assert!(bench.slots.status()[0].certificate.is_none());
    bench.slots.give_up(&second, bench.now);
    assert_eq!(bench.started(1), ["web"]);
}

#[test]
fn the_certificate_that_there_is_already_is_no_renewal_and_makes_no_haste() {
    let mut bench = Bench::new(&["web"]);
    let begun = bench.now;
    let issued = || Certificate {
        chain: vec![vec![0x30, 0x00].into()],
        ..certificate(&id("web"), begun, HOUR)
    };
    let finish = |bench: &mut Bench| {
        let attempt = bench.start(1).remove(0);
        let finished = bench
            .slots
            .finish(&attempt, Ok(issued()), bench.now, MIDDLE);
        finished.unwrap().got
    };
    assert_eq!(finish(&mut bench), Some(Got::First));
    let held = bench.slots.status()[0].certificate.clone().unwrap();
    let mut asked = 0;
    while bench.now.steady < begun.steady + HOUR - Duration::from_secs(60) {
        bench.pass(bench.until_due());
        assert_eq!(finish(&mut bench), Some(Got::Same));
        asked += 1;
    }
    assert!(asked < 10, "asked {asked} times in the hour");
    let kept = bench.slots.status()[0].certificate.clone().unwrap();
    assert!(
        std::sync::Arc::ptr_eq(&held, &kept),
        "nothing is built again"
    );
    // And each second at the most towards the end.
    bench.pass(bench.until_due());
    assert_eq!(finish(&mut bench), Some(Got::Same));
    assert!(bench.until_due() >= Duration::from_secs(1));
}
