//! What policies cost.
//!
//! `cargo bench -p benches` tells all of it. `cargo bench -p benches -- only CASE COUNT` does one
//! case so many times and tells nothing, for a profiler or an instruction counter. The cases are
//! `none` (a cluster without policies), `unselected`, and `selected-1`, `selected-10` and
//! `selected-100`, by so many policies.
#![expect(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has nothing to tell"
)]

use std::hint::black_box;
use std::time::Instant;

use benches::cluster::{
    CLIENT, POLICIES, Pod, Policies, SELECTED_BY, STRANGER, UNSELECTED, WORKLOADS, manifests,
    objects, one_more, params,
};
use benches::connection::Connection;
use benches::{Contender, Times, race};
use mesh::objects::parse;
use mesh::{Store, compile};

const ROUNDS: usize = 301;
const OPERATIONS: u32 = 10_000;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    match (
        arguments.next().as_deref(),
        arguments.next(),
        arguments.next(),
    ) {
        (None, ..) => tell_all(),
        (Some("only"), Some(case), Some(count)) => only(&case, &count),
        _ => {
            eprintln!("usage: policy [only CASE COUNT]");
            std::process::exit(64);
        }
    }
}

fn tell_all() {
    println!("{WORKLOADS} workloads, {POLICIES} policies, {UNSELECTED} workloads selected by none");
    let none = built("without policies", Policies::None);
    // What it differs by from the first tells what a difference is worth.
    let control = built("without policies, a second time", Policies::None);
    for (kind, policies) in [
        ("AuthorizationPolicy", Policies::Authorization),
        ("NetworkPolicy", Policies::Network),
    ] {
        let with = built(kind, policies);
        println!(
            "\n{kind}: a new connection (model, both workloads, policies), {ROUNDS} rounds of {OPERATIONS}"
        );
        let contenders = contenders(&none, &control, &with);
        table(&race(contenders, ROUNDS, OPERATIONS));
        println!();
    }
}

fn contenders<'a>(none: &'a Store, control: &'a Store, with: &'a Store) -> Vec<Contender<'a>> {
    let mut contenders = vec![
        unselected("no policy in the cluster", none),
        unselected("no policy, another cluster", control),
        unselected("selected by none", with),
    ];
    for (n, count) in SELECTED_BY.into_iter().enumerate() {
        contenders.push(contender(
            &format!("selected by {count}, the last admits"),
            with,
            vec![Connection::new(with, CLIENT, Pod(n))],
        ));
        contenders.push(contender(
            &format!("selected by {count}, none admits"),
            with,
            vec![Connection::new(with, STRANGER, Pod(n))],
        ));
    }
    contenders
}

fn unselected<'a>(name: &str, store: &'a Store) -> Contender<'a> {
    let connect = |to| Connection::new(store, CLIENT, to);
    contender(name, store, Pod::unselected().map(connect).collect())
}

fn contender<'a>(name: &str, store: &'a Store, connections: Vec<Connection>) -> Contender<'a> {
    let mut next = 0;
    Contender::new(name, move || {
        black_box(connections[next].is_allowed(store));
        next = (next + 1) % connections.len();
    })
}

fn table(times: &[Times]) {
    let first = times[0].median();
    for time in times {
        println!(
            "  {:<34} {:>7.1} ns  (half of the rounds {:.1} to {:.1})  x{:.2}",
            time.name,
            time.median(),
            time.lower_quartile(),
            time.upper_quartile(),
            time.median() / first,
        );
    }
}

/// Builds the cluster and tells how long each step took: the first time, when every policy is read,
/// and again, as after a change of one object.
fn built(name: &str, policies: Policies) -> Store {
    let manifests = manifests(policies);
    let megabytes = manifests.len() as f64 / 1e6;
    println!("{name}: {megabytes:.1} MB of manifests");
    let objects = timed("parse", || objects(&manifests));
    let store = Store::new();
    for (compiling, applying) in [
        ("compile, all policies new", "apply to the empty store"),
        ("compile again", "apply, nothing changed"),
    ] {
        let (model, problems) = timed(compiling, || compile(&objects, &params()));
        timed(applying, || store.apply(model, problems));
    }
    if let Some(policy) = one_more(policies) {
        let more = parse(&"more.yaml".into(), policy.as_bytes());
        let mut objects = objects;
        for (object, origin) in more.objects {
            objects.insert(object, origin);
        }
        let (model, problems) = timed("compile, one policy more", || compile(&objects, &params()));
        timed("apply, one policy more", || store.apply(model, problems));
    }
    store
}

fn timed<T>(step: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    println!(
        "  {step:<34} {:>7.1} ms",
        start.elapsed().as_secs_f64() * 1e3
    );
    result
}

fn only(case: &str, count: &str) {
    let count: u32 = count.parse().expect("COUNT is a number");
    let policies = match case {
        "none" => Policies::None,
        _ => Policies::Authorization,
    };
    let (model, problems) = compile(&objects(&manifests(policies)), &params());
    let store = Store::new();
    store.apply(model, problems);
    let to = match case.strip_prefix("selected-") {
        None => Pod(WORKLOADS - 1),
        Some(by) => {
            let by = SELECTED_BY.iter().position(|count| count.to_string() == by);
            Pod(by.expect("a CASE that there is"))
        }
    };
    let connection = Connection::new(&store, CLIENT, to);
    for _ in 0..count {
        black_box(connection.is_allowed(&store));
    }
}
