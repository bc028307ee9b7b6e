//! TCP sockets: those made in a pod's network namespace, marked so that the pod's redirect rules
//! pass them by, and the options of accepted ones.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::Error;
use crate::netns::Netns;
use crate::ports_and_marks::DAEMON_MARK;

/// How long an application or an unmeshed destination may take to accept: SYNs go out at 0, 1, 3
/// and 7 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// When an idle connection is probed, as in Istio. A vanished peer is detected after half an hour
/// at the latest, which matters only for idle connections.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(180);
const KEEPALIVE_RETRIES: u32 = 9;

/// Makes one pod's sockets.
pub(crate) struct PodSockets {
    netns: Arc<Netns>,
}

impl PodSockets {
    pub(super) fn new(netns: Arc<Netns>) -> Self {
        Self { netns }
    }

    /// Connects from the pod's own address.
    pub(super) async fn dial(&self, to: SocketAddr) -> Result<TcpStream, Error> {
        let socket = self.socket(to).map_err(Error::Socket)?;
        connect(socket, to).await
    }

    /// Connects to the pod's own application with `from` as the client address. Answers return to
    /// this socket by the pod's mark rules.
    ///
    /// The socket has keepalive although both sides are in one kernel: conntrack expires an idle
    /// connection, and with it the mark that routes the answers back.
    pub(super) async fn dial_from(&self, from: IpAddr, to: SocketAddr) -> Result<TcpStream, Error> {
        if from == to.ip() {
            // The pod connects to itself. The kernel drops a spoofed source that equals the
            // destination as a martian.
            return self.dial(to).await;
        }
        let socket = self
            .socket(to)
            .and_then(|socket| bind_transparent(socket, from))
            .map_err(Error::Socket)?;
        connect(socket, to).await
    }

    fn socket(&self, to: SocketAddr) -> io::Result<Socket> {
        let domain = Domain::for_address(to);
        let kind = Type::STREAM.nonblocking().cloexec();
        let socket = self
            .netns
            .enter(|| Socket::new(domain, kind, Some(Protocol::TCP)))?;
        socket.set_mark(DAEMON_MARK)?;
        set_tcp_options(&socket)?;
        Ok(socket)
    }
}

impl hbone::SocketFactory for PodSockets {
    fn new_tcp(&self, to: SocketAddr) -> io::Result<TcpSocket> {
        Ok(TcpSocket::from_std_stream(self.socket(to)?.into()))
    }
}

/// Sets nodelay and keepalive. Accepted sockets inherit both from their listener, which saves the
/// system calls for each.
pub(crate) fn set_tcp_options(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_INTERVAL)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Binds to an address that is not the pod's. `IP_TRANSPARENT` allows that by itself; `IP_FREEBIND`
/// would add nothing.
fn bind_transparent(socket: Socket, from: IpAddr) -> io::Result<Socket> {
    match from {
        IpAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        IpAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
    }
    // The kernel chooses the port at connect, for the destination: one client address
    // then has 28,000 ports per destination and not 28,000 in all.
    setsockopt(&socket.as_fd(), sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    Ok(socket)
}

async fn connect(socket: Socket, to: SocketAddr) -> Result<TcpStream, Error> {
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(to);
    match timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(Error::Dial { to, source }),
        Err(_) => Err(Error::DialTimeout { to }),
    }
}

/// Ends a connection with a reset, as the kernel ends one that no socket accepts. The application
/// sees a failure and not the end of a stream.
pub(super) fn reset(stream: TcpStream) {
    // If the option cannot be set, the application sees an end of stream; there is no other way to
    // send a reset.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}

/// The address without the IPv4-mapped form that IPv6 sockets report, and without flow and scope.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ipv4_mapped_address_becomes_ipv4() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(canonical(mapped).to_string(), "10.0.0.1:80");
        let v6: SocketAddr = "[fd00::1]:80".parse().unwrap();
        assert_eq!(canonical(v6), v6);
    }
}
