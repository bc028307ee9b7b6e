//! A tunnel that we dial: TCP, TLS, the peer's identity, HTTP/2, and the task that drives it.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::ops::Deref;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use h2::client::{Builder, Connection, SendRequest};
use h2::{Ping, PingPong};
use rustls_pki_types::ServerName;
use spiffe::SpiffeId;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::heart::{Beat, Heart};
use super::stream::Stream;
use super::transport::{Cause, Link, Transport};
use super::{
    MAX_FRAME, RESET_MEMORY, RESETS_REMEMBERED, SEND_BUFFER, SMALL_FRAME_BUDGET, TLS_BUFFER,
    connection_window, head,
};
use crate::connect::ConnectRequest;
use crate::error::Error;
use crate::pool::{PoolConfig, Sockets};
use crate::reason::Reason;
use crate::relay::Chunk;
use crate::tls::{ALPN, ClientTls, classify_io, of_leaf};

/// A response has fewer headers than a request, and this peer is less trusted than our own configuration.
const MAX_RESPONSE_HEADERS: u32 = 16 * 1024;

type Wire = Link<TlsStream<Transport>>;

/// What it takes to open a tunnel.
pub(crate) struct Dial {
    pub(crate) config: Rc<PoolConfig>,
    pub(crate) sockets: Rc<dyn Sockets>,
    pub(crate) address: SocketAddr,
    pub(crate) expect: Vec<SpiffeId>,
    pub(crate) tls: ClientTls,
}

/// The connection itself, for [`drive`].
pub(crate) struct Driver {
    connection: Connection<Wire, Chunk>,
    ping: Option<PingPong>,
    tunnel: Rc<Tunnel>,
}

impl Dial {
    /// Connects, verifies the peer, and waits for its SETTINGS, each step within its deadline.
    pub(crate) async fn run(self) -> Result<(Rc<Tunnel>, Driver), Error> {
        let config = Rc::clone(&self.config);
        let cause = Cause::new(self.address);
        let steps = async {
            let tcp = within(
                config.connect_timeout,
                Reason::ConnectTimeout,
                self.connect(),
            )
            .await?;
            let transport = Transport::new(tcp, config.ping_timeout, cause.clone());
            let tls = self.handshake(transport);
            let (stream, peer) =
                within(config.tls_timeout, Reason::TlsHandshakeTimeout, tls).await?;
            let link = Link::new(stream, cause.clone());
            let h2 = self.settings(link, &cause);
            let h2 = within(config.h2_timeout, Reason::H2HandshakeTimeout, h2).await?;
            Ok((peer, h2))
        };
        let (peer, (send, mut connection)) = steps.await.map_err(|e: Error| e.at(self.address))?;
        let ping = connection.ping_pong();
        let tunnel = Rc::new(Tunnel {
            peer,
            config,
            cause,
            send: RefCell::new(Some(send)),
            streams: Cell::new(0),
            idle_since: Cell::new(Instant::now()),
            load: Load::default(),
        });
        Ok((
            Rc::clone(&tunnel),
            Driver {
                connection,
                ping,
                tunnel,
            },
        ))
    }

    async fn connect(&self) -> Result<TcpStream, Error> {
        let socket = self
            .sockets
            .tcp(self.address)
            .map_err(|e| Error::new(Reason::SocketFailed).caused_by(e))?;
        socket.connect(self.address).await.map_err(|e| {
            let reason = match e.kind() {
                std::io::ErrorKind::ConnectionRefused => Reason::ConnectRefused,
                std::io::ErrorKind::TimedOut => Reason::ConnectTimeout,
                std::io::ErrorKind::HostUnreachable | std::io::ErrorKind::NetworkUnreachable => {
                    Reason::HostUnreachable
                }
                _ => Reason::ConnectFailed,
            };
            Error::new(reason).caused_by(e)
        })
    }

    /// TLS, and the check that the peer is one of those expected: before any byte of HTTP/2 is written.
    async fn handshake(&self, io: Transport) -> Result<(TlsStream<Transport>, SpiffeId), Error> {
        let name = ServerName::IpAddress(self.address.ip().into());
        let connector = TlsConnector::from(self.tls.config());
        let stream = connector
            .connect_with(name, io, |tls| tls.set_buffer_limit(Some(TLS_BUFFER)))
            .await
            .map_err(|e| classify_io(e, Reason::TlsHandshakeFailed))?;
        let (_, tls) = stream.get_ref();
        let leaf = tls.peer_certificates().and_then(<[_]>::first);
        let leaf = leaf.ok_or(Reason::PeerWithoutCertificate)?;
        let peer = of_leaf(leaf).map_err(|e| Error::new(Reason::PeerUntrusted).caused_by(e))?;
        if !self.expect.contains(&peer) {
            return Err(Error::new(Reason::PeerIdentityMismatch).because(format!("it is {peer}")));
        }
        if tls.alpn_protocol() != Some(ALPN) {
            return Err(Error::new(Reason::NotHbone).because("no ALPN"));
        }
        Ok((stream, peer))
    }

    /// HTTP/2 up to the peer's SETTINGS: only then is its stream limit known, and that it has accepted our certificate,
    /// which TLS 1.3 does not tell the client.
    async fn settings(
        &self,
        link: Wire,
        cause: &Cause,
    ) -> Result<(SendRequest<Chunk>, Connection<Wire, Chunk>), Error> {
        let failed = |e: h2::Error| match cause.error() {
            Some(error) if error.reason() != Reason::TunnelClosed => error,
            _ => Error::new(Reason::H2HandshakeFailed).caused_by(e),
        };
        let handshake = builder(&self.config).handshake(link).await;
        let (send, mut connection) = handshake.map_err(failed)?;
        poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(failed(e))),
            Poll::Ready(Ok(())) => Poll::Ready(Err(Reason::H2HandshakeFailed.into())),
            Poll::Pending if connection.max_concurrent_send_streams() > 0 => Poll::Ready(Ok(())),
            Poll::Pending => Poll::Pending,
        })
        .await?;
        Ok((send, connection))
    }
}

async fn within<T>(
    time: Duration,
    late: Reason,
    step: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    timeout(time, step)
        .await
        .unwrap_or_else(|_| Err(late.into()))
}

fn builder(config: &PoolConfig) -> Builder {
    let streams = u32::try_from(config.streams_per_tunnel).unwrap_or(u32::MAX);
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        // None before the peer's SETTINGS have come, see `settings`.
        .initial_max_send_streams(0)
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(connection_window(config.stream_window, streams))
        .data_frame_budget(SMALL_FRAME_BUDGET)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_RESPONSE_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(RESETS_REMEMBERED)
        .reset_stream_duration(RESET_MEMORY);
    builder
}

/// An open tunnel, as the pool and its streams see it.
pub(crate) struct Tunnel {
    peer: SpiffeId,
    config: Rc<PoolConfig>,
    cause: Cause,
    /// None once no new streams may be opened. h2 closes the connection when this and all streams are gone.
    send: RefCell<Option<SendRequest<Chunk>>>,
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    load: Load,
}

impl Tunnel {
    /// Sends a CONNECT. Fails only if the tunnel takes no streams any more; it is not to be chosen again then.
    pub(crate) fn open(self: &Rc<Self>, connect: &ConnectRequest) -> Result<Stream, Error> {
        let request = head::request(connect)?;
        let Some(mut send) = self.send.borrow().clone() else {
            return Err(Reason::GoAway.into());
        };
        match send.send_request(request, false) {
            Ok((response, stream)) => {
                let deadline = Instant::now() + self.config.response_timeout;
                Ok(Stream::new(
                    stream,
                    response,
                    deadline,
                    TunnelLease::new(self),
                ))
            }
            Err(error) => {
                self.retire();
                let _why_it_takes_none = error;
                Err(Error::new(Reason::GoAway).at(self.address()))
            }
        }
    }

    /// Takes no more streams, and closes when those that are open have ended.
    pub(crate) fn retire(&self) {
        self.send.borrow_mut().take();
    }

    /// Whether new streams may be opened.
    pub(crate) fn usable(&self) -> bool {
        self.send.borrow().is_some()
    }

    /// Streams that are open.
    pub(crate) fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Streams that may be open at once: ours and the peer's limit.
    pub(crate) fn limit(&self) -> usize {
        let peers = self
            .send
            .borrow()
            .as_ref()
            .map_or(0, SendRequest::current_max_send_streams);
        peers.min(self.config.streams_per_tunnel)
    }

    /// Whether it moves so many bytes that another stream had better have its own.
    pub(crate) fn busy(&self) -> bool {
        self.load.busy(Instant::now())
    }

    pub(crate) fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.cause.peer()
    }

    pub(super) fn cause(&self) -> &Cause {
        &self.cause
    }

    pub(super) fn load(&self) -> &Load {
        &self.load
    }
}

/// Counts one stream on its tunnel while it lives.
pub(super) struct TunnelLease(Rc<Tunnel>);

impl TunnelLease {
    fn new(tunnel: &Rc<Tunnel>) -> Self {
        tunnel.streams.set(tunnel.streams.get() + 1);
        Self(Rc::clone(tunnel))
    }
}

impl Deref for TunnelLease {
    type Target = Tunnel;

    fn deref(&self) -> &Tunnel {
        &self.0
    }
}

impl Drop for TunnelLease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get().saturating_sub(1));
        if self.0.streams.get() == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Bytes that a tunnel has moved lately.
#[derive(Default)]
pub(super) struct Load {
    since: Cell<Option<Instant>>,
    current: Cell<usize>,
    last: Cell<usize>,
}

/// The time over which bytes are summed up.
const LOAD_WINDOW: Duration = Duration::from_millis(100);

/// 160 Mbit/s. One core drives a tunnel at some 3 Gbit/s, so this is one that already takes a visible part of it.
const BUSY: usize = 2 * 1024 * 1024;

impl Load {
    pub(super) fn add(&self, n: usize) {
        self.rotate(Instant::now());
        self.current.set(self.current.get() + n);
    }

    fn busy(&self, now: Instant) -> bool {
        self.rotate(now);
        self.current.get().max(self.last.get()) >= BUSY
    }

    fn rotate(&self, now: Instant) {
        let age = now - self.since.get().unwrap_or(now);
        if self.since.get().is_none() || age >= LOAD_WINDOW {
            let last = if age < LOAD_WINDOW * 2 {
                self.current.get()
            } else {
                0
            };
            self.last.set(last);
            self.current.set(0);
            self.since.set(Some(now));
        }
    }
}

/// Drives a tunnel until it has closed: by the peer, by [`Tunnel::retire`] and the end of its streams, because it was
/// idle or dead, or at once by `abort`.
pub(crate) async fn drive(driver: Driver, abort: CancellationToken) {
    let Driver {
        mut connection,
        mut ping,
        tunnel,
    } = driver;
    let Tunnel { config, cause, .. } = &*tunnel;
    let mut heart = Heart::new(config.ping_interval, config.ping_timeout, Instant::now());
    loop {
        let idle_at = tunnel.idle_since.get() + config.idle_timeout;
        let idle = tunnel.streams() == 0 && tunnel.usable();
        let due = if idle {
            heart.due().min(idle_at)
        } else {
            heart.due()
        };
        tokio::select! {
            biased;
            () = abort.cancelled() => return cause.set(Reason::Stopped.into()),
            ended = &mut connection => {
                cause.set(match ended {
                    Ok(()) => Reason::TunnelClosed.into(),
                    Err(e) => cause.explain(e),
                });
                return tunnel.retire();
            }
            () = pong(&mut ping) => heart.pong(Instant::now()),
            () = sleep_until(due) => {
                if idle && Instant::now() >= idle_at {
                    tunnel.retire();
                }
                match heart.beat(Instant::now()) {
                    Beat::Ping => send_ping(&mut ping),
                    Beat::Dead => {
                        cause.set(Reason::PingTimeout.into());
                        return tunnel.retire();
                    }
                    Beat::Nothing => {}
                }
            }
        }
    }
}

/// Resolves when a ping was answered.
pub(super) async fn pong(ping: &mut Option<PingPong>) {
    match ping {
        // An error means that the connection has ended, which it says itself.
        Some(ping) => {
            poll_fn(|cx| match ping.poll_pong(cx) {
                Poll::Ready(Ok(_)) => Poll::Ready(()),
                Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
            })
            .await;
        }
        None => std::future::pending().await,
    }
}

pub(super) fn send_ping(ping: &mut Option<PingPong>) {
    if let Some(ping) = ping {
        // Fails if the connection has ended, which it says itself.
        let _ended = ping.send_ping(Ping::opaque());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_busy_while_it_moves_bytes_and_soon_after_no_more() {
        let (load, start) = (Load::default(), Instant::now());
        assert!(!load.busy(start));
        load.current.set(BUSY);
        assert!(load.busy(start));
        assert!(load.busy(start + LOAD_WINDOW));
        assert!(!load.busy(start + LOAD_WINDOW * 2));
        load.current.set(BUSY);
        assert!(!load.busy(start + LOAD_WINDOW * 20));
    }
}
