//! Two nodes on loopback: a pool on one, a server on the other, and applications behind both.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use hbone::{
    Accepted, Authority, ClientTls, ConnectRequest, ConnectResponse, Counters, Credentials, Error,
    Peer, PoolConfig, PoolKey, Reason, Rejected, RelayOpts, RelaySummary, Revocations, ServeConfig,
    ServeSummary, ServerTls, SocketFactory, StopToken, TunnelService,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use socket2::SockRef;
use spiffe::SpiffeId;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio_util::sync::CancellationToken;

use crate::engine::Engine;

pub const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
pub const SERVER: &str = "spiffe://cluster.local/ns/b/sa/server";

/// No scenario takes longer, on a machine that is busy with other things too.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a scenario as the data plane does: on one thread, in a `LocalSet`.
pub fn run(scenario: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let limited = async {
        let (done, overdue) = std::sync::mpsc::channel::<()>();
        // On a thread of its own, because a scenario may pause tokio's clock.
        let watchdog = std::thread::spawn(move || {
            if overdue.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("the scenario hangs");
                std::process::abort();
            }
        });
        scenario.await;
        drop(done);
        watchdog.join().unwrap();
    };
    LocalSet::new().block_on(&runtime, limited);
}

pub fn id(uri: &str) -> SpiffeId {
    SpiffeId::new(uri).unwrap()
}

/// A certificate authority.
pub struct Ca {
    pub root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        Self {
            root,
            issuer: Issuer::new(params, key),
        }
    }

    pub fn issue(&self, identity: &str) -> Credentials {
        self.issue_with(vec![identity], |_| {})
    }

    pub fn issue_with(
        &self,
        uris: Vec<&str>,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Credentials {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = uris
            .into_iter()
            .map(|uri| SanType::URI(uri.try_into().unwrap()))
            .collect();
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Credentials {
            chain: vec![leaf.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            roots: vec![self.root.clone()],
            revocations: Revocations::none(),
        }
    }
}

impl Ca {
    /// A list that revokes these credentials' certificate.
    pub fn revoke(&self, credentials: &Credentials) -> Vec<u8> {
        let (_, leaf) = x509_parser::parse_x509_certificate(&credentials.chain[0]).unwrap();
        let now = OffsetDateTime::now_utc();
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from_slice(leaf.raw_serial()),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Duration::from_secs(3600),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

/// The mesh's CA.
pub static CA: LazyLock<Ca> = LazyLock::new(Ca::new);

pub fn client_tls() -> ClientTls {
    ClientTls::new(&CA.issue(CLIENT)).unwrap()
}

pub fn server_tls() -> ServerTls {
    ServerTls::new(&CA.issue(SERVER)).unwrap()
}

/// Plain loopback sockets, counted.
#[derive(Default)]
pub struct Loopback {
    pub dials: Cell<usize>,
    /// SO_SNDBUF and SO_RCVBUF.
    pub buffers: Cell<Option<u32>>,
}

impl SocketFactory for Loopback {
    fn new_tcp(&self, to: SocketAddr) -> io::Result<TcpSocket> {
        self.dials.set(self.dials.get() + 1);
        let socket = if to.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        if let Some(size) = self.buffers.get() {
            socket.set_send_buffer_size(size)?;
            socket.set_recv_buffer_size(size)?;
        }
        Ok(socket)
    }
}

type Decision = Rc<dyn Fn(&Peer, &ConnectRequest) -> Result<Option<RelayOpts>, Rejected>>;

/// Accepts what `decide` accepts, and dials the authority's address. `None` waits for ever.
pub struct Dialer {
    pub decide: RefCell<Decision>,
    pub upstream_ends: mpsc::UnboundedSender<RelaySummary>,
    pub refusals: RefCell<Vec<(Reason, String)>>,
    /// Streams that were refused because earlier ones hold too much.
    pub overloads: Cell<usize>,
    /// Whether tunnels are served.
    pub admits: Cell<bool>,
    /// SO_SNDBUF of the upstream sockets.
    pub send_buffer: Cell<Option<u32>>,
    /// Requests whose decision is pending.
    pub pending: Rc<Cell<usize>>,
}

struct Pending(Rc<Cell<usize>>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl TunnelService for Dialer {
    async fn connect(&self, peer: &Peer, request: ConnectRequest) -> Result<Accepted, Rejected> {
        let decide = Rc::clone(&self.decide.borrow());
        let decision = decide(peer, &request)?;
        let Some(opts) = decision else {
            self.pending.set(self.pending.get() + 1);
            let _pending = Pending(Rc::clone(&self.pending));
            return std::future::pending().await;
        };
        let Authority::Address(address) = request.authority else {
            return Err(Rejected {
                status: 400,
                reason: "not_an_address",
            });
        };
        let upstream = TcpStream::connect(address).await.map_err(|_| Rejected {
            status: 503,
            reason: "connect_failed",
        })?;
        let ends = self.upstream_ends.clone();
        Ok(Accepted {
            upstream,
            response: ConnectResponse {
                baggage: request.baggage,
            },
            opts,
            on_end: Box::new(move |end| drop(ends.send(end))),
        })
    }

    fn on_bad_request(&self, _peer: &Peer, reason: Reason, detail: &str) {
        self.refusals.borrow_mut().push((reason, detail.to_owned()));
    }

    fn accept_tunnel(&self, _peer: &Peer) -> bool {
        self.admits.get()
    }

    fn on_refused_stream(&self, _peer: &Peer) {
        self.overloads.set(self.overloads.get() + 1);
    }
}

/// Both nodes.
pub struct World<E: Engine> {
    pub pool: Rc<E::Pool>,
    pub tls: ClientTls,
    pub key: PoolKey,
    pub sockets: Rc<Loopback>,
    pub dialer: Rc<Dialer>,
    pub drain: CancellationToken,
    pub abort: CancellationToken,
    /// Transports that the server has accepted.
    pub accepted: Rc<Cell<usize>>,
    pub upstream_ends: mpsc::UnboundedReceiver<RelaySummary>,
    pub serve_ends: mpsc::UnboundedReceiver<ServeSummary>,
    listener: JoinHandle<()>,
    listening: Option<Rc<TcpListener>>,
    app: TcpListener,
}

impl<E: Engine> World<E> {
    pub async fn with(config: PoolConfig, serve: ServeConfig) -> Self {
        Self::of(client_tls(), server_tls(), config, serve).await
    }

    pub async fn of(
        tls: ClientTls,
        server: ServerTls,
        config: PoolConfig,
        serve: ServeConfig,
    ) -> Self {
        let listening = Rc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listening.local_addr().unwrap();
        let (ends, upstream_ends) = mpsc::unbounded_channel();
        let (serve_end, serve_ends) = mpsc::unbounded_channel();
        let dialer = Rc::new(Dialer {
            decide: RefCell::new(Rc::new(|_, _| Ok(Some(RelayOpts::default())))),
            upstream_ends: ends,
            refusals: RefCell::default(),
            overloads: Cell::new(0),
            admits: Cell::new(true),
            send_buffer: Cell::new(None),
            pending: Rc::default(),
        });
        let (drain, abort) = (CancellationToken::new(), CancellationToken::new());
        let accepted = Rc::new(Cell::new(0));
        let tokens = (drain.clone(), abort.clone());
        let (connect, count) = (Rc::clone(&dialer), Rc::clone(&accepted));
        let listens = Rc::clone(&listening);
        let listener = spawn_local(async move {
            loop {
                let (transport, _) = listens.accept().await.unwrap();
                count.set(count.get() + 1);
                let (server, serve, connect) = (server.clone(), serve.clone(), Rc::clone(&connect));
                let ((drain, abort), serve_end) = (tokens.clone(), serve_end.clone());
                spawn_local(async move {
                    let end = E::serve(transport, &server, connect, &serve, drain, abort).await;
                    drop(serve_end.send(end));
                });
            }
        });
        let sockets = Rc::new(Loopback::default());
        Self {
            pool: Rc::new(E::pool(config, Rc::<Loopback>::clone(&sockets))),
            key: PoolKey {
                source: tls.identity().clone(),
                destination: Arc::from("cluster//Pod/b/server/1"),
                address,
            },
            tls,
            sockets,
            dialer,
            drain,
            abort,
            accepted,
            upstream_ends,
            serve_ends,
            listener,
            listening: Some(listening),
            app: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        }
    }

    pub fn request(&self) -> ConnectRequest {
        ConnectRequest::new(Authority::from(self.app.local_addr().unwrap()))
    }

    pub async fn open(&self) -> Result<E::Stream, Error> {
        E::open(
            &self.pool,
            &self.key,
            &[id(SERVER)],
            &self.tls,
            self.request(),
        )
        .await
    }

    /// Makes the kernel hold next to nothing between the server and its application, as when the application has not
    /// read for long.
    pub async fn with_small_upstream_buffers(mut self) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        self.app = socket.listen(16).unwrap();
        self.dialer.send_buffer.set(Some(4096));
        self
    }

    /// Makes the kernel hold next to nothing of a tunnel, so that what is written waits for its reader at once.
    pub fn with_small_tunnel_buffers(self) -> Self {
        const SMALL: u32 = 32 * 1024;
        self.sockets.buffers.set(Some(SMALL));
        let listening = SockRef::from(&**self.listening.as_ref().unwrap());
        listening.set_send_buffer_size(SMALL as usize).unwrap();
        listening.set_recv_buffer_size(SMALL as usize).unwrap();
        self
    }

    /// The next connection at the application behind the server.
    pub async fn upstream(&self) -> TcpStream {
        self.app.accept().await.unwrap().0
    }

    /// No more tunnels are accepted.
    pub async fn stop_listening(&mut self) {
        self.listener.abort();
        self.listening = None;
        let _cancelled = (&mut self.listener).await;
    }
}

/// One application connection through the tunnel.
pub struct Connection {
    pub downstream: TcpStream,
    pub upstream: TcpStream,
    pub relay: JoinHandle<RelaySummary>,
    pub counters: Arc<Counters>,
    pub stop: StopToken,
}

/// A way for bytes from one application to another.
pub trait Way: Sized {
    async fn new() -> Self;
    async fn connect_with(&self, opts: RelayOpts) -> Connection;

    async fn connect(&self) -> Connection {
        self.connect_with(RelayOpts::default()).await
    }
}

impl<E: Engine> Way for World<E> {
    async fn new() -> Self {
        Self::with(PoolConfig::default(), ServeConfig::default()).await
    }

    async fn connect_with(&self, opts: RelayOpts) -> Connection {
        let stream = self.open().await.unwrap();
        let (downstream, relayed) = pair().await;
        let (counters, stop) = (Arc::clone(&opts.counters), opts.stop.clone());
        let relay = spawn_local(E::relay(stream, relayed, opts));
        Connection {
            downstream,
            upstream: self.upstream().await,
            relay,
            counters,
            stop,
        }
    }
}

/// The plain leg, without a tunnel.
pub struct Plain;

impl Way for Plain {
    async fn new() -> Self {
        Self
    }

    async fn connect_with(&self, opts: RelayOpts) -> Connection {
        let ((downstream, accepted), (dialled, upstream)) = (pair().await, pair().await);
        let (counters, stop) = (Arc::clone(&opts.counters), opts.stop.clone());
        let relay = spawn_local(hbone::relay_tcp(accepted, dialled, opts));
        Connection {
            downstream,
            upstream,
            relay,
            counters,
            stop,
        }
    }
}

/// A connected pair of sockets.
pub async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(
        TcpStream::connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    (a.unwrap(), b.unwrap().0)
}

/// Waits until something is true, which other tasks of this thread make true.
pub async fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
