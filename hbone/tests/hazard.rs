//! The hazard that the engine's inbox exists for, shown on h2 alone.
//!
//! h2 charges small DATA frames that nobody reads against one budget of the whole connection. With its defaults one
//! stream whose reader stalls closes the connection, and all other streams with it. If this test fails, h2 has changed:
//! look at the inbox and its budget again. That the engine is not harmed is shown by the conformance suite.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that fails says so by panic"
)]

use bytes::Bytes;
use tokio::task::LocalSet;

const ONE_BYTE: Bytes = Bytes::from_static(b"x");

#[tokio::test]
async fn with_h2_alone_one_stalled_reader_closes_the_streams_of_all() {
    LocalSet::new().run_until(scenario()).await;
}

async fn scenario() {
    let (near, far) = tokio::io::duplex(1024 * 1024);
    let server = tokio::task::spawn_local(async move {
        let mut connection = h2::server::handshake(far).await.unwrap();
        let mut unread = Vec::new();
        loop {
            match connection.accept().await {
                Some(Ok((request, mut respond))) => {
                    let open = respond
                        .send_response(http::Response::new(()), false)
                        .unwrap();
                    unread.push((request.into_body(), open));
                }
                Some(Err(error)) => return error,
                None => panic!("closed in good order"),
            }
        }
    });
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    let driver = tokio::task::spawn_local(connection);
    let connect = || http::Request::connect("10.0.0.1:80").body(()).unwrap();
    let (slow, mut slow_send) = send.send_request(connect(), false).unwrap();
    let (neighbour, _neighbour_send) = send.send_request(connect(), false).unwrap();
    let (_slow, neighbour) = (slow.await.unwrap(), neighbour.await.unwrap());

    let mut frames = 0;
    while !driver.is_finished() && frames < 2000 {
        frames += 1;
        if slow_send.send_data(ONE_BYTE, false).is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let closed = server.await.unwrap();
    assert_eq!(closed.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
    assert!(frames < 300, "it took {frames} frames");
    assert!(
        neighbour.into_body().data().await.unwrap().is_err(),
        "the neighbour was spared"
    );
}
