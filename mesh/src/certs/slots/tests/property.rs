//! Whatever happens.

use proptest::prelude::*;

use super::*;

/// Something that happens to the slots.
#[derive(Clone, Debug)]
enum Step {
    Want(BTreeSet<u8>),
    Priority(u8),
    Rotate(u8),
    Pass(u64),
    /// The time of day is set, to so many seconds from what is right.
    Set(i64),
    Start,
    /// The attempt of this number among those under way ends.
    Finish(usize, Outcome),
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Issued(u64),
    Down,
    Denied,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let outcome = prop_oneof![
        (1..5_000_u64).prop_map(Outcome::Issued),
        Just(Outcome::Down),
        Just(Outcome::Denied),
    ];
    let step = prop_oneof![
        1 => proptest::collection::btree_set(0..12_u8, 0..12).prop_map(Step::Want),
        2 => (0..12_u8).prop_map(Step::Priority),
        1 => (0..12_u8).prop_map(Step::Rotate),
        3 => (0..200_000_u64).prop_map(Step::Pass),
        1 => (-149..149_i64).prop_map(Step::Set),
        4 => Just(Step::Start),
        6 => (0..8_usize, outcome).prop_map(|(which, outcome)| Step::Finish(which, outcome)),
    ];
    proptest::collection::vec(step, 1..120)
}

fn numbered(number: u8) -> SpiffeId {
    id(&format!("sa{number:02}"))
}

/// The slots, and what is known about them from outside.
struct Model {
    slots: CertStore,
    began: Now,
    now: Now,
    dice: fastrand::Rng,
    under_way: Vec<Attempt>,
    limit: usize,
    /// The certificates that were issued last, and not forgotten.
    issued: BTreeMap<SpiffeId, Instant>,
    wanted: BTreeSet<SpiffeId>,
}

impl Model {
    fn new(limit: usize) -> Self {
        let now = start();
        Self {
            slots: CertStore::new(HOUR),
            began: now,
            now,
            dice: fastrand::Rng::with_seed(1),
            under_way: vec![],
            limit,
            issued: BTreeMap::new(),
            wanted: BTreeSet::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Want(numbers) => {
                self.wanted = numbers.into_iter().map(numbered).collect();
                let gone = self.slots.want(&self.wanted, self.now);
                assert!(gone.iter().all(|one| !self.wanted.contains(one)));
                self.issued
                    .retain(|identity, _| self.wanted.contains(identity));
            }
            Step::Priority(number) => {
                let need = [Priority::Pod, Priority::Connection][usize::from(number % 2)];
                self.slots.prioritize(&numbered(number), need, self.now);
            }
            Step::Rotate(number) => self.slots.rotated(&numbered(number), self.now),
            Step::Pass(millis) => self.now = self.now.after(Duration::from_millis(millis)),
            Step::Set(seconds) => {
                let right = self.began.wall + (self.now.steady - self.began.steady);
                let by = Duration::from_secs(seconds.unsigned_abs());
                self.now.wall = if seconds < 0 { right - by } else { right + by };
            }
            Step::Start => self.start(),
            Step::Finish(which, outcome) => self.finish(which, outcome),
        }
        self.slots.expire(self.now);
        self.check();
    }

    fn start(&mut self) {
        let free = self.limit - self.under_way.len();
        let started = self.slots.start(self.now, free);
        assert!(started.len() <= free, "more than there are places");
        for attempt in &started {
            assert!(self.wanted.contains(&attempt.identity));
            let twice =
                |other: &Attempt| other.identity == attempt.identity && self.slots.awaits(other);
            assert!(!self.under_way.iter().any(twice), "two for one identity");
        }
        self.under_way.extend(started);
    }

    fn finish(&mut self, which: usize, outcome: Outcome) {
        if self.under_way.is_empty() {
            return;
        }
        let attempt = self.under_way.remove(which % self.under_way.len());
        let awaited = self.slots.awaits(&attempt);
        let identity = &attempt.identity;
        let outcome = match outcome {
            Outcome::Issued(life) => {
                let life = Duration::from_secs(life);
                if awaited {
                    self.issued.insert(identity.clone(), self.now.steady + life);
                }
                Ok(certificate(identity, self.now, life))
            }
            Outcome::Down => Err(down(identity)),
            Outcome::Denied => Err(denied(identity)),
        };
        let dice = &mut self.dice;
        self.slots
            .finish(&attempt, outcome, self.now, || dice.f64());
    }

    /// Nothing that was issued, is wanted and is still valid by the clock that only runs is missing.
    fn check(&self) {
        for status in self.slots.status() {
            let held = status.certificate.is_some();
            let ends = self.issued.get(&status.identity);
            if ends.is_some_and(|ends| *ends > self.now.steady) {
                assert!(held, "{} lost a valid certificate", status.identity);
            }
        }
        assert!(self.slots.status().len() == self.wanted.len());
    }

    /// With a source that fails and others in a hurry, is everybody tried?
    fn everybody_is_tried(&mut self, needed: &[u8]) {
        let mut waiting = self.wanted.clone();
        for identity in &self.wanted {
            self.slots.rotated(identity, self.now);
        }
        for tick in 0..5_000_u32 {
            self.step(Step::Pass(100));
            needed
                .iter()
                .for_each(|number| self.step(Step::Priority(*number)));
            self.step(Step::Start);
            for attempt in &self.under_way {
                waiting.remove(&attempt.identity);
            }
            if waiting.is_empty() {
                return;
            }
            if tick % 3 == 0 {
                self.step(Step::Finish(0, Outcome::Down));
            }
        }
        panic!("never tried: {waiting:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn whatever_happens_places_are_kept_valid_certificates_stay_and_everybody_is_tried(
        steps in steps(),
        limit in 1..8_usize,
        needed in proptest::collection::vec(0..12_u8, 0..12),
    ) {
        let mut model = Model::new(limit);
        for step in steps {
            model.step(step);
        }
        model.everybody_is_tried(&needed);
    }
}
