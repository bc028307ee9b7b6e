//! Why the engine has a receive buffer: h2 alone closes a connection when one reader stalls.
//!
//! h2 charges small DATA frames that are not read to one budget for the whole connection. With its defaults, one stream
//! with a stalled reader closes the connection and all other streams. If this test fails, h2 has changed: review
//! `engine::recv_buffer` and the budget in `engine::h2_config`. The conformance suite shows that the engine is not
//! affected.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails"
)]

use bytes::Bytes;
use tokio::task::LocalSet;

const ONE_BYTE: Bytes = Bytes::from_static(b"x");

#[tokio::test]
async fn stalled_reader_closes_all_streams_of_an_h2_connection() {
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
                None => panic!("the connection closed without an error"),
            }
        }
    });
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    let driver = tokio::task::spawn_local(connection);
    let connect = || http::Request::connect("10.0.0.1:80").body(()).unwrap();
    let (stalled, mut stalled_send) = send.send_request(connect(), false).unwrap();
    let (neighbour, _neighbour_send) = send.send_request(connect(), false).unwrap();
    let (_stalled, neighbour) = (stalled.await.unwrap(), neighbour.await.unwrap());

    let mut frames = 0;
    while !driver.is_finished() && frames < 2000 {
        frames += 1;
        if stalled_send.send_data(ONE_BYTE, false).is_err() {
            break;
        }
        tokio::task::yield_now().await;
    }
    let closed = server.await.unwrap();
    assert_eq!(closed.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
    assert!(
        frames < 300,
        "the connection closed only after {frames} frames"
    );
    assert!(
        neighbour.into_body().data().await.unwrap().is_err(),
        "the other stream was not closed"
    );
}
