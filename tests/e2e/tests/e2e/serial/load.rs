//! Many connections: all succeed, none delays another, and their resources are released.

use std::time::Duration;

use ambit_e2e::tcp::{Path, RunningScenario, up};
use ambit_e2e::tcp_load::{
    DaemonUsage, EchoServer, Load, LoadReport, MAX_EXCHANGE_MS, THOUSAND_CONCURRENT,
    conntrack_failures, conntrack_usage,
};
use lab::{Lab, Options};

/// How many more files a daemon may have open than before any load: its namespace threads start under load, and each
/// keeps its network namespace open.
const MAX_EXTRA_FILES: usize = 4;

/// How much memory a daemon may keep after the first load: tunnels that stay open for a while, and what the allocator
/// retains.
const MAX_RETAINED_KIB: u64 = 10 * 1024;

/// How much more memory a daemon may keep after the second load than after the first: a leak of 350 bytes per connection
/// exceeds it.
const MAX_GROWTH_KIB: u64 = 4 * 1024;

/// How long the last sockets and idle buffers may take to be released.
const RELEASE_DEADLINE: Duration = Duration::from_secs(30);

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
fn thousands_of_connections_succeed_and_their_resources_are_released() {
    let lab = up(Options::default()).unwrap();
    let direct = EchoServer::start(&lab, Path::Direct.server()).unwrap();
    let meshed = EchoServer::start(&lab, Path::Meshed.server()).unwrap();
    let usage = || {
        [("a", Path::Meshed.client()), ("b", Path::Meshed.server())]
            .map(|(node, pod)| DaemonUsage::measure(&lab, node, pod).unwrap())
    };
    // Allocates what a daemon keeps: certificates, tunnels, caches.
    assert_completes(WARM_UP, &lab, Path::Meshed, &meshed);
    let before = usage();
    println!("before {before:?}");
    assert_completes(THOUSAND_CONCURRENT, &lab, Path::Direct, &direct);
    assert_completes(TEN_THOUSAND, &lab, Path::Direct, &direct);
    let mut bound = before.map(|usage| usage.rss_kib + MAX_RETAINED_KIB);
    // The second time over IPv6, because the first ports are in TIME_WAIT.
    for path in [Path::Meshed, Path::MeshedV6] {
        assert_completes(THOUSAND_CONCURRENT, &lab, Path::Meshed, &meshed);
        assert_completes(THOUSAND_CONCURRENT, &lab, Path::MeshedV6, &meshed);
        println!("right after thousands: {:?}", usage());
        assert_completes(TEN_THOUSAND, &lab, path, &meshed);
        println!("right after ten thousand: {:?}", usage());
        let released = lab.wait_until("files and memory to be released", RELEASE_DEADLINE, || {
            let now = usage();
            let released = |((now, before), bound): ((&DaemonUsage, &DaemonUsage), &u64)| {
                now.files <= before.files + MAX_EXTRA_FILES && now.rss_kib <= *bound
            };
            now.iter()
                .zip(&before)
                .zip(&bound)
                .all(released)
                .then_some(now)
        });
        let now = usage();
        assert!(
            released.is_ok(),
            "before {before:?}, memory bound {bound:?} KiB, still {now:?}"
        );
        bound = now.map(|usage| usage.rss_kib + MAX_GROWTH_KIB);
        println!("released: {now:?}");
    }
    for pod in [Path::Meshed.client(), Path::Meshed.server()] {
        assert_eq!(conntrack_failures(&lab, pod).unwrap(), 0, "{pod}");
        let (count, max) = conntrack_usage(&lab, pod).unwrap();
        println!("{pod}: {count} conntrack entries of {max}");
        assert!(count < max / 4, "{pod}: {count} of {max}");
    }
}

fn assert_completes(load: Load, lab: &Lab, path: Path, server: &EchoServer) {
    let report = load
        .run(lab, path, server)
        .unwrap_or_else(|error| panic!("{error:#}"));
    println!("{path:?} {load:?}: {report:?}");
    assert_all_completed(load, &report);
}

fn assert_all_completed(load: Load, report: &LoadReport) {
    assert_eq!(report.errors, "0", "{load:?}: {report:?}");
    match load {
        Load::Short { connections, .. }
        | Load::Aborted { connections, .. }
        | Load::Stalled { connections } => assert_eq!(report.completed, connections),
        Load::Concurrent { connections, .. } => {
            assert_eq!(
                (report.completed, report.max_open),
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

/// HTTP/2 implementations limit how often a peer resets streams. One application's resets must not reach that limit for
/// the other connections of its tunnel.
#[test]
fn clients_that_reset_after_sending_do_not_affect_their_neighbours() {
    with_neighbours(|lab, server| {
        assert_completes(
            Load::Aborted {
                connections: 5000,
                at_once: 64,
                size: 100,
            },
            lab,
            Path::Meshed,
            server,
        );
    });
}

/// The server resets while the client sends, so that DATA arrives on streams that are already closed.
#[test]
fn server_that_resets_while_receiving_does_not_affect_its_neighbours() {
    with_neighbours(|lab, _| {
        let server = EchoServer::start_resetting(lab, Path::Meshed.server()).unwrap();
        let load = Load::Short {
            connections: 5000,
            at_once: 64,
            size: 200_000,
        };
        let report = load.run(lab, Path::Meshed, &server).unwrap();
        println!("{report:?}");
        assert_eq!(report.completed, 0);
        // Each connection reached the server, and its reset reached the client.
        assert_eq!(report.reset_count(), 5000, "{report:?}");
        lab.wait_until(
            "the server to reset every connection",
            RELEASE_DEADLINE,
            || (server.reset_count() == 5000).then_some(()),
        )
        .unwrap_or_else(|error| panic!("{error:#}: {}", server.reset_count()));
    });
}

/// Runs `load` while other connections use the same tunnels. Those must all succeed, and all files are closed
/// afterwards.
fn with_neighbours(load: impl FnOnce(&Lab, &EchoServer)) {
    let lab = up(one_worker()).unwrap_or_else(|error| panic!("{error:#}"));
    let run = || -> anyhow::Result<()> {
        let server = EchoServer::start(&lab, Path::Meshed.server())?;
        let usage = || DaemonUsage::measure(&lab, "b", Path::Meshed.server());
        assert_completes(WARM_UP, &lab, Path::Meshed, &server);
        let before = usage()?;
        let neighbours = Load::Concurrent {
            connections: 20,
            exchanges: 1000,
            size: 2000,
        };
        let running = neighbours.start(&lab, Path::Meshed, &server)?;
        load(&lab, &server);
        let during = LoadReport::wait(running)?;
        println!("neighbours {during:?}");
        assert_all_completed(neighbours, &during);
        let closed = || (usage().ok()?.files <= before.files + MAX_EXTRA_FILES).then_some(());
        lab.wait_until("all files to be closed", RELEASE_DEADLINE, closed)
    };
    if let Err(error) = run() {
        panic!("{error:#}");
    }
}

/// One stream of a shared tunnel receives thousands of single-byte packets while its reader has stopped. The other
/// streams are not delayed, and the slow one loses nothing.
#[test]
fn stalled_reader_of_single_bytes_does_not_delay_its_neighbours() {
    let lab = up(one_worker()).unwrap();
    let server = EchoServer::start(&lab, Path::Meshed.server()).unwrap();
    let neighbours = Load::Concurrent {
        connections: 20,
        exchanges: 200,
        size: 2000,
    };
    let alone = neighbours.run(&lab, Path::Meshed, &server).unwrap();

    let stalled = ["small_window", "send 10", "hold", "drain", "close"];
    let writer = [
        "recv 10",
        "send 256k",
        "send_bytewise 20000",
        "shut",
        "drain",
    ];
    let mut slow = RunningScenario::start(&lab, Path::Meshed, &writer, &stalled).unwrap();
    slow.wait_server("holding").unwrap();
    let running = neighbours.start(&lab, Path::Meshed, &server).unwrap();
    slow.wait_client("sent 20000").unwrap();
    let during = LoadReport::wait(running).unwrap();
    assert_all_completed(neighbours, &during);
    let after = neighbours.run(&lab, Path::Meshed, &server).unwrap();
    assert_all_completed(neighbours, &after);

    slow.release_server().unwrap();
    let seen = slow.finish().unwrap();
    println!("neighbours alone {alone:?}\nduring {during:?}\nafter {after:?}");
    assert_eq!(
        seen.server.events[3..],
        ["received 282144 intact", "fin", "closed"]
    );
    assert_eq!(seen.client.events.last().map(String::as_str), Some("fin"));
    assert!(
        during.slowest_ms < MAX_EXCHANGE_MS,
        "a neighbour was delayed: {during:?}, alone {alone:?}"
    );
}

/// Readers that stop, each with more data in flight than all buffers hold, and neighbours in the same tunnels.
#[test]
fn stopped_readers_do_not_delay_their_neighbours() {
    let lab = up(Options::default()).unwrap();
    let server = EchoServer::start(&lab, Path::Meshed.server()).unwrap();
    let (writer, reader) = (["overfill 64M", "close"], ["hold", "drain", "close"]);
    let start =
        |client, server| RunningScenario::start(&lab, Path::Meshed, client, server).unwrap();
    let mut uploads: Vec<_> = (0..4).map(|_| start(&writer, &reader)).collect();
    let mut downloads: Vec<_> = (0..4).map(|_| start(&reader, &writer)).collect();
    for (upload, download) in uploads.iter().zip(&downloads) {
        upload.wait_client("blocked").unwrap();
        download.wait_server("blocked").unwrap();
    }
    let neighbours = Load::Concurrent {
        connections: 100,
        exchanges: 50,
        size: 2000,
    };
    let during = neighbours.run(&lab, Path::Meshed, &server).unwrap();
    println!("neighbours {during:?}");
    assert_all_completed(neighbours, &during);
    assert!(
        during.slowest_ms < MAX_EXCHANGE_MS,
        "a neighbour was delayed: {during:?}"
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

/// How much memory one blocked connection may use in a daemon.
const MAX_BLOCKED_KIB: u64 = 3 * 1024;

#[test]
fn two_hundred_stopped_readers_use_bounded_memory() {
    const READERS: u32 = 200;
    let lab = up(Options::default()).unwrap();
    let server = EchoServer::start(&lab, Path::Meshed.server()).unwrap();
    let non_reading = EchoServer::start_non_reading(&lab, Path::Meshed.server()).unwrap();
    assert_completes(WARM_UP, &lab, Path::Meshed, &server);
    let usage = || {
        [("a", Path::Meshed.client()), ("b", Path::Meshed.server())]
            .map(|(node, pod)| DaemonUsage::measure(&lab, node, pod).unwrap())
    };
    let before = usage();
    let stalled_load = Load::Stalled {
        connections: READERS,
    }
    .start(&lab, Path::Meshed, &non_reading)
    .unwrap();
    stalled_load
        .wait_stdout("blocked", Duration::from_secs(60))
        .unwrap();
    let full = usage();
    println!("before {before:?}\nwith {READERS} connections that are not read {full:?}");
    assert_completes(
        Load::Short {
            connections: 500,
            at_once: 16,
            size: 100,
        },
        &lab,
        Path::Meshed,
        &server,
    );
    for (full, before) in full.iter().zip(&before) {
        assert!(full.rss_kib < before.rss_kib + u64::from(READERS) * MAX_BLOCKED_KIB);
    }
    drop((stalled_load, non_reading));
    let released = lab.wait_until("files and memory to be released", RELEASE_DEADLINE, || {
        let released = |(now, before): (&DaemonUsage, &DaemonUsage)| {
            now.files <= before.files + MAX_EXTRA_FILES
                && now.rss_kib <= before.rss_kib + MAX_RETAINED_KIB
        };
        usage().iter().zip(&before).all(released).then_some(())
    });
    println!("released {:?}", usage());
    assert!(
        released.is_ok(),
        "before {before:?}, full {full:?}, still {:?}",
        usage()
    );
}
