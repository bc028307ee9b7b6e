//! Many at once.

use std::collections::BTreeSet;
use std::time::Instant;

use tokio::task::JoinSet;

use super::bench::*;

#[tokio::test]
async fn a_thousand_requests_at_once_are_all_served_each_with_a_certificate_of_its_own() {
    const REQUESTS: usize = 1000;
    let bench = Bench::start().await;
    let (channel, token, request) = (bench.channel(), bench.token(), csr(&pair()));
    let mut calls = JoinSet::new();
    let began = Instant::now();
    for _ in 0..REQUESTS {
        let (channel, token, request) = (channel.clone(), token.clone(), request.clone());
        calls.spawn(async move {
            let ask = Ask {
                token: Some(&token),
                identity: Some(WEB),
                csr: Some(request),
                ..Ask::default()
            };
            call(channel, ask).await
        });
    }
    let mut leaves = BTreeSet::new();
    while let Some(answer) = calls.join_next().await {
        leaves.insert(answer.unwrap().unwrap().swap_remove(0));
    }
    let took = began.elapsed();
    assert_eq!(leaves.len(), REQUESTS);
    println!("{REQUESTS} certificates in {took:?}");
    let counted = format!("ambit_ca_issued_total {REQUESTS}");
    assert!(bench.metrics().await.contains(&counted));
}

#[tokio::test]
async fn a_stop_lets_what_has_begun_end_and_takes_nothing_more() {
    let mut bench = Bench::start().await;
    let (channel, token) = (bench.channel(), bench.token());
    let ask = || Ask {
        token: Some(&token),
        identity: Some(WEB),
        ..Ask::default()
    };
    call(channel.clone(), ask()).await.unwrap();
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let (channel, token) = (channel.clone(), token.clone());
        calls.spawn(async move {
            let ask = Ask {
                token: Some(&token),
                ..Ask::default()
            };
            call(channel, ask).await
        });
    }
    tokio::task::yield_now().await;
    let address = bench.running().address;
    bench.stop().await;
    // Each was either answered, or told that it was not.
    while calls.join_next().await.is_some() {}
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
