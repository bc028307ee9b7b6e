//! Contenders that take turns.

use std::time::{Duration, Instant};

/// Something whose cost is compared.
pub struct Contender<'a> {
    name: String,
    operation: Box<dyn FnMut() + 'a>,
}

impl<'a> Contender<'a> {
    /// Something to be done over and over again.
    pub fn new(name: impl Into<String>, operation: impl FnMut() + 'a) -> Self {
        Self {
            name: name.into(),
            operation: Box::new(operation),
        }
    }
}

/// What one operation of a contender took, over all rounds.
#[derive(Clone, Debug)]
pub struct Times {
    /// Name of the contender.
    pub name: String,
    sorted: Vec<f64>,
}

impl Times {
    /// Nanoseconds per operation in the round in the middle.
    pub fn median(&self) -> f64 {
        self.sorted[self.sorted.len() / 2]
    }

    /// Nanoseconds per operation in the round that a quarter of all rounds did not reach.
    pub fn lower_quartile(&self) -> f64 {
        self.sorted[self.sorted.len() / 4]
    }

    /// Nanoseconds per operation in the round that a quarter of all rounds exceeded.
    pub fn upper_quartile(&self) -> f64 {
        self.sorted[self.sorted.len() * 3 / 4]
    }
}

/// Lets the contenders take turns: in each round each of them does `operations`, and the one that
/// begins is another one each time, so that a disturbance hits all of them alike. The first round
/// warms up and does not count.
///
/// # Panics
///
/// Without rounds there is nothing to tell.
pub fn race(mut contenders: Vec<Contender<'_>>, rounds: usize, operations: u32) -> Vec<Times> {
    assert!(rounds > 0, "no rounds");
    let mut times: Vec<Vec<f64>> = vec![Vec::with_capacity(rounds); contenders.len()];
    for round in 0..=rounds {
        for turn in 0..contenders.len() {
            let who = (round + turn) % contenders.len();
            let took = run(&mut contenders[who], operations);
            if round > 0 {
                times[who].push(took.as_secs_f64() * 1e9 / f64::from(operations));
            }
        }
    }
    let sort = |mut times: Vec<f64>| {
        times.sort_unstable_by(f64::total_cmp);
        times
    };
    let names = contenders.into_iter().map(|contender| contender.name);
    let times = names.zip(times.into_iter().map(sort));
    times.map(|(name, sorted)| Times { name, sorted }).collect()
}

fn run(contender: &mut Contender<'_>, operations: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..operations {
        (contender.operation)();
    }
    start.elapsed()
}
