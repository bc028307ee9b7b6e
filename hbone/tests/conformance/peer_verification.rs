//! Which peers are accepted, and what both ends report about a rejected peer.

use std::time::Duration;

use hbone::{
    ClientTls, Credentials, PoolConfig, PoolKey, Reason, RelayOutcome, ServeConfig, ServeOutcome,
    ServerTls,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::spawn_local;

use crate::certs::{CA, CLIENT, Ca, SERVER, client_tls, id, server_tls};
use crate::engine::Engine;
use crate::fixture::{Fixture, Path, wait_until};
use crate::raw_peer as raw;
use crate::tcp_semantics::{assert_receives_reset, assert_relays};

const OTHER: &str = "spiffe://cluster.local/ns/b/sa/other";

async fn fixture_with<E: Engine>(client: ClientTls, server: ServerTls) -> Fixture<E> {
    Fixture::with_tls(
        client,
        server,
        PoolConfig::default(),
        ServeConfig::default(),
    )
    .await
}

/// The reasons that client and server report.
async fn failure_reasons<E: Engine>(mut fixture: Fixture<E>) -> (Reason, Reason) {
    let error = fixture.open().await.err().unwrap();
    assert_eq!(error.peer(), Some(fixture.key.address));
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(
        (summary.outcome, summary.streams),
        (ServeOutcome::Failed, 0)
    );
    (error.reason(), summary.error.unwrap().reason())
}

/// The server's reason to reject a client that accepts any server.
async fn rejection_reason<E: Engine>(config: rustls::ClientConfig) -> Reason {
    let mut fixture = Fixture::<E>::new().await;
    if let Ok(mut tls) = raw::tls(config, fixture.key.address).await {
        // A TLS 1.3 client learns of the rejection only after its handshake.
        let _alert = tls.read_to_end(&mut Vec::new()).await;
    }
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.outcome, ServeOutcome::Failed);
    summary.error.unwrap().reason()
}

pub async fn both_ends_report_the_peer_identity<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let mut stream = fixture.open().await.unwrap();
    assert_eq!(E::peer(&stream), id(SERVER));
    E::response(&mut stream).await.unwrap();
    drop((stream, fixture.upstream().await));
    fixture.drain.cancel();
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.peer.unwrap().identity, id(CLIENT));
    assert_eq!(
        (summary.outcome, summary.streams),
        (ServeOutcome::Drained, 1),
        "{:?}",
        summary.error
    );
}

pub async fn unexpected_server_identity_is_rejected_before_http2<E: Engine>() {
    let server = ServerTls::new(&CA.issue(OTHER)).unwrap();
    let (client, server) = failure_reasons(fixture_with::<E>(client_tls(), server).await).await;
    assert_eq!(client, Reason::PeerIdentityMismatch);
    assert_eq!(server, Reason::H2HandshakeFailed);
}

pub async fn empty_expected_list_rejects_every_server<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let refused = E::open(
        &fixture.pool,
        &fixture.key,
        &[],
        &fixture.tls,
        fixture.request(),
    )
    .await;
    assert_eq!(
        refused.err().unwrap().reason(),
        Reason::PeerIdentityMismatch
    );
    // The same on an existing tunnel.
    let _open = fixture.open().await.unwrap();
    let refused = E::open(
        &fixture.pool,
        &fixture.key,
        &[],
        &fixture.tls,
        fixture.request(),
    )
    .await;
    assert_eq!(
        refused.err().unwrap().reason(),
        Reason::PeerIdentityMismatch
    );
}

pub async fn server_of_another_root_is_rejected<E: Engine>() {
    let mut impostor = Ca::new().issue(SERVER);
    impostor.roots = vec![CA.root.clone()];
    let server = ServerTls::new(&impostor).unwrap();
    let (client, server) = failure_reasons(fixture_with::<E>(client_tls(), server).await).await;
    assert_eq!(
        (client, server),
        (Reason::PeerUntrusted, Reason::RejectedByPeer)
    );
}

pub async fn client_of_another_root_is_rejected_and_both_ends_report_why<E: Engine>() {
    let mut impostor = Ca::new().issue(CLIENT);
    impostor.roots = vec![CA.root.clone()];
    let client = ClientTls::new(&impostor).unwrap();
    let (client, server) = failure_reasons(fixture_with::<E>(client, server_tls()).await).await;
    assert_eq!(
        (client, server),
        (Reason::RejectedByPeer, Reason::PeerUntrusted)
    );
}

pub async fn expired_certificate_is_rejected<E: Engine>() {
    let expire = |params: &mut rcgen::CertificateParams| {
        params.not_after = time::OffsetDateTime::now_utc() - Duration::from_secs(60);
    };
    let client = ClientTls::new(&CA.issue_with(vec![CLIENT], expire)).unwrap();
    let (client, server) = failure_reasons(fixture_with::<E>(client, server_tls()).await).await;
    assert_eq!(
        (client, server),
        (Reason::RejectedByPeer, Reason::PeerUntrusted)
    );
    let server = ServerTls::new(&CA.issue_with(vec![SERVER], expire)).unwrap();
    let (client, server) = failure_reasons(fixture_with::<E>(client_tls(), server).await).await;
    assert_eq!(
        (client, server),
        (Reason::PeerUntrusted, Reason::RejectedByPeer)
    );
}

pub async fn client_without_certificate_is_rejected<E: Engine>() {
    let anonymous = raw::client_config(None, &[&rustls::version::TLS13]);
    assert_eq!(
        rejection_reason::<E>(anonymous).await,
        Reason::PeerWithoutCertificate
    );
}

pub async fn client_with_two_spiffe_ids_is_rejected<E: Engine>() {
    let two = CA.issue_with(vec![CLIENT, OTHER], |_| {});
    let two = raw::client_config(Some(&two), &[&rustls::version::TLS13]);
    assert_eq!(rejection_reason::<E>(two).await, Reason::PeerUntrusted);
}

pub async fn server_with_two_spiffe_ids_is_rejected<E: Engine>() {
    let mut fixture = Fixture::<E>::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    fixture.key.address = listener.local_addr().unwrap();
    spawn_local(async move {
        let two = CA.issue_with(vec![SERVER, OTHER], |_| {});
        raw::accept(listener.accept().await.unwrap().0, &two, &[b"h2"]).await
    });
    assert_eq!(
        fixture.open().await.err().unwrap().reason(),
        Reason::PeerUntrusted
    );
}

pub async fn peer_without_alpn_h2_is_rejected<E: Engine>() {
    let mut config = raw::valid_client();
    config.alpn_protocols.clear();
    assert_eq!(rejection_reason::<E>(config).await, Reason::NotHbone);
    let mut config = raw::valid_client();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert_eq!(rejection_reason::<E>(config).await, Reason::NotHbone);
    let mut fixture = Fixture::<E>::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    fixture.key.address = listener.local_addr().unwrap();
    spawn_local(async move {
        raw::accept(
            listener.accept().await.unwrap().0,
            &raw::server_credentials(),
            &[],
        )
        .await
    });
    assert_eq!(
        fixture.open().await.err().unwrap().reason(),
        Reason::NotHbone
    );
}

pub async fn tls_1_2_is_rejected<E: Engine>() {
    let old = raw::client_config(Some(&CA.issue(CLIENT)), &[&rustls::version::TLS12]);
    assert_eq!(rejection_reason::<E>(old).await, Reason::NotHbone);
}

pub async fn key_exchange_is_hybrid_and_no_session_tickets_are_sent<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let mut tls = raw::tls(raw::valid_client(), fixture.key.address)
        .await
        .unwrap();
    let group = tls
        .get_ref()
        .1
        .negotiated_key_exchange_group()
        .unwrap()
        .name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    tls.read_exact(&mut [0; 9]).await.unwrap();
    assert_eq!(tls.get_ref().1.tls13_tickets_received(), 0);
}

pub async fn certificate_of_another_source_than_the_pool_key_is_rejected<E: Engine>() {
    let fixture = Fixture::<E>::new().await;
    let key = PoolKey {
        source: id(OTHER),
        ..fixture.key.clone()
    };
    let refused = E::open(
        &fixture.pool,
        &key,
        &[id(SERVER)],
        &fixture.tls,
        fixture.request(),
    )
    .await;
    assert_eq!(refused.err().unwrap().reason(), Reason::Internal);
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"x").await;
}

/// Credentials of both ends, each with its own revocation list.
struct RevocableCredentials {
    client: Credentials,
    server: Credentials,
}

impl RevocableCredentials {
    fn new() -> Self {
        let (client, server) = (CA.issue(CLIENT), CA.issue(SERVER));
        Self { client, server }
    }

    async fn fixture<E: Engine>(&self) -> Fixture<E> {
        let client = ClientTls::new(&self.client).unwrap();
        fixture_with(client, ServerTls::new(&self.server).unwrap()).await
    }

    fn revoke_server_at_client(&self) {
        self.client
            .revocations
            .replace(&CA.revoke(&self.server))
            .unwrap();
    }

    fn revoke_client_at_server(&self) {
        self.server
            .revocations
            .replace(&CA.revoke(&self.client))
            .unwrap();
    }
}

pub async fn revoked_peer_is_rejected_and_both_ends_report_why<E: Engine>() {
    let credentials = RevocableCredentials::new();
    credentials.revoke_server_at_client();
    let (client, server) = failure_reasons(credentials.fixture::<E>().await).await;
    assert_eq!(
        (client, server),
        (Reason::PeerRevoked, Reason::RejectedByPeer)
    );
    let credentials = RevocableCredentials::new();
    credentials.revoke_client_at_server();
    let (client, server) = failure_reasons(credentials.fixture::<E>().await).await;
    assert_eq!(
        (client, server),
        (Reason::RejectedByPeer, Reason::PeerRevoked)
    );
}

pub async fn revocation_of_the_server_closes_its_open_tunnel<E: Engine>() {
    let credentials = RevocableCredentials::new();
    let fixture = credentials.fixture::<E>().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"before").await;
    credentials.revoke_server_at_client();
    let summary = c.relay.await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Failed(e) if e.reason() == Reason::PeerRevoked)
    );
    assert_eq!(E::usable_tunnels(&fixture.pool), 0);
    assert_eq!(
        fixture.open().await.err().unwrap().reason(),
        Reason::PeerRevoked
    );
    assert_receives_reset(&mut c.downstream).await;
}

pub async fn revocation_of_the_client_closes_its_open_tunnel<E: Engine>() {
    let credentials = RevocableCredentials::new();
    let mut fixture = credentials.fixture::<E>().await;
    let mut c = fixture.connect().await;
    assert_relays(&mut c, b"before").await;
    credentials.revoke_client_at_server();
    let summary = fixture.upstream_summaries.recv().await.unwrap();
    assert!(
        matches!(summary.outcome, RelayOutcome::Failed(e) if e.reason() == Reason::PeerRevoked)
    );
    let summary = fixture.serve_summaries.recv().await.unwrap();
    assert_eq!(summary.error.unwrap().reason(), Reason::PeerRevoked);
    assert_receives_reset(&mut c.upstream).await;
    wait_until(|| E::usable_tunnels(&fixture.pool) == 0).await;
    assert_eq!(
        fixture.open().await.err().unwrap().reason(),
        Reason::RejectedByPeer
    );
}
