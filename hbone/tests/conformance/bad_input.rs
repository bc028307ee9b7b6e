//! How a server rejects bytes and requests that are not HBONE, and tunnels that it does not accept.

use hbone::{Reason, ServeOutcome};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::engine::Engine;
use crate::fixture::{Fixture, Path};
use crate::raw_peer as raw;
use crate::tcp_semantics::assert_relays;

pub async fn plain_http_and_garbage_are_rejected_with_a_reason<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        &[0; 4096],
        &[0xff; 65536],
    ] {
        let mut client = TcpStream::connect(fixture.key.address).await.unwrap();
        client.write_all(bytes).await.unwrap();
        let summary = fixture.serve_summaries.recv().await.unwrap();
        assert_eq!(
            (summary.outcome, summary.peer),
            (ServeOutcome::Failed, None)
        );
        assert_eq!(summary.error.unwrap().reason(), Reason::NotHbone);
    }
    let silent = TcpStream::connect(fixture.key.address).await.unwrap();
    drop(silent);
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.error.unwrap().reason(), Reason::TlsHandshakeFailed);
    assert_relays(&mut fixture.connect().await, b"x").await;
}

pub async fn garbage_after_tls_is_rejected_with_a_reason<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n         "[..], &[0xff; 65536]] {
        let mut tls = raw::tls(raw::valid_client(), fixture.key.address)
            .await
            .unwrap();
        let _refused = tls.write_all(bytes).await;
        let summary = fixture.serve_summaries.recv().await.unwrap();
        assert_eq!(summary.error.unwrap().reason(), Reason::H2HandshakeFailed);
    }
    let mut tls = raw::tls(raw::valid_client(), fixture.key.address)
        .await
        .unwrap();
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let _refused = tls.write_all(&[0xff; 65536]).await;
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.error.unwrap().reason(), Reason::ProtocolError);
    assert_relays(&mut fixture.connect().await, b"x").await;
}

pub async fn malformed_connect_is_rejected_and_reported<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let (mut send, _driver) = raw::h2(fixture.key.address).await;
    let get = http::Request::get("https://10.0.0.1/").body(()).unwrap();
    let post = http::Request::post("https://10.0.0.1/").body(()).unwrap();
    for request in [
        get,
        post,
        raw::connect("10.0.0.1:0"),
        raw::connect("10.0.0.999:80"),
    ] {
        let (response, _stream) = send.send_request(request, false).unwrap();
        assert_eq!(response.await.unwrap().status(), 400);
    }
    let bad_requests = fixture.service.bad_requests.borrow();
    assert_eq!(bad_requests.len(), 4);
    assert!(
        bad_requests
            .iter()
            .all(|(reason, _)| *reason == Reason::ConnectMalformed)
    );
    assert_eq!(bad_requests[0].1, ":method: not CONNECT");
}

pub async fn oversized_headers_are_rejected_without_effect_on_other_streams<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut neighbour = fixture.connect().await;
    let (mut send, _driver) = raw::h2(fixture.key.address).await;
    let mut valid = raw::connect(&fixture.request().authority.to_string());
    for size in [80_000, 300_000] {
        let mut request = raw::connect("10.0.0.1:80");
        for i in 0..size / 10_000 {
            let name = http::HeaderName::try_from(format!("x-{i}")).unwrap();
            request
                .headers_mut()
                .insert(name, "a".repeat(10_000).parse().unwrap());
        }
        let (response, _stream) = send.send_request(request, false).unwrap();
        assert_eq!(response.await.unwrap().status(), 431, "{size} bytes");
    }
    assert_eq!(fixture.service.bad_requests.borrow().len(), 1);
    valid
        .headers_mut()
        .insert("baggage", "x".repeat(9000).parse().unwrap());
    let (response, _stream) = send.send_request(valid, false).unwrap();
    assert_eq!(response.await.unwrap().status(), 200);
    assert_relays(&mut neighbour, b"x").await;
}

pub async fn tunnel_that_is_not_accepted_is_closed_without_streams<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    fixture.service.accepts_tunnels.set(false);
    let refused = async {
        let mut stream = fixture.open().await?;
        E::response(&mut stream).await
    };
    assert!(refused.await.is_err());
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(
        (summary.outcome, summary.streams),
        (ServeOutcome::Aborted, 0)
    );
    assert!(summary.peer.is_some() && summary.error.is_none());
}
