//! Sockets inside a pod's network namespace, marked as the mesh's own so that the pod's rules let
//! them pass.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::netns::Netns;
use crate::proxy::Error;

/// `SO_MARK` of every socket that the daemon makes in a pod: the pod's redirect rules pass it by
/// (Istio's contract).
pub(crate) const MARK: u32 = 0x539;

/// How long an application or an unmeshed destination may take to answer: SYNs go out at 0, 1, 3
/// and 7 s.
const CONNECT: Duration = Duration::from_secs(10);

/// When a silent connection is probed, as Istio's: a peer that vanished is noticed half an hour
/// later at the latest, which only matters for connections on which nobody sends.
const KEEPALIVE: Duration = Duration::from_secs(180);
const KEEPALIVE_RETRIES: u32 = 9;

/// Makes one pod's sockets.
pub(crate) struct PodSockets {
    netns: Arc<Netns>,
}

impl PodSockets {
    pub(crate) fn new(netns: Arc<Netns>) -> Self {
        Self { netns }
    }

    /// Connects from the pod's own address.
    pub(crate) async fn dial(&self, to: SocketAddr) -> Result<TcpStream, Error> {
        let socket = self.remote(to).map_err(Error::Socket)?;
        connect(socket, to).await
    }

    /// Connects to the pod's own application so that it sees `from` as its client. Answers return to
    /// this socket by the pod's mark rules. Both ends are sockets of one kernel, which cannot lose
    /// each other; it is conntrack that forgets a connection on which nobody speaks, and with it the
    /// mark that brings the answers back, so this one is kept alive too.
    pub(crate) async fn dial_from(&self, from: IpAddr, to: SocketAddr) -> Result<TcpStream, Error> {
        if from == to.ip() {
            // The pod speaks to itself. The kernel would take a spoofed source that is also the
            // destination for a martian.
            return self.dial(to).await;
        }
        let socket = self
            .remote(to)
            .and_then(|socket| spoofed(socket, from))
            .map_err(Error::Socket)?;
        connect(socket, to).await
    }

    fn socket(&self, to: SocketAddr) -> io::Result<Socket> {
        let (domain, kind) = (
            Domain::for_address(to),
            Type::STREAM.nonblocking().cloexec(),
        );
        let socket = self
            .netns
            .enter(|| Socket::new(domain, kind, Some(Protocol::TCP)))?;
        socket.set_mark(MARK)?;
        socket.set_tcp_nodelay(true)?;
        Ok(socket)
    }

    fn remote(&self, to: SocketAddr) -> io::Result<Socket> {
        let socket = self.socket(to)?;
        keepalive(&socket)?;
        Ok(socket)
    }
}

impl hbone::SocketFactory for PodSockets {
    fn new_tcp(&self, to: SocketAddr) -> io::Result<TcpSocket> {
        Ok(TcpSocket::from_std_stream(self.remote(to)?.into()))
    }
}

/// What accepted sockets have. Set on their listener it holds for all that it accepts, without a
/// system call for each.
pub(super) fn prepare(listener: &Socket) -> io::Result<()> {
    listener.set_tcp_nodelay(true)?;
    keepalive(listener)
}

fn keepalive(socket: &Socket) -> io::Result<()> {
    let every = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE);
    socket.set_tcp_keepalive(&every.with_retries(KEEPALIVE_RETRIES))
}

/// Binds to an address that is not the pod's. A transparent socket may do so as it is; `IP_FREEBIND`
/// would add nothing.
fn spoofed(socket: Socket, from: IpAddr) -> io::Result<Socket> {
    match from {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    // The port is chosen at connect, when the destination is known: one client address then has
    // 28,000 ports per destination and not 28,000 in all.
    setsockopt(&socket.as_fd(), sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    Ok(socket)
}

async fn connect(socket: Socket, to: SocketAddr) -> Result<TcpStream, Error> {
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(to);
    match timeout(CONNECT, connecting).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(Error::Dial { to, source }),
        Err(_) => Err(Error::DialTimeout { to }),
    }
}
