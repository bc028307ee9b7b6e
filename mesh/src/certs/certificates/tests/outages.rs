//! Outages, root rotations, wrong clocks, and many identities at once.

use super::*;
use crate::certs::verify_chain::verify_chain;

/// Waits for a certificate as a connection does, and returns the time it took.
async fn wait_for_certificate(fixture: &Fixture, name: &str) -> Duration {
    let start = Instant::now();
    let mut version = fixture.certificates.subscribe();
    while fixture.current(name).is_none() {
        fixture
            .certificates
            .prioritize(&id(name), Priority::Connection);
        let _ = tokio::time::timeout(SECOND, version.changed()).await;
    }
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn after_a_45_second_outage_all_identities_are_reissued_within_two_seconds() {
    let fixture = Fixture::with_ttl(20 * SECOND);
    let names = names(60);
    fixture.set_identities(&strs(&names));
    advance(37 * SECOND).await;
    assert!(names.iter().all(|name| fixture.current(name).is_some()));
    fixture.source.set_behavior(Behavior::Unreachable);
    let outage = Instant::now();
    let lifetimes: Vec<Duration> = names
        .iter()
        .map(|name| fixture.current(name).unwrap().expires_at - outage)
        .collect();
    while outage.elapsed() < 45 * SECOND {
        for (name, lifetime) in names.iter().zip(&lifetimes) {
            let has_certificate = fixture.current(name).is_some();
            assert_eq!(
                has_certificate,
                outage.elapsed() < *lifetime,
                "usable until its expiry, and not after"
            );
            if !has_certificate {
                fixture
                    .certificates
                    .prioritize(&id(name), Priority::Connection);
            }
        }
        advance(SECOND / 2).await;
    }
    let before = fixture.source.request_count();
    fixture.source.set_behavior(Behavior::Issue);
    for name in &names {
        wait_for_certificate(&fixture, name).await;
    }
    let took = outage.elapsed() - 45 * SECOND;
    assert!(took < 2 * SECOND, "{took:?}");
    let extra = fixture.source.request_count() - before - names.len();
    assert!(
        extra < 5,
        "each identity needs one request; {extra} more were sent"
    );
    assert!(fixture.source.concurrency.lock().unwrap().max <= 8);
    advance(60 * SECOND).await;
    assert!(names.iter().all(|name| fixture.current(name).is_some()));
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_shorter_than_the_remaining_lifetime_has_no_effect() {
    let fixture = Fixture::with_ttl(120 * SECOND);
    let names = names(60);
    fixture.set_identities(&strs(&names));
    advance(40 * SECOND).await;
    for behavior in [Behavior::Unreachable, Behavior::Hang, Behavior::Fail] {
        fixture.source.set_behavior(behavior);
        for _ in 0..45 {
            advance(SECOND).await;
            assert!(
                names.iter().all(|name| fixture.current(name).is_some()),
                "{behavior:?}"
            );
        }
        fixture.source.set_behavior(Behavior::Issue);
        for _ in 0..120 {
            advance(SECOND).await;
            assert!(
                names.iter().all(|name| fixture.current(name).is_some()),
                "{behavior:?}"
            );
        }
    }
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn stale_requests_are_repeated_when_the_source_recovers() {
    let fixture = Fixture::with_ttl(20 * SECOND);
    let names = names(9);
    fixture.set_identities(&strs(&names));
    fixture.source.set_behavior(Behavior::Hang);
    // Nine identities with a concurrency of eight: requests hang until their deadline.
    for _ in 0..35 {
        names.iter().for_each(|name| {
            fixture
                .certificates
                .prioritize(&id(name), Priority::Connection);
        });
        advance(SECOND).await;
    }
    fixture.source.set_behavior(Behavior::Issue);
    let recovery = Instant::now();
    wait_for_certificate(&fixture, &names[0]).await;
    let first = recovery.elapsed();
    for name in &names {
        wait_for_certificate(&fixture, name).await;
    }
    assert!(
        recovery.elapsed() - first < 2 * SECOND,
        "{first:?}, {:?}",
        recovery.elapsed()
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_waiting_connection_is_served_before_hundreds_of_new_identities() {
    let fixture = Fixture::new();
    fixture.source.set_behavior(Behavior::Slow(SECOND));
    let names = names(400);
    let mut all = strs(&names);
    all.push("zebra");
    fixture.set_identities(&all);
    advance(SECOND / 2).await;
    let waited = wait_for_certificate(&fixture, "zebra").await;
    assert!(waited < 2 * SECOND, "{waited:?}: it was not requested next");
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_priority_for_an_identity_of_another_node_is_ignored() {
    let fixture = Fixture::new();
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    fixture
        .certificates
        .prioritize(&id("elsewhere"), Priority::Connection);
    advance(SECOND).await;
    assert_eq!(fixture.source.request_count(), 1);
    assert!(fixture.certificates.0.priorities().is_empty());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_rotation_with_overlap_renews_nothing_early() {
    let fixture = Fixture::with_ttl(20 * SECOND);
    let names = names(40);
    fixture.set_identities(&strs(&names));
    advance(30 * SECOND).await;
    let (old, new) = (fixture.source.authority(), authority());
    let trusted_by = |bundle: &TrustBundle| {
        let now = (fixture.clock)();
        let certificates = names.iter().map(|name| fixture.current(name).unwrap());
        certificates
            .filter(|one| verify_chain(&one.chain, bundle, now).is_ok())
            .count()
    };
    // Both roots are published before the new one signs, and until all certificates are renewed.
    fixture.source.publish_roots_of(&[&old, &new]);
    advance(SECOND).await;
    assert_eq!(fixture.certificates.state().bundle.roots().len(), 2);
    assert_eq!(
        trusted_by(old.bundle()),
        40,
        "a new root alone causes no renewal"
    );
    fixture.source.set_authority(&new);
    advance(12 * SECOND).await;
    assert_eq!(
        trusted_by(new.bundle()),
        40,
        "all are renewed within half of the lifetime"
    );
    fixture.source.publish_roots_of(&[&new]);
    let before = fixture.source.request_count();
    advance(SECOND).await;
    assert_eq!(
        fixture.certificates.state().bundle.roots(),
        new.bundle().roots()
    );
    assert!(
        fixture.source.request_count() - before < 20,
        "removing the old root renews nothing"
    );
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_rotation_without_overlap_renews_everything_within_two_seconds() {
    let fixture = Fixture::new();
    let names = names(40);
    fixture.set_identities(&strs(&names));
    advance(HOUR).await;
    let new = authority();
    fixture.source.set_authority(&new);
    fixture.source.publish_roots_of(&[&new]);
    advance(2 * SECOND).await;
    for name in &names {
        let certificate = fixture.current(name).unwrap();
        verify_chain(&certificate.chain, new.bundle(), (fixture.clock)()).unwrap();
    }
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_empty_bundle_does_not_replace_another() {
    let fixture = Fixture::new();
    let previous = fixture.certificates.state().bundle.clone();
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    fixture.source.bundle.send_replace(Arc::default());
    advance(24 * HOUR).await;
    assert_eq!(fixture.certificates.state().bundle, previous);
    assert!(fixture.current("web").is_some(), "renewals continue");
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_set_by_five_minutes_drops_nothing_and_renewals_continue() {
    for by in [299, -299] {
        let fixture = Fixture::with_ttl(HOUR);
        let names = names(10);
        fixture.set_identities(&strs(&names));
        advance(10 * SECOND).await;
        fixture.skew.store(by, SeqCst);
        for _ in 0..4 * 60 {
            advance(60 * SECOND).await;
            assert!(
                names.iter().all(|name| fixture.current(name).is_some()),
                "{by}"
            );
        }
        let renewals = fixture.certificates.state().counters.renewals;
        assert!((70..=100).contains(&renewals), "{by}: {renewals}");
        assert!(
            fixture.certificates.state().counters.failures.is_empty(),
            "{by}"
        );
        // Set back.
        fixture.skew.store(0, SeqCst);
        for _ in 0..60 {
            advance(60 * SECOND).await;
            assert!(
                names.iter().all(|name| fixture.current(name).is_some()),
                "{by}"
            );
        }
        fixture.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_clock_is_five_minutes_behind_renews_short_certificates_in_time() {
    let fixture = Fixture::with_ttl(20 * SECOND);
    fixture.skew.store(-299, SeqCst);
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    for _ in 0..100 {
        advance(SECOND).await;
        // By the clocks of peers, which are correct.
        let certificate = fixture.current("web").unwrap();
        assert!(certificate.not_after > (fixture.source.clock)());
    }
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_update_of_the_source_is_requested_at_once() {
    let fixture = Fixture::new();
    fixture.set_identities(&["db", "web"]);
    advance(MOMENT).await;
    let before = [
        fixture.current("db").unwrap(),
        fixture.current("web").unwrap(),
    ];
    fixture.source.updates.send_modify(|counts| {
        counts.insert(id("web"), 1);
    });
    advance(MOMENT).await;
    assert!(Arc::ptr_eq(&before[0], &fixture.current("db").unwrap()));
    assert!(!Arc::ptr_eq(&before[1], &fixture.current("web").unwrap()));
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_source_fails_one_request() {
    let fixture = Fixture::new();
    fixture.source.set_behavior(Behavior::Panic);
    fixture.set_identities(&["web"]);
    advance(MOMENT).await;
    assert_eq!(fixture.last_error(), "source_failed");
    fixture.source.set_behavior(Behavior::Issue);
    advance(3 * SECOND).await;
    assert!(fixture.current("web").is_some());
    fixture.stop().await;
}

#[tokio::test(start_paused = true)]
async fn thousands_of_identities_start_in_batches_and_are_published_in_batches() {
    let fixture = Fixture::new();
    fixture
        .source
        .set_behavior(Behavior::Slow(Duration::from_millis(10)));
    let names = names(3000);
    let mut version = fixture.certificates.subscribe();
    let mut published = 0;
    let start = std::time::Instant::now();
    fixture.set_identities(&strs(&names));
    while fixture
        .certificates
        .state()
        .identities
        .iter()
        .filter(|one| one.certificate.is_some())
        .count()
        < 3000
    {
        version.changed().await.unwrap();
        published += 1;
    }
    assert!(fixture.source.concurrency.lock().unwrap().max <= 8);
    assert!(published <= 3000 / 8 + 10, "{published} states");
    // Virtual time is free: this measures CPU time.
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "{:?}",
        start.elapsed()
    );
    fixture.stop().await;
}
