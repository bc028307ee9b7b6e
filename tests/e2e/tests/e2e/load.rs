//! Many connections: all of them work, none hurts another, and nothing of them stays behind.

use std::time::Duration;

use ambit_e2e::tcp::{Path, Running, up};
use ambit_e2e::tcp_load::{
    Echo, Held, LONG_MS, Load, Outcome, THOUSAND, conntrack_failures, conntrack_fill,
};
use lab::{Lab, Options};

/// Files that a daemon may hold more than before any load: its threads that work in pods start when
/// there is much to do, and each keeps its own network namespace open.
const FILES_KEPT: usize = 4;

/// What a daemon may hold in KiB more than before the first load: memory of tunnels that stay open for
/// a while, and what the allocator keeps.
const MEMORY_KEPT_KIB: u64 = 10 * 1024;

/// What it may hold more after the second load than after the first: 350 bytes for each connection
/// would be too much.
const MEMORY_GROWN_KIB: u64 = 4 * 1024;

/// How long the last sockets and idle buffers may take to be given back.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(30);

const WARM_UP: Load = Load::Short {
    connections: 200,
    at_once: 16,
    size: 100,
};
const TEN_THOUSAND: Load = Load::Short {
    connections: 10_000,
    at_once: 64,
    size: 100,
};

#[test]
fn a_thousand_connections_and_ten_thousand_short_ones_work_and_leave_nothing_behind() {
    let lab = up(Options::default()).unwrap();
    let direct = Echo::start(&lab, Path::Direct.server()).unwrap();
    let meshed = Echo::start(&lab, Path::Meshed.server()).unwrap();
    let held = || {
        [("a", Path::Meshed.client()), ("b", Path::Meshed.server())]
            .map(|(node, pod)| Held::by(&lab, node, pod).unwrap())
    };
    // Certificates, tunnels, caches: what a daemon takes once and keeps.
    completes(WARM_UP, &lab, Path::Meshed, &meshed);
    let before = held();
    println!("before {before:?}");
    completes(THOUSAND, &lab, Path::Direct, &direct);
    completes(TEN_THOUSAND, &lab, Path::Direct, &direct);
    let mut bound = before.map(|held| held.rss_kib + MEMORY_KEPT_KIB);
    // Over the other family the second time, because the ports of the first are in TIME_WAIT.
    for path in [Path::Meshed, Path::MeshedV6] {
        completes(THOUSAND, &lab, Path::Meshed, &meshed);
        completes(THOUSAND, &lab, Path::MeshedV6, &meshed);
        println!("right after thousands: {:?}", held());
        completes(TEN_THOUSAND, &lab, path, &meshed);
        println!("right after ten thousand: {:?}", held());
        let back = lab.wait_until(
            "files and memory to be given back",
            GIVEN_BACK_WITHIN,
            || {
                let now = held();
                let back = |((now, before), bound): ((&Held, &Held), &u64)| {
                    now.files <= before.files + FILES_KEPT && now.rss_kib <= *bound
                };
                now.iter().zip(&before).zip(&bound).all(back).then_some(now)
            },
        );
        let now = held();
        assert!(
            back.is_ok(),
            "before {before:?}, memory bound {bound:?} KiB, still {now:?}"
        );
        bound = now.map(|held| held.rss_kib + MEMORY_GROWN_KIB);
        println!("given back: {now:?}");
    }
    for pod in [Path::Meshed.client(), Path::Meshed.server()] {
        assert_eq!(conntrack_failures(&lab, pod).unwrap(), 0, "{pod}");
        let (count, max) = conntrack_fill(&lab, pod).unwrap();
        println!("{pod}: {count} conntrack entries of {max}");
        assert!(count < max / 4, "{pod}: {count} of {max}");
    }
}

fn completes(load: Load, lab: &Lab, path: Path, echo: &Echo) {
    let outcome = load
        .run(lab, path, echo)
        .unwrap_or_else(|error| panic!("{error:#}"));
    println!("{path:?} {load:?}: {outcome:?}");
    all_completed(load, &outcome);
}

fn all_completed(load: Load, outcome: &Outcome) {
    assert_eq!(outcome.errors, "0", "{load:?}: {outcome:?}");
    match load {
        Load::Short { connections, .. }
        | Load::Aborted { connections, .. }
        | Load::Flood { connections } => assert_eq!(outcome.completed, connections),
        Load::Together { connections, .. } => {
            assert_eq!(
                (outcome.completed, outcome.together),
                (connections, connections)
            );
        }
    }
}

fn one_worker() -> Options {
    let daemon_args = vec!["--worker-threads".to_owned(), "1".to_owned()];
    Options {
        daemon_args,
        ..Options::default()
    }
}

/// Opened, sent to and reset faster than anybody looks: HTTP/2 has limits against peers that do that
/// to it, and what one application does must not trip them for all others in its tunnels.
#[test]
fn clients_that_reset_what_they_have_just_sent_do_not_hurt_their_neighbours() {
    neighbours_of(|lab, echo| {
        completes(
            Load::Aborted {
                connections: 5000,
                at_once: 64,
                size: 100,
            },
            lab,
            Path::Meshed,
            echo,
        );
    });
}

/// The server resets while the client sends, so that late bytes arrive at a stream that is no more.
#[test]
fn a_server_that_resets_under_what_it_is_sent_does_not_hurt_its_neighbours() {
    neighbours_of(|lab, _| {
        let rude = Echo::rude(lab, Path::Meshed.server()).unwrap();
        let load = Load::Short {
            connections: 5000,
            at_once: 64,
            size: 200_000,
        };
        let outcome = load.run(lab, Path::Meshed, &rude).unwrap();
        println!("{outcome:?}");
        assert_eq!(outcome.completed, 0);
        // Each was made, came as far as the server, was reset there, and the client was told so.
        assert_eq!(outcome.resets(), 5000, "{outcome:?}");
        lab.wait_until("the server to have reset all", GIVEN_BACK_WITHIN, || {
            (rude.resets() == 5000).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", rude.resets()));
    });
}

/// Runs `load` beside connections that use the same tunnels, which must all work; afterwards nothing
/// of it is left.
fn neighbours_of(load: impl FnOnce(&Lab, &Echo)) {
    let lab = up(one_worker()).unwrap_or_else(|error| panic!("{error:#}"));
    let run = || -> anyhow::Result<()> {
        let echo = Echo::start(&lab, Path::Meshed.server())?;
        let held = || Held::by(&lab, "b", Path::Meshed.server());
        completes(WARM_UP, &lab, Path::Meshed, &echo);
        let before = held()?;
        let neighbours = Load::Together {
            connections: 20,
            exchanges: 1000,
            size: 2000,
        };
        let beside = neighbours.start(&lab, Path::Meshed, &echo)?;
        load(&lab, &echo);
        let beside = Outcome::of(beside)?;
        println!("neighbours {beside:?}");
        all_completed(neighbours, &beside);
        let closed = || (held().ok()?.files <= before.files + FILES_KEPT).then_some(());
        lab.wait_until("all files to be closed", GIVEN_BACK_WITHIN, closed)
    };
    if let Err(error) = run() {
        panic!("{error:#}");
    }
}

/// One stream whose reader stalls under thousands of single bytes, in the one tunnel that it shares
/// with its neighbours: they go on as if it were not there, and it has lost nothing in the end.
#[test]
fn a_reader_that_stalls_under_single_bytes_does_not_hurt_its_neighbours() {
    let lab = up(one_worker()).unwrap();
    let echo = Echo::start(&lab, Path::Meshed.server()).unwrap();
    let neighbours = Load::Together {
        connections: 20,
        exchanges: 200,
        size: 2000,
    };
    let alone = neighbours.run(&lab, Path::Meshed, &echo).unwrap();

    let stalled = ["small_window", "send 10", "hold", "drain", "close"];
    let writer = ["recv 10", "send 256k", "dribble 20000", "shut", "drain"];
    let mut slow = Running::start(&lab, Path::Meshed, &writer, &stalled).unwrap();
    slow.wait_server("holding").unwrap();
    let beside = neighbours.start(&lab, Path::Meshed, &echo).unwrap();
    slow.wait_client("sent 20000").unwrap();
    let beside = Outcome::of(beside).unwrap();
    all_completed(neighbours, &beside);
    let after = neighbours.run(&lab, Path::Meshed, &echo).unwrap();
    all_completed(neighbours, &after);

    slow.release_server().unwrap();
    let seen = slow.finish().unwrap();
    println!("neighbours alone {alone:?}\nbeside {beside:?}\nafter {after:?}");
    assert_eq!(
        seen.server.events[3..],
        ["received 282144 intact", "fin", "closed"]
    );
    assert_eq!(seen.client.events.last().map(String::as_str), Some("fin"));
    assert!(
        beside.slowest_ms < LONG_MS,
        "a neighbour waited: {beside:?}, alone {alone:?}"
    );
}

/// Readers that stop, each behind more than all buffers hold, and neighbours in the same tunnels.
#[test]
fn readers_that_stop_do_not_hurt_their_neighbours() {
    let lab = up(Options::default()).unwrap();
    let echo = Echo::start(&lab, Path::Meshed.server()).unwrap();
    let (writer, reader) = (["overfill 64M", "close"], ["hold", "drain", "close"]);
    let start = |client, server| Running::start(&lab, Path::Meshed, client, server).unwrap();
    let mut uploads: Vec<_> = (0..4).map(|_| start(&writer, &reader)).collect();
    let mut downloads: Vec<_> = (0..4).map(|_| start(&reader, &writer)).collect();
    for (upload, download) in uploads.iter().zip(&downloads) {
        upload.wait_client("blocked").unwrap();
        download.wait_server("blocked").unwrap();
    }
    let neighbours = Load::Together {
        connections: 100,
        exchanges: 50,
        size: 2000,
    };
    let beside = neighbours.run(&lab, Path::Meshed, &echo).unwrap();
    println!("neighbours {beside:?}");
    all_completed(neighbours, &beside);
    assert!(
        beside.slowest_ms < LONG_MS,
        "a neighbour waited: {beside:?}"
    );
    for (upload, download) in uploads.iter_mut().zip(&mut downloads) {
        upload.release_server().unwrap();
        download.release_client().unwrap();
    }
    let everything = ["received 67108864 intact", "fin", "closed"];
    for (upload, download) in uploads.into_iter().zip(downloads) {
        assert_eq!(upload.finish().unwrap().server.events[2..], everything);
        assert_eq!(download.finish().unwrap().client.events[2..], everything);
    }
}

/// What the bytes of one blocked connection may cost a daemon, in KiB.
const BLOCKED_KIB: u64 = 3 * 1024;

#[test]
fn two_hundred_readers_that_stop_cost_bounded_memory_that_is_given_back() {
    const READERS: u32 = 200;
    let lab = up(Options::default()).unwrap();
    let echo = Echo::start(&lab, Path::Meshed.server()).unwrap();
    let deaf = Echo::deaf(&lab, Path::Meshed.server()).unwrap();
    completes(WARM_UP, &lab, Path::Meshed, &echo);
    let held = || {
        [("a", Path::Meshed.client()), ("b", Path::Meshed.server())]
            .map(|(node, pod)| Held::by(&lab, node, pod).unwrap())
    };
    let before = held();
    let flood = Load::Flood {
        connections: READERS,
    }
    .start(&lab, Path::Meshed, &deaf)
    .unwrap();
    flood
        .wait_stdout("blocked", Duration::from_secs(60))
        .unwrap();
    let full = held();
    println!("before {before:?}\nwith {READERS} readers that do not read {full:?}");
    completes(
        Load::Short {
            connections: 500,
            at_once: 16,
            size: 100,
        },
        &lab,
        Path::Meshed,
        &echo,
    );
    for (full, before) in full.iter().zip(&before) {
        assert!(full.rss_kib < before.rss_kib + u64::from(READERS) * BLOCKED_KIB);
    }
    drop((flood, deaf));
    let back = lab.wait_until(
        "files and memory to be given back",
        GIVEN_BACK_WITHIN,
        || {
            let back = |(now, before): (&Held, &Held)| {
                now.files <= before.files + FILES_KEPT
                    && now.rss_kib <= before.rss_kib + MEMORY_KEPT_KIB
            };
            held().iter().zip(&before).all(back).then_some(())
        },
    );
    println!("given back {:?}", held());
    assert!(
        back.is_ok(),
        "before {before:?}, full {full:?}, still {:?}",
        held()
    );
}
