//! The cost of policies: for a new connection, and of compiling them.
//!
//! `cargo bench -p benches` prints everything. `cargo bench -p benches -- only CASE COUNT` runs one
//! case COUNT times and prints nothing, for a profiler or an instruction counter. Cases: `none` (a
//! cluster without policies), `unselected` (by any policy), and `selected-1`, `selected-10`,
//! `selected-100` (by that many policies).
#![expect(
    clippy::expect_used,
    reason = "a benchmark that cannot be set up has no result"
)]

use std::hint::black_box;
use std::time::Instant;

use benches::cluster::{
    CLIENT, OTHER_CLIENT, POLICIES, Pod, Policies, SELECTED_BY, UNSELECTED, WORKLOADS,
    additional_policy, manifests, objects, params,
};
use benches::connection::Connection;
use benches::{Case, Times, measure};
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
        (None, ..) => run_all(),
        (Some("only"), Some(case), Some(count)) => run_one(&case, &count),
        _ => {
            eprintln!("usage: policy [only CASE COUNT]");
            std::process::exit(64);
        }
    }
}

fn run_all() {
    println!("{WORKLOADS} workloads, {POLICIES} policies, {UNSELECTED} workloads selected by none");
    let none = build("without policies", Policies::None);
    // The difference between two equal clusters is the error of the measurement.
    let control = build("without policies, a second time", Policies::None);
    for (kind, policies) in [
        ("AuthorizationPolicy", Policies::Authorization),
        ("NetworkPolicy", Policies::Network),
    ] {
        let with = build(kind, policies);
        println!(
            "\n{kind}: a new connection (model, both workloads, policies), {ROUNDS} rounds of {OPERATIONS}"
        );
        let cases = cases(&none, &control, &with);
        print_table(&measure(cases, ROUNDS, OPERATIONS));
        println!();
    }
}

fn cases<'a>(none: &'a Store, control: &'a Store, with: &'a Store) -> Vec<Case<'a>> {
    let mut cases = vec![
        unselected("no policy in the cluster", none),
        unselected("no policy, another cluster", control),
        unselected("selected by none", with),
    ];
    for (n, count) in SELECTED_BY.into_iter().enumerate() {
        cases.push(case(
            &format!("selected by {count}, the last admits"),
            with,
            vec![Connection::new(with, CLIENT, Pod(n))],
        ));
        cases.push(case(
            &format!("selected by {count}, none admits"),
            with,
            vec![Connection::new(with, OTHER_CLIENT, Pod(n))],
        ));
    }
    cases
}

fn unselected<'a>(name: &str, store: &'a Store) -> Case<'a> {
    let connect = |to| Connection::new(store, CLIENT, to);
    case(name, store, Pod::unselected().map(connect).collect())
}

fn case<'a>(name: &str, store: &'a Store, connections: Vec<Connection>) -> Case<'a> {
    let mut next = 0;
    Case::new(name, move || {
        black_box(connections[next].is_allowed(store));
        next = (next + 1) % connections.len();
    })
}

fn print_table(times: &[Times]) {
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

/// Builds the cluster and prints the time of each step: the first time, when every policy is read,
/// and again, as after a change of one object.
fn build(name: &str, policies: Policies) -> Store {
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
    if let Some(policy) = additional_policy(policies) {
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

fn run_one(case: &str, count: &str) {
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
            Pod(by.expect("CASE is one of those in the module documentation"))
        }
    };
    let connection = Connection::new(&store, CLIENT, to);
    for _ in 0..count {
        black_box(connection.is_allowed(&store));
    }
}
