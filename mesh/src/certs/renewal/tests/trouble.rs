//! Outages, other roots, wrong clocks, and rushes.

use super::*;

/// A connection that waits for an identity, as long as it has none; how long that was.
async fn waits_for(bench: &Bench, name: &str) -> Duration {
    let start = Instant::now();
    let mut version = bench.certificates.subscribe();
    while bench.current(name).is_none() {
        bench
            .certificates
            .prioritize(&id(name), Priority::Connection);
        let _ = tokio::time::timeout(SECOND, version.changed()).await;
    }
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn with_twenty_second_certificates_and_an_outage_of_45_seconds_all_are_back_within_two() {
    let bench = Bench::with_ttl(20 * SECOND);
    let names = names(60);
    bench.want(&strs(&names));
    pass(37 * SECOND).await;
    assert!(names.iter().all(|name| bench.current(name).is_some()));
    bench.source.is(Mood::Down);
    let down = Instant::now();
    let ends: Vec<Duration> = names
        .iter()
        .map(|name| bench.current(name).unwrap().ends - down)
        .collect();
    while down.elapsed() < 45 * SECOND {
        for (name, ends) in names.iter().zip(&ends) {
            let has = bench.current(name).is_some();
            assert_eq!(
                has,
                down.elapsed() < *ends,
                "to the very end, and no longer"
            );
            if !has {
                bench
                    .certificates
                    .prioritize(&id(name), Priority::Connection);
            }
        }
        pass(SECOND / 2).await;
    }
    let before = bench.source.attempts();
    bench.source.is(Mood::Willing);
    for name in &names {
        waits_for(&bench, name).await;
    }
    let took = down.elapsed() - 45 * SECOND;
    assert!(took < 2 * SECOND, "{took:?}");
    let extra = bench.source.attempts() - before - names.len();
    assert!(extra < 5, "each was asked for once: {extra} more");
    assert!(bench.source.busy.lock().unwrap().1 <= 8);
    pass(60 * SECOND).await;
    assert!(names.iter().all(|name| bench.current(name).is_some()));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_that_ends_before_the_certificates_do_is_noticed_by_nobody() {
    let bench = Bench::with_ttl(120 * SECOND);
    let names = names(60);
    bench.want(&strs(&names));
    pass(40 * SECOND).await;
    for mood in [Mood::Down, Mood::Hanging, Mood::Failing] {
        bench.source.is(mood);
        for _ in 0..45 {
            pass(SECOND).await;
            assert!(
                names.iter().all(|name| bench.current(name).is_some()),
                "{mood:?}"
            );
        }
        bench.source.is(Mood::Willing);
        for _ in 0..120 {
            pass(SECOND).await;
            assert!(
                names.iter().all(|name| bench.current(name).is_some()),
                "{mood:?}"
            );
        }
    }
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn attempts_that_hang_on_what_was_there_before_are_made_again_when_the_source_is_back() {
    let bench = Bench::with_ttl(20 * SECOND);
    let names = names(9);
    bench.want(&strs(&names));
    bench.source.is(Mood::Hanging);
    // Nine identities on eight places: some hang for their whole deadline, again and again.
    for _ in 0..35 {
        names.iter().for_each(|name| {
            bench
                .certificates
                .prioritize(&id(name), Priority::Connection)
        });
        pass(SECOND).await;
    }
    bench.source.is(Mood::Willing);
    let back = Instant::now();
    waits_for(&bench, &names[0]).await;
    let first = back.elapsed();
    for name in &names {
        waits_for(&bench, name).await;
    }
    assert!(
        back.elapsed() - first < 2 * SECOND,
        "{first:?}, {:?}",
        back.elapsed()
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_waits_is_served_before_hundreds_that_only_start() {
    let bench = Bench::new();
    bench.source.is(Mood::Slow(SECOND));
    let names = names(400);
    let mut all = strs(&names);
    all.push("zebra");
    bench.want(&all);
    pass(SECOND / 2).await;
    let waited = waits_for(&bench, "zebra").await;
    assert!(
        waited < 2 * SECOND,
        "{waited:?}: the next place was its own"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn nobody_can_wait_for_an_identity_that_does_not_run_here() {
    let bench = Bench::new();
    bench.want(&["web"]);
    pass(MOMENT).await;
    bench
        .certificates
        .prioritize(&id("stranger"), Priority::Connection);
    pass(SECOND).await;
    assert_eq!(bench.source.attempts(), 1);
    assert!(bench.certificates.0.needed.lock().unwrap().is_empty());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_is_replaced_while_everything_goes_on() {
    let bench = Bench::with_ttl(20 * SECOND);
    let names = names(40);
    bench.want(&strs(&names));
    pass(30 * SECOND).await;
    let (old, new) = (bench.source.authority(), authority());
    let trusted_by = |bundle: &TrustBundle| {
        let now = (bench.clock)();
        let held = names.iter().map(|name| bench.current(name).unwrap());
        let chains =
            |held: Arc<Certificate>| crate::certs::verify::chains(&held.chain, bundle, now);
        held.filter(|held| chains(held.clone()).is_ok()).count()
    };
    // Both are known before the new one signs, and until everything of the old one is gone.
    bench.source.publishes(&[&old, &new]);
    pass(SECOND).await;
    assert_eq!(bench.certificates.state().bundle.roots().len(), 2);
    assert_eq!(trusted_by(old.bundle()), 40, "nothing is renewed for that");
    bench.source.signs_with(&new);
    pass(12 * SECOND).await;
    assert_eq!(
        trusted_by(new.bundle()),
        40,
        "within half a life and its jitter"
    );
    bench.source.publishes(&[&new]);
    let before = bench.source.attempts();
    pass(SECOND).await;
    assert_eq!(
        bench.certificates.state().bundle.roots(),
        new.bundle().roots()
    );
    assert!(
        bench.source.attempts() - before < 20,
        "no reason to renew all of them"
    );
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_that_is_replaced_at_once_has_all_certificates_replaced_within_two_seconds() {
    let bench = Bench::new();
    let names = names(40);
    bench.want(&strs(&names));
    pass(HOUR).await;
    let new = authority();
    bench.source.signs_with(&new);
    bench.source.publishes(&[&new]);
    pass(2 * SECOND).await;
    for name in &names {
        let held = bench.current(name).unwrap();
        crate::certs::verify::chains(&held.chain, new.bundle(), (bench.clock)()).unwrap();
    }
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_bundle_that_is_empty_replaces_none() {
    let bench = Bench::new();
    let good = bench.certificates.state().bundle.clone();
    bench.want(&["web"]);
    pass(MOMENT).await;
    bench.source.bundle.send_replace(Arc::default());
    pass(24 * HOUR).await;
    assert_eq!(bench.certificates.state().bundle, good);
    assert!(bench.current("web").is_some(), "and renewals go on");
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_by_five_minutes_drops_nothing_and_renewals_go_on() {
    for by in [299, -299] {
        let bench = Bench::with_ttl(HOUR);
        let names = names(10);
        bench.want(&strs(&names));
        pass(10 * SECOND).await;
        bench.skew.store(by, SeqCst);
        for _ in 0..4 * 60 {
            pass(60 * SECOND).await;
            assert!(
                names.iter().all(|name| bench.current(name).is_some()),
                "{by}"
            );
        }
        let renewals = bench.certificates.state().counters.renewals;
        assert!((70..=100).contains(&renewals), "{by}: {renewals}");
        assert!(
            bench.certificates.state().counters.failures.is_empty(),
            "{by}"
        );
        // And back again.
        bench.skew.store(0, SeqCst);
        for _ in 0..60 {
            pass(60 * SECOND).await;
            assert!(
                names.iter().all(|name| bench.current(name).is_some()),
                "{by}"
            );
        }
        bench.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_clock_is_five_minutes_behind_renews_short_certificates_in_time() {
    let bench = Bench::with_ttl(20 * SECOND);
    bench.skew.store(-299, SeqCst);
    bench.want(&["web"]);
    pass(MOMENT).await;
    for _ in 0..100 {
        pass(SECOND).await;
        // As peers see it, whose clocks are right.
        let held = bench.current("web").unwrap();
        assert!(held.not_after > (bench.source.clock)());
    }
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_source_that_has_something_newer_is_asked_at_once() {
    let bench = Bench::new();
    bench.want(&["db", "web"]);
    pass(MOMENT).await;
    let before = [bench.current("db").unwrap(), bench.current("web").unwrap()];
    bench.source.rotations.send_modify(|counts| {
        counts.insert(id("web"), 1);
    });
    pass(MOMENT).await;
    assert!(Arc::ptr_eq(&before[0], &bench.current("db").unwrap()));
    assert!(!Arc::ptr_eq(&before[1], &bench.current("web").unwrap()));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_source_that_panics_fails_one_attempt_and_no_more() {
    let bench = Bench::new();
    bench.source.is(Mood::Panicking);
    bench.want(&["web"]);
    pass(MOMENT).await;
    assert_eq!(bench.last_error(), "source_failed");
    bench.source.is(Mood::Willing);
    pass(3 * SECOND).await;
    assert!(bench.current("web").is_some());
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn thousands_of_identities_start_eight_at_a_time_and_are_told_in_few_words() {
    let bench = Bench::new();
    bench.source.is(Mood::Slow(Duration::from_millis(10)));
    let names = names(3000);
    let mut version = bench.certificates.subscribe();
    let mut told = 0;
    let start = std::time::Instant::now();
    bench.want(&strs(&names));
    while bench
        .certificates
        .state()
        .identities
        .iter()
        .filter(|one| one.certificate.is_some())
        .count()
        < 3000
    {
        version.changed().await.unwrap();
        told += 1;
    }
    assert!(bench.source.busy.lock().unwrap().1 <= 8);
    assert!(told <= 3000 / 8 + 10, "{told} publications");
    // Virtual time costs nothing; what is left is the processor's.
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
    bench.end().await;
}
