//! A workload that no policy selects does not pay for those of the others; and asking costs no
//! allocation, whatever the answer.

use std::hint::black_box;

use benches::cluster::{CLIENT, Pod, Policies, STRANGER, manifests, objects, params};
use benches::connection::Connection;
use benches::{Contender, race};
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
    // The first look of a thread at the store makes its own place there.
    connection.is_allowed(store);
    let counted = allocation_counter::measure(|| {
        black_box(connection.is_allowed(store));
    });
    counted.count_total
}

#[test]
fn to_ask_whether_a_connection_is_allowed_allocates_nothing() {
    for policies in [Policies::None, Policies::Authorization, Policies::Network] {
        let store = store(policies);
        let selected = (0..benches::cluster::SELECTED_BY.len()).map(Pod);
        for to in selected.chain(Pod::unselected().take(1)) {
            for from in [CLIENT, STRANGER] {
                let connection = Connection::new(&store, from, to);
                let count = allocations(&connection, &store);
                assert_eq!(count, 0, "{policies:?}, {from:?} to {to:?}");
            }
        }
    }
}

#[test]
fn the_counter_of_allocations_counts() {
    let counted = allocation_counter::measure(|| drop(black_box(vec![1_u8; 100])));
    assert_eq!(counted.count_total, 1);
}

#[test]
fn a_selected_workload_asks_its_policies() {
    for policies in [Policies::Authorization, Policies::Network] {
        let store = store(policies);
        for to in (0..benches::cluster::SELECTED_BY.len()).map(Pod) {
            assert!(Connection::new(&store, CLIENT, to).is_allowed(&store));
            assert!(!Connection::new(&store, STRANGER, to).is_allowed(&store));
        }
    }
}

#[test]
fn a_workload_that_no_policy_selects_has_none_to_look_at() {
    for policies in [Policies::Authorization, Policies::Network] {
        let store = store(policies);
        let model = store.load();
        for pod in Pod::unselected() {
            assert!(pod.workload(&model).policies.is_empty(), "{pod:?}");
        }
        assert!(!CLIENT.workload(&model).policies.is_empty());
    }
}

/// The bound is generous because other tests run beside it; what costs one look at each policy
/// would be slower by a factor of thousands.
#[test]
fn ten_thousand_policies_do_not_slow_down_a_connection_that_none_concerns() {
    let stores = [Policies::None, Policies::Authorization].map(store);
    let connections = stores.each_ref().map(to_unselected);
    let mut contenders = Vec::new();
    for (store, connections) in stores.iter().zip(&connections) {
        let mut next = connections.iter().cycle();
        contenders.push(Contender::new("", move || {
            let connection = next.next().expect("a cycle has no end");
            assert!(black_box(connection.is_allowed(store)));
        }));
    }
    let times = race(contenders, 201, 500);
    let ratio = times[1].median() / times[0].median();
    assert!(
        ratio < 1.5,
        "{ratio:.2} times as slow as without policies: {:.0} ns instead of {:.0} ns",
        times[1].median(),
        times[0].median()
    );
}
