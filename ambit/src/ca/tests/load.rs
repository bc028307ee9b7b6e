//! Many concurrent requests, and a stop while requests are open.

use std::collections::BTreeSet;
use std::time::Instant;

use tokio::task::JoinSet;

use super::fixture::*;

#[tokio::test]
async fn a_thousand_concurrent_requests_get_distinct_certificates() {
    const REQUESTS: usize = 1000;
    let fixture = Fixture::start().await;
    let (channel, token, request) = (fixture.channel(), fixture.token(), csr(&key_pair()));
    let mut calls = JoinSet::new();
    let start = Instant::now();
    for _ in 0..REQUESTS {
        let (channel, token, request) = (channel.clone(), token.clone(), request.clone());
        calls.spawn(async move {
            let call = Call {
                token: Some(&token),
                identity: Some(WEB),
                csr: Some(request),
                ..Call::default()
            };
            create_certificate(channel, call).await
        });
    }
    let mut leaves = BTreeSet::new();
    while let Some(chain) = calls.join_next().await {
        leaves.insert(chain.unwrap().unwrap().swap_remove(0));
    }
    let duration = start.elapsed();
    assert_eq!(leaves.len(), REQUESTS);
    println!("{REQUESTS} certificates in {duration:?}");
    let counted = format!("ambit_ca_issued_total {REQUESTS}");
    assert!(fixture.metrics().await.contains(&counted));
}

#[tokio::test]
async fn stop_finishes_open_requests_and_accepts_no_more() {
    let mut fixture = Fixture::start().await;
    let (channel, token) = (fixture.channel(), fixture.token());
    let call = || Call {
        token: Some(&token),
        identity: Some(WEB),
        ..Call::default()
    };
    create_certificate(channel.clone(), call()).await.unwrap();
    let mut calls = JoinSet::new();
    for _ in 0..50 {
        let (channel, token) = (channel.clone(), token.clone());
        calls.spawn(async move {
            let call = Call {
                token: Some(&token),
                ..Call::default()
            };
            create_certificate(channel, call).await
        });
    }
    tokio::task::yield_now().await;
    let address = fixture.running().address;
    fixture.stop().await;
    // Every call ended, with a response or with an error.
    while calls.join_next().await.is_some() {}
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
