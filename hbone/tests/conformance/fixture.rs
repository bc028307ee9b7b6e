//! Two nodes on loopback: a pool on one, a server on the other, and an application behind each.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{
    Accepted, Authority, ClientTls, ConnectRequest, ConnectResponse, Counters, Error, Peer,
    PoolConfig, PoolKey, Reason, Rejected, RelayOpts, RelaySummary, ServeConfig, ServeSummary,
    ServerTls, SocketFactory, StopToken, TunnelService,
};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio_util::sync::CancellationToken;

use crate::certs::{SERVER, client_tls, id, server_tls};
use crate::engine::Engine;

/// Limit of one scenario, with a margin for a busy machine.
const SCENARIO_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs a scenario like the data plane: on one thread, in a `LocalSet`.
pub fn run(scenario: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let with_timeout = async {
        let (done, scenario_done) = std::sync::mpsc::channel::<()>();
        // On a separate thread, because a scenario may block the runtime or pause tokio's clock.
        let watchdog = std::thread::spawn(move || {
            if scenario_done.recv_timeout(SCENARIO_TIMEOUT)
                == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                eprintln!("the scenario did not end within {SCENARIO_TIMEOUT:?}");
                std::process::abort();
            }
        });
        scenario.await;
        drop(done);
        watchdog.join().unwrap();
    };
    LocalSet::new().block_on(&runtime, with_timeout);
}

/// Loopback sockets, with a count.
#[derive(Default)]
pub struct LoopbackSockets {
    /// Sockets created.
    pub dials: Cell<usize>,
    /// SO_SNDBUF and SO_RCVBUF.
    pub buffers: Cell<Option<u32>>,
}

impl SocketFactory for LoopbackSockets {
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

/// Accepts requests that `decide` accepts, and dials the authority's address. A decision of `None` never resolves.
pub struct TestService {
    pub decide: RefCell<Decision>,
    pub upstream_summaries: mpsc::UnboundedSender<RelaySummary>,
    /// Arguments of `on_bad_request`.
    pub bad_requests: RefCell<Vec<(Reason, String)>>,
    /// Number of calls of `on_refused_stream`.
    pub refused_streams: Cell<usize>,
    /// The result of `accept_tunnel`.
    pub accepts_tunnels: Cell<bool>,
    /// Requests whose decision is pending.
    pub pending: Rc<Cell<usize>>,
}

/// Counts a pending decision until it is dropped.
struct PendingGuard(Rc<Cell<usize>>);

impl Drop for PendingGuard {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl TunnelService for TestService {
    async fn connect(&self, peer: &Peer, request: ConnectRequest) -> Result<Accepted, Rejected> {
        let decide = Rc::clone(&self.decide.borrow());
        let decision = decide(peer, &request)?;
        let Some(opts) = decision else {
            self.pending.set(self.pending.get() + 1);
            let _pending = PendingGuard(Rc::clone(&self.pending));
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
        let summaries = self.upstream_summaries.clone();
        Ok(Accepted {
            upstream,
            response: ConnectResponse {
                baggage: request.baggage,
            },
            opts,
            on_end: Box::new(move |summary| drop(summaries.send(summary))),
        })
    }

    fn on_bad_request(&self, _peer: &Peer, reason: Reason, detail: &str) {
        self.bad_requests
            .borrow_mut()
            .push((reason, detail.to_owned()));
    }

    fn accept_tunnel(&self, _peer: &Peer) -> bool {
        self.accepts_tunnels.get()
    }

    fn on_refused_stream(&self, _peer: &Peer) {
        self.refused_streams.set(self.refused_streams.get() + 1);
    }
}

/// Both nodes, with a test service on the server.
pub struct Fixture<E: Engine> {
    pub pool: Rc<E::Pool>,
    pub tls: ClientTls,
    pub key: PoolKey,
    pub sockets: Rc<LoopbackSockets>,
    pub service: Rc<TestService>,
    pub drain: CancellationToken,
    pub abort: CancellationToken,
    /// TCP connections that the server has accepted.
    pub connections: Rc<Cell<usize>>,
    pub upstream_summaries: mpsc::UnboundedReceiver<RelaySummary>,
    pub serve_summaries: mpsc::UnboundedReceiver<ServeSummary>,
    accept_task: JoinHandle<()>,
    listener: Option<Rc<TcpListener>>,
    app: TcpListener,
}

impl<E: Engine> Fixture<E> {
    pub async fn with_config(config: PoolConfig, serve: ServeConfig) -> Self {
        Self::with_tls(client_tls(), server_tls(), config, serve).await
    }

    pub async fn with_tls(
        tls: ClientTls,
        server: ServerTls,
        config: PoolConfig,
        serve: ServeConfig,
    ) -> Self {
        let listener = Rc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let (upstream_sender, upstream_summaries) = mpsc::unbounded_channel();
        let (serve_sender, serve_summaries) = mpsc::unbounded_channel();
        let service = Rc::new(TestService {
            decide: RefCell::new(Rc::new(|_, _| Ok(Some(RelayOpts::default())))),
            upstream_summaries: upstream_sender,
            bad_requests: RefCell::default(),
            refused_streams: Cell::new(0),
            accepts_tunnels: Cell::new(true),
            pending: Rc::default(),
        });
        let (drain, abort) = (CancellationToken::new(), CancellationToken::new());
        let connections = Rc::new(Cell::new(0));
        let tokens = (drain.clone(), abort.clone());
        let (test_service, count) = (Rc::clone(&service), Rc::clone(&connections));
        let accepting = Rc::clone(&listener);
        let accept_task = spawn_local(async move {
            loop {
                let (tcp, _) = accepting.accept().await.unwrap();
                count.set(count.get() + 1);
                let (server, serve, service) =
                    (server.clone(), serve.clone(), Rc::clone(&test_service));
                let ((drain, abort), summaries) = (tokens.clone(), serve_sender.clone());
                spawn_local(async move {
                    let summary = E::serve(tcp, &server, service, &serve, drain, abort).await;
                    drop(summaries.send(summary));
                });
            }
        });
        let sockets = Rc::new(LoopbackSockets::default());
        Self {
            pool: Rc::new(E::pool(config, Rc::<LoopbackSockets>::clone(&sockets))),
            key: PoolKey {
                source: tls.identity().clone(),
                destination: Arc::from("cluster//Pod/b/server/1"),
                address,
            },
            tls,
            sockets,
            service,
            drain,
            abort,
            connections,
            upstream_summaries,
            serve_summaries,
            accept_task,
            listener: Some(listener),
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

    /// Uses a small receive buffer for the application behind the server, so that it fills up soon.
    pub async fn with_small_upstream_buffers(mut self) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        self.app = socket.listen(16).unwrap();
        self
    }

    /// Uses small kernel buffers for tunnels, so that a writer soon waits for its reader.
    pub fn with_small_tunnel_buffers(self) -> Self {
        const SMALL: u32 = 32 * 1024;
        self.sockets.buffers.set(Some(SMALL));
        let listener = SockRef::from(&**self.listener.as_ref().unwrap());
        listener.set_send_buffer_size(SMALL as usize).unwrap();
        listener.set_recv_buffer_size(SMALL as usize).unwrap();
        self
    }

    /// Accepts the next connection as the application behind the server.
    pub async fn upstream(&self) -> TcpStream {
        self.app.accept().await.unwrap().0
    }

    /// Closes the server's listener.
    pub async fn stop_listening(&mut self) {
        self.accept_task.abort();
        self.listener = None;
        let _cancelled = (&mut self.accept_task).await;
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

/// A path between two applications, to which the tests of TCP semantics apply.
pub trait Path: Sized {
    async fn new() -> Self;
    async fn connect_with(&self, opts: RelayOpts) -> Connection;

    async fn connect(&self) -> Connection {
        self.connect_with(RelayOpts::default()).await
    }
}

impl<E: Engine> Path for Fixture<E> {
    async fn new() -> Self {
        Self::with_config(PoolConfig::default(), ServeConfig::default()).await
    }

    async fn connect_with(&self, opts: RelayOpts) -> Connection {
        let stream = self.open().await.unwrap();
        let (downstream, relayed) = socket_pair().await;
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

/// A relay between two TCP sockets, without a tunnel.
pub struct PlainTcp;

impl Path for PlainTcp {
    async fn new() -> Self {
        Self
    }

    async fn connect_with(&self, opts: RelayOpts) -> Connection {
        let ((downstream, accepted), (dialled, upstream)) =
            (socket_pair().await, socket_pair().await);
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
pub async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a, b) = tokio::join!(
        TcpStream::connect(listener.local_addr().unwrap()),
        listener.accept()
    );
    (a.unwrap(), b.unwrap().0)
}

/// Waits for a condition that other tasks of this thread make true.
pub async fn wait_until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
