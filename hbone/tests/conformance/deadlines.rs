//! Every wait of a handshake or request ends at its deadline, with a reason.

use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use hbone::{PoolConfig, Reason, RelayOpts, RelayOutcome, ServeConfig};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::spawn_local;

use crate::engine::Engine;
use crate::fixture::{Fixture, Path, socket_pair, wait_until};
use crate::raw_peer as raw;

/// Short enough for a test, and longer than a handshake takes on a busy machine.
const SHORT_DEADLINE: Duration = Duration::from_secs(1);

async fn with_pool_config<E: Engine>(config: PoolConfig) -> Fixture<E> {
    Fixture::with_config(config, ServeConfig::default()).await
}

async fn open_error<E: Engine>(fixture: &Fixture<E>) -> hbone::Error {
    fixture.open().await.err().expect("the stream was opened")
}

pub async fn refused_tcp_connect_fails_at_once<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    fixture.stop_listening().await;
    let error = open_error(&fixture).await;
    assert_eq!(error.reason(), Reason::ConnectRefused);
    assert!(error.is_retryable());
    assert!(
        error
            .to_string()
            .starts_with(&fixture.key.address.to_string()),
        "{error}"
    );
}

pub async fn unanswered_tcp_connect_fails_at_its_deadline<E: Engine>() {
    let config = PoolConfig {
        connect_timeout: SHORT_DEADLINE,
        ..PoolConfig::default()
    };
    let mut fixture = with_pool_config::<E>(config).await;
    // The kernel does not answer a SYN for a listener with a full queue.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    fixture.key.address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(socket) =
        tokio::time::timeout(SHORT_DEADLINE, TcpStream::connect(fixture.key.address)).await
    {
        queued.push(socket);
        assert!(queued.len() < 100, "the queue never fills");
    }
    assert_eq!(open_error(&fixture).await.reason(), Reason::ConnectTimeout);
}

pub async fn silent_server_fails_at_the_tls_deadline<E: Engine>() {
    let config = PoolConfig {
        tls_timeout: SHORT_DEADLINE,
        ..PoolConfig::default()
    };
    let mut fixture = with_pool_config::<E>(config).await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    fixture.key.address = silent.local_addr().unwrap();
    assert_eq!(
        open_error(&fixture).await.reason(),
        Reason::TlsHandshakeTimeout
    );
}

pub async fn server_without_settings_fails_at_the_h2_deadline<E: Engine>() {
    let config = PoolConfig {
        h2_timeout: SHORT_DEADLINE,
        ..PoolConfig::default()
    };
    let mut fixture = with_pool_config::<E>(config).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    fixture.key.address = listener.local_addr().unwrap();
    spawn_local(async move {
        let tcp = listener.accept().await.unwrap().0;
        let _tls = raw::accept(tcp, &raw::server_credentials(), &[b"h2"])
            .await
            .unwrap();
        pending::<()>().await;
    });
    assert_eq!(
        open_error(&fixture).await.reason(),
        Reason::H2HandshakeTimeout
    );
}

pub async fn unanswered_request_fails_at_its_deadline<E: Engine>() {
    let config = PoolConfig {
        response_timeout: SHORT_DEADLINE,
        ..PoolConfig::default()
    };
    let fixture = with_pool_config::<E>(config).await;
    *fixture.service.decide.borrow_mut() = Rc::new(|_, _| Ok(None));
    let mut stream = fixture.open().await.unwrap();
    let error = E::response(&mut stream).await.unwrap_err();
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
    drop(stream);
    wait_until(|| fixture.service.pending.get() == 0).await;
    // A waiting relay has the same deadline.
    let (_downstream, relayed) = socket_pair().await;
    let summary = E::relay(fixture.open().await.unwrap(), relayed, RelayOpts::default()).await;
    let RelayOutcome::Failed(error) = summary.outcome else {
        panic!("{summary:?}")
    };
    assert_eq!(error.reason(), Reason::ConnectResponseTimeout);
}

async fn with_short_handshake_timeouts<E: Engine>() -> Fixture<E> {
    let serve = ServeConfig {
        tls_timeout: SHORT_DEADLINE,
        h2_timeout: SHORT_DEADLINE,
        ..ServeConfig::default()
    };
    Fixture::with_config(PoolConfig::default(), serve).await
}

pub async fn silent_client_fails_at_the_tls_deadline<E: Engine>() {
    let mut fixture = with_short_handshake_timeouts::<E>().await;
    let mut client = TcpStream::connect(fixture.key.address).await.unwrap();
    // The first bytes of a ClientHello.
    client.write_all(b"\x16\x03\x01\x02\0").await.unwrap();
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.error.unwrap().reason(), Reason::TlsHandshakeTimeout);
    assert_eq!(summary.peer, None);
}

pub async fn client_without_preface_fails_at_the_h2_deadline<E: Engine>() {
    let mut fixture = with_short_handshake_timeouts::<E>().await;
    let _silent = raw::tls(raw::valid_client(), fixture.key.address)
        .await
        .unwrap();
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.error.unwrap().reason(), Reason::H2HandshakeTimeout);
    assert!(summary.peer.is_some());
}
