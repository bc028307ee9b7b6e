//! Policies cost nothing for workloads that they do not select, and no decision allocates.

use std::hint::black_box;

use benches::cluster::{CLIENT, OTHER_CLIENT, Pod, Policies, manifests, objects, params};
use benches::connection::Connection;
use benches::{Case, measure};
use mesh::{Store, compile};

fn store(policies: Policies) -> Store {
    let (model, problems) = compile(&objects(&manifests(policies)), &params());
    assert!(problems.is_empty(), "{:?}", problems.first());
    let store = Store::new();
    store.apply(model, problems);
    store
}

/// Connections to all pods that no policy selects.
fn to_unselected(store: &Store) -> Vec<Connection> {
    let connect = |to| Connection::new(store, CLIENT, to);
    Pod::unselected().map(connect).collect()
}

fn allocations(connection: &Connection, store: &Store) -> u64 {
    // The first load of a thread allocates its slot in the store.
    connection.is_allowed(store);
    let counted = allocation_counter::measure(|| {
        black_box(connection.is_allowed(store));
    });
    counted.count_total
}

#[test]
fn authorization_does_not_allocate() {
    for policies in [Policies::None, Policies::Authorization, Policies::Network] {
        let store = store(policies);
        let selected = (0..benches::cluster::SELECTED_BY.len()).map(Pod);
        for to in selected.chain(Pod::unselected().take(1)) {
            for from in [CLIENT, OTHER_CLIENT] {
                let connection = Connection::new(&store, from, to);
                let count = allocations(&connection, &store);
                assert_eq!(count, 0, "{policies:?}, {from:?} to {to:?}");
            }
        }
    }
}

#[test]
fn allocation_counter_counts_allocations() {
    let counted = allocation_counter::measure(|| drop(black_box(vec![1_u8; 100])));
    assert_eq!(counted.count_total, 1);
}

#[test]
fn policies_of_a_selected_workload_are_evaluated() {
    for policies in [Policies::Authorization, Policies::Network] {
        let store = store(policies);
        for to in (0..benches::cluster::SELECTED_BY.len()).map(Pod) {
            assert!(Connection::new(&store, CLIENT, to).is_allowed(&store));
            assert!(!Connection::new(&store, OTHER_CLIENT, to).is_allowed(&store));
        }
    }
}

#[test]
fn unselected_workloads_have_no_policies() {
    for policies in [Policies::Authorization, Policies::Network] {
        let store = store(policies);
        let model = store.load();
        for pod in Pod::unselected() {
            assert!(pod.workload(&model).policies.is_empty(), "{pod:?}");
        }
        assert!(!CLIENT.workload(&model).policies.is_empty());
    }
}

/// The bound is generous because other tests run at the same time. A scan of all policies would be
/// slower by a factor of thousands.
#[test]
fn policies_of_other_workloads_do_not_slow_down_a_connection() {
    let stores = [Policies::None, Policies::Authorization].map(store);
    let connections = stores.each_ref().map(to_unselected);
    let mut cases = Vec::new();
    for (store, connections) in stores.iter().zip(&connections) {
        let mut next = connections.iter().cycle();
        cases.push(Case::new("", move || {
            let connection = next.next().expect("the iterator is endless");
            assert!(black_box(connection.is_allowed(store)));
        }));
    }
    let times = measure(cases, 201, 500);
    let ratio = times[1].median() / times[0].median();
    assert!(
        ratio < 1.5,
        "{ratio:.2} times as slow as without policies: {:.0} ns instead of {:.0} ns",
        times[1].median(),
        times[0].median()
    );
}
