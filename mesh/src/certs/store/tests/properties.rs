//! Properties that hold for every sequence of events.

use proptest::prelude::*;

use super::*;

/// An event.
#[derive(Clone, Debug)]
enum Step {
    SetIdentities(BTreeSet<u8>),
    Prioritize(u8),
    Update(u8),
    Advance(u64),
    /// The time of day is set to this many seconds after the correct one.
    SetClock(i64),
    Start,
    /// The request with this index among those in flight ends.
    Complete(usize, Outcome),
}

#[derive(Clone, Copy, Debug)]
enum Outcome {
    Issued(u64),
    Unreachable,
    Denied,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let outcome = prop_oneof![
        (1..5_000_u64).prop_map(Outcome::Issued),
        Just(Outcome::Unreachable),
        Just(Outcome::Denied),
    ];
    let step = prop_oneof![
        1 => proptest::collection::btree_set(0..12_u8, 0..12).prop_map(Step::SetIdentities),
        2 => (0..12_u8).prop_map(Step::Prioritize),
        1 => (0..12_u8).prop_map(Step::Update),
        3 => (0..200_000_u64).prop_map(Step::Advance),
        1 => (-149..149_i64).prop_map(Step::SetClock),
        4 => Just(Step::Start),
        6 => (0..8_usize, outcome).prop_map(|(index, outcome)| Step::Complete(index, outcome)),
    ];
    proptest::collection::vec(step, 1..120)
}

fn numbered(number: u8) -> SpiffeId {
    id(&format!("sa{number:02}"))
}

/// The store, and the expected state.
struct Model {
    store: CertStore,
    start_time: Now,
    now: Now,
    random: fastrand::Rng,
    in_flight: Vec<IssueRequest>,
    limit: usize,
    /// When the last certificate of each identity expires.
    expiries: BTreeMap<SpiffeId, Instant>,
    identities: BTreeSet<SpiffeId>,
}

impl Model {
    fn new(limit: usize) -> Self {
        let now = start();
        Self {
            store: CertStore::new(HOUR),
            start_time: now,
            now,
            random: fastrand::Rng::with_seed(1),
            in_flight: vec![],
            limit,
            expiries: BTreeMap::new(),
            identities: BTreeSet::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::SetIdentities(numbers) => {
                self.identities = numbers.into_iter().map(numbered).collect();
                let removed = self.store.set_identities(&self.identities, self.now);
                assert!(removed.iter().all(|one| !self.identities.contains(one)));
                self.expiries
                    .retain(|identity, _| self.identities.contains(identity));
            }
            Step::Prioritize(number) => {
                let priority = [Priority::Pod, Priority::Connection][usize::from(number % 2)];
                self.store.prioritize(&numbered(number), priority, self.now);
            }
            Step::Update(number) => self.store.request_update(&numbered(number), self.now),
            Step::Advance(millis) => self.now = self.now.after(Duration::from_millis(millis)),
            Step::SetClock(seconds) => {
                let correct =
                    self.start_time.wall + (self.now.monotonic - self.start_time.monotonic);
                let by = Duration::from_secs(seconds.unsigned_abs());
                self.now.wall = if seconds < 0 {
                    correct - by
                } else {
                    correct + by
                };
            }
            Step::Start => self.start(),
            Step::Complete(index, outcome) => self.complete(index, outcome),
        }
        self.store.remove_expired(self.now);
        self.check();
    }

    fn start(&mut self) {
        let free = self.limit - self.in_flight.len();
        let started = self.store.start_due(self.now, free);
        assert!(started.len() <= free, "more requests than the limit");
        for request in &started {
            assert!(self.identities.contains(&request.identity));
            let is_duplicate = |other: &IssueRequest| {
                other.identity == request.identity && self.store.is_in_flight(other)
            };
            assert!(
                !self.in_flight.iter().any(is_duplicate),
                "two requests in flight for one identity"
            );
        }
        self.in_flight.extend(started);
    }

    fn complete(&mut self, index: usize, outcome: Outcome) {
        if self.in_flight.is_empty() {
            return;
        }
        let request = self.in_flight.remove(index % self.in_flight.len());
        let is_needed = self.store.is_in_flight(&request);
        let identity = &request.identity;
        let outcome = match outcome {
            Outcome::Issued(lifetime) => {
                let lifetime = Duration::from_secs(lifetime);
                if is_needed {
                    self.expiries
                        .insert(identity.clone(), self.now.monotonic + lifetime);
                }
                Ok(certificate(identity, self.now, lifetime))
            }
            Outcome::Unreachable => Err(unreachable(identity)),
            Outcome::Denied => Err(denied(identity)),
        };
        let random = &mut self.random;
        self.store
            .complete(&request, outcome, self.now, || random.f64());
    }

    /// Every identity still has its certificate until it expires on the monotonic clock.
    fn check(&self) {
        for status in self.store.status() {
            let has_certificate = status.certificate.is_some();
            let expiry = self.expiries.get(&status.identity);
            if expiry.is_some_and(|expiry| *expiry > self.now.monotonic) {
                assert!(
                    has_certificate,
                    "{} lost a valid certificate",
                    status.identity
                );
            }
        }
        assert!(self.store.status().len() == self.identities.len());
    }

    /// Every identity is requested, although the source fails and others have priority.
    fn check_every_identity_is_requested(&mut self, prioritized: &[u8]) {
        let mut waiting = self.identities.clone();
        for identity in &self.identities {
            self.store.request_update(identity, self.now);
        }
        for tick in 0..5_000_u32 {
            self.step(Step::Advance(100));
            prioritized
                .iter()
                .for_each(|number| self.step(Step::Prioritize(*number)));
            self.step(Step::Start);
            for request in &self.in_flight {
                waiting.remove(&request.identity);
            }
            if waiting.is_empty() {
                return;
            }
            if tick % 3 == 0 {
                self.step(Step::Complete(0, Outcome::Unreachable));
            }
        }
        panic!("never requested: {waiting:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn limits_hold_valid_certificates_stay_and_every_identity_is_requested(
        steps in steps(),
        limit in 1..8_usize,
        prioritized in proptest::collection::vec(0..12_u8, 0..12),
    ) {
        let mut model = Model::new(limit);
        for step in steps {
            model.step(step);
        }
        model.check_every_identity_is_requested(&prioritized);
    }
}
