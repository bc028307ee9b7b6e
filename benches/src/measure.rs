//! How the costs of several cases are compared: they run in turns, many times.

use std::time::{Duration, Instant};

/// An operation whose cost is compared with that of others.
pub struct Case<'a> {
    name: String,
    operation: Box<dyn FnMut() + 'a>,
}

impl<'a> Case<'a> {
    /// A case that runs `operation`.
    pub fn new(name: impl Into<String>, operation: impl FnMut() + 'a) -> Self {
        Self {
            name: name.into(),
            operation: Box::new(operation),
        }
    }
}

/// Time per operation of a case, in each round.
#[derive(Clone, Debug)]
pub struct Times {
    /// Name of the case.
    pub name: String,
    /// Nanoseconds per operation.
    sorted: Vec<f64>,
}

impl Times {
    /// Nanoseconds per operation, median of all rounds.
    pub fn median(&self) -> f64 {
        self.sorted[self.sorted.len() / 2]
    }

    /// Nanoseconds per operation, lower quartile of all rounds.
    pub fn lower_quartile(&self) -> f64 {
        self.sorted[self.sorted.len() / 4]
    }

    /// Nanoseconds per operation, upper quartile of all rounds.
    pub fn upper_quartile(&self) -> f64 {
        self.sorted[self.sorted.len() * 3 / 4]
    }
}

/// Runs the cases in turns: `operations` of each in every round. Each round starts with another case,
/// so that a disturbance affects all of them alike. An additional first round warms up and does not
/// count.
///
/// # Panics
///
/// If `rounds` is 0.
pub fn measure(mut cases: Vec<Case<'_>>, rounds: usize, operations: u32) -> Vec<Times> {
    assert!(rounds > 0, "at least one round is needed");
    let mut times: Vec<Vec<f64>> = vec![Vec::with_capacity(rounds); cases.len()];
    for round in 0..=rounds {
        for turn in 0..cases.len() {
            let index = (round + turn) % cases.len();
            let duration = run(&mut cases[index], operations);
            if round > 0 {
                times[index].push(duration.as_secs_f64() * 1e9 / f64::from(operations));
            }
        }
    }
    let sort = |mut times: Vec<f64>| {
        times.sort_unstable_by(f64::total_cmp);
        times
    };
    let names = cases.into_iter().map(|case| case.name);
    let times = names.zip(times.into_iter().map(sort));
    times.map(|(name, sorted)| Times { name, sorted }).collect()
}

fn run(case: &mut Case<'_>, operations: u32) -> Duration {
    let start = Instant::now();
    for _ in 0..operations {
        (case.operation)();
    }
    start.elapsed()
}
