//! Who is believed to be whom.

use std::time::Duration;

use hbone::{
    ClientTls, Credentials, PoolConfig, PoolKey, Reason, RelayOutcome, Revocations, ServeConfig,
    ServeOutcome, ServerTls,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::spawn_local;

use crate::engine::Engine;
use crate::raw;
use crate::tcp::{ask, assert_reset_seen};
use crate::world::{CA, CLIENT, Ca, SERVER, Way, World, client_tls, id, server_tls, until};

const OTHER: &str = "spiffe://cluster.local/ns/b/sa/other";

async fn world_of<E: Engine>(client: ClientTls, server: ServerTls) -> World<E> {
    World::of(
        client,
        server,
        PoolConfig::default(),
        ServeConfig::default(),
    )
    .await
}

/// The client's reason, and the server's.
async fn reasons<E: Engine>(mut world: World<E>) -> (Reason, Reason) {
    let refused = world.open().await.err().unwrap();
    assert_eq!(refused.peer(), Some(world.key.address));
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!((end.outcome, end.streams), (ServeOutcome::Failed, 0));
    (refused.reason(), end.error.unwrap().reason())
}

/// The server's reason for refusing a client that keeps no rules.
async fn refusal<E: Engine>(config: rustls::ClientConfig) -> Reason {
    let mut world = World::<E>::new().await;
    if let Ok(mut tls) = raw::tls(config, world.key.address).await {
        // TLS 1.3 tells a client only afterwards.
        let _alert = tls.read_to_end(&mut Vec::new()).await;
    }
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.outcome, ServeOutcome::Failed);
    end.error.unwrap().reason()
}

pub async fn both_sides_learn_the_identity_of_the_other<E: Engine>() {
    let mut world = World::<E>::new().await;
    let mut stream = world.open().await.unwrap();
    assert_eq!(E::peer(&stream), id(SERVER));
    E::response(&mut stream).await.unwrap();
    drop((stream, world.upstream().await));
    world.drain.cancel();
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.peer.unwrap().identity, id(CLIENT));
    assert_eq!(
        (end.outcome, end.streams),
        (ServeOutcome::Drained, 1),
        "{:?}",
        end.error
    );
}

pub async fn a_peer_with_another_identity_is_refused_before_http<E: Engine>() {
    let server = ServerTls::new(&CA.issue(OTHER)).unwrap();
    let (client, server) = reasons(world_of::<E>(client_tls(), server).await).await;
    assert_eq!(client, Reason::PeerIdentityMismatch);
    assert_eq!(server, Reason::H2HandshakeFailed);
}

pub async fn nobody_is_expected_so_nobody_is_accepted<E: Engine>() {
    let world = World::<E>::new().await;
    let refused = E::open(&world.pool, &world.key, &[], &world.tls, world.request()).await;
    assert_eq!(
        refused.err().unwrap().reason(),
        Reason::PeerIdentityMismatch
    );
    // Not even on a tunnel that exists.
    let _open = world.open().await.unwrap();
    let refused = E::open(&world.pool, &world.key, &[], &world.tls, world.request()).await;
    assert_eq!(
        refused.err().unwrap().reason(),
        Reason::PeerIdentityMismatch
    );
}

pub async fn a_server_of_another_root_is_refused<E: Engine>() {
    let mut impostor = Ca::new().issue(SERVER);
    impostor.roots = vec![CA.root.clone()];
    let server = ServerTls::new(&impostor).unwrap();
    let (client, server) = reasons(world_of::<E>(client_tls(), server).await).await;
    assert_eq!(
        (client, server),
        (Reason::PeerUntrusted, Reason::RejectedByPeer)
    );
}

pub async fn a_client_of_another_root_is_refused_and_both_know_why<E: Engine>() {
    let mut impostor = Ca::new().issue(CLIENT);
    impostor.roots = vec![CA.root.clone()];
    let client = ClientTls::new(&impostor).unwrap();
    let (client, server) = reasons(world_of::<E>(client, server_tls()).await).await;
    assert_eq!(
        (client, server),
        (Reason::RejectedByPeer, Reason::PeerUntrusted)
    );
}

pub async fn an_expired_certificate_is_refused<E: Engine>() {
    let expire = |params: &mut rcgen::CertificateParams| {
        params.not_after = time::OffsetDateTime::now_utc() - Duration::from_secs(60);
    };
    let client = ClientTls::new(&CA.issue_with(vec![CLIENT], expire)).unwrap();
    let (client, server) = reasons(world_of::<E>(client, server_tls()).await).await;
    assert_eq!(
        (client, server),
        (Reason::RejectedByPeer, Reason::PeerUntrusted)
    );
    let server = ServerTls::new(&CA.issue_with(vec![SERVER], expire)).unwrap();
    let (client, server) = reasons(world_of::<E>(client_tls(), server).await).await;
    assert_eq!(
        (client, server),
        (Reason::PeerUntrusted, Reason::RejectedByPeer)
    );
}

pub async fn a_client_without_a_certificate_is_refused<E: Engine>() {
    let nobody = raw::client_config(None, &[&rustls::version::TLS13]);
    assert_eq!(refusal::<E>(nobody).await, Reason::PeerWithoutCertificate);
}

pub async fn a_client_with_two_identities_is_refused<E: Engine>() {
    let two = CA.issue_with(vec![CLIENT, OTHER], |_| {});
    let two = raw::client_config(Some(&two), &[&rustls::version::TLS13]);
    assert_eq!(refusal::<E>(two).await, Reason::PeerUntrusted);
}

pub async fn a_server_with_two_identities_is_refused<E: Engine>() {
    let mut world = World::<E>::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.key.address = listener.local_addr().unwrap();
    spawn_local(async move {
        let two = CA.issue_with(vec![SERVER, OTHER], |_| {});
        raw::accept(listener.accept().await.unwrap().0, &two, &[b"h2"]).await
    });
    assert_eq!(
        world.open().await.err().unwrap().reason(),
        Reason::PeerUntrusted
    );
}

pub async fn a_peer_without_alpn_is_refused<E: Engine>() {
    let mut config = raw::good_client();
    config.alpn_protocols.clear();
    assert_eq!(refusal::<E>(config).await, Reason::NotHbone);
    let mut config = raw::good_client();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert_eq!(refusal::<E>(config).await, Reason::NotHbone);
    let mut world = World::<E>::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.key.address = listener.local_addr().unwrap();
    spawn_local(async move {
        raw::accept(
            listener.accept().await.unwrap().0,
            &raw::server_credentials(),
            &[],
        )
        .await
    });
    assert_eq!(world.open().await.err().unwrap().reason(), Reason::NotHbone);
}

pub async fn tls_1_2_is_refused<E: Engine>() {
    let old = raw::client_config(Some(&CA.issue(CLIENT)), &[&rustls::version::TLS12]);
    assert_eq!(refusal::<E>(old).await, Reason::NotHbone);
}

pub async fn the_key_exchange_is_hybrid_and_no_tickets_are_sent<E: Engine>() {
    let world = World::<E>::new().await;
    let mut tls = raw::tls(raw::good_client(), world.key.address)
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

pub async fn a_certificate_that_is_not_the_pool_keys_is_refused<E: Engine>() {
    let world = World::<E>::new().await;
    let key = PoolKey {
        source: id(OTHER),
        ..world.key.clone()
    };
    let refused = E::open(
        &world.pool,
        &key,
        &[id(SERVER)],
        &world.tls,
        world.request(),
    )
    .await;
    assert_eq!(refused.err().unwrap().reason(), Reason::Internal);
    let mut c = world.connect().await;
    ask(&mut c, b"x").await;
}

/// Both ends with one list of revocations each.
struct Revocable {
    client: Credentials,
    server: Credentials,
}

impl Revocable {
    fn new() -> Self {
        let (mut client, mut server) = (CA.issue(CLIENT), CA.issue(SERVER));
        // Each process has a list of its own.
        client.revocations = Revocations::none();
        server.revocations = Revocations::none();
        Self { client, server }
    }

    async fn world<E: Engine>(&self) -> World<E> {
        let client = ClientTls::new(&self.client).unwrap();
        world_of(client, ServerTls::new(&self.server).unwrap()).await
    }

    fn client_learns_of_the_server(&self) {
        self.client
            .revocations
            .replace(&CA.revoke(&self.server))
            .unwrap();
    }

    fn server_learns_of_the_client(&self) {
        self.server
            .revocations
            .replace(&CA.revoke(&self.client))
            .unwrap();
    }
}

pub async fn a_revoked_peer_is_refused_and_both_know_why<E: Engine>() {
    let ends = Revocable::new();
    ends.client_learns_of_the_server();
    let (client, server) = reasons(ends.world::<E>().await).await;
    assert_eq!(
        (client, server),
        (Reason::PeerRevoked, Reason::RejectedByPeer)
    );
    let ends = Revocable::new();
    ends.server_learns_of_the_client();
    let (client, server) = reasons(ends.world::<E>().await).await;
    assert_eq!(
        (client, server),
        (Reason::RejectedByPeer, Reason::PeerRevoked)
    );
}

pub async fn a_revocation_ends_the_open_tunnel_of_a_server<E: Engine>() {
    let ends = Revocable::new();
    let world = ends.world::<E>().await;
    let mut c = world.connect().await;
    ask(&mut c, b"before").await;
    ends.client_learns_of_the_server();
    let end = c.relay.await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Failed(e) if e.reason() == Reason::PeerRevoked));
    assert_eq!(E::tunnels(&world.pool), 0);
    assert_eq!(
        world.open().await.err().unwrap().reason(),
        Reason::PeerRevoked
    );
    assert_reset_seen(&mut c.downstream).await;
}

pub async fn a_revocation_ends_the_open_tunnel_of_a_client<E: Engine>() {
    let ends = Revocable::new();
    let mut world = ends.world::<E>().await;
    let mut c = world.connect().await;
    ask(&mut c, b"before").await;
    ends.server_learns_of_the_client();
    let end = world.upstream_ends.recv().await.unwrap();
    assert!(matches!(end.outcome, RelayOutcome::Failed(e) if e.reason() == Reason::PeerRevoked));
    let end = world.serve_ends.recv().await.unwrap();
    assert_eq!(end.error.unwrap().reason(), Reason::PeerRevoked);
    assert_reset_seen(&mut c.upstream).await;
    until(|| E::tunnels(&world.pool) == 0).await;
    assert_eq!(
        world.open().await.err().unwrap().reason(),
        Reason::RejectedByPeer
    );
}
