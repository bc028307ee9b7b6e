//! The three listeners of a pod, one set per data-plane worker: how they are opened inside the
//! pod's namespace, and whether they are open.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use socket2::{Domain, Protocol, Socket, Type};

use crate::netlink::{DUMP, Netlink};
use crate::netns::Netns;
use crate::ports_and_marks::{
    DAEMON_MARK, HBONE_PORT, INBOUND_PLAIN_PORT, OUTBOUND_PORT, POD_PORTS,
};

/// Connections that may wait to be accepted, per listener. A burst of a thousand connections of one
/// pod must fit: with a full queue each would lose a second to a retransmitted SYN. The kernel
/// limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// `SOCK_DIAG_BY_FAMILY` (`linux/sock_diag.h`).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// State mask of listening sockets: `TCP_LISTEN` is 10.
const LISTENING_STATES: u32 = 1 << 10;

/// The three listeners of one pod for one data-plane worker, bound in the pod's network namespace.
pub struct PodListeners {
    /// Accepts the pod's outgoing connections.
    pub outbound: TcpListener,
    /// Accepts incoming plaintext connections.
    pub inbound_plain: TcpListener,
    /// Accepts incoming HBONE tunnels.
    pub inbound_hbone: TcpListener,
}

/// Opens the listeners of one pod for `workers` workers.
///
/// # Errors
/// Fails if the namespace cannot be entered or a port is in use, most likely by the application.
pub fn listeners(netns: &Netns, workers: usize) -> io::Result<Vec<PodListeners>> {
    netns.enter(|| {
        (0..workers)
            .map(|_| {
                Ok(PodListeners {
                    outbound: listener(OUTBOUND_PORT)?,
                    inbound_plain: listener(INBOUND_PLAIN_PORT)?,
                    inbound_hbone: listener(HBONE_PORT)?,
                })
            })
            .collect()
    })
}

/// Listens on all addresses of both families, or of IPv4 only if the namespace has no IPv6.
fn listener(port: u16) -> io::Result<TcpListener> {
    match bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))) {
        Err(error) if is_without_ipv6(&error) => {
            bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        outcome => outcome,
    }
    .map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on port {port} of the pod: {error}"),
        )
    })
}

fn is_without_ipv6(error: &io::Error) -> bool {
    [Errno::EAFNOSUPPORT, Errno::EADDRNOTAVAIL]
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Each worker has a socket of its own. After a restart, connections of the previous daemon may
    // be in TIME_WAIT.
    socket.set_reuse_port(true)?;
    socket.set_reuse_address(true)?;
    socket.set_mark(DAEMON_MARK)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Whether all three ports have a listening socket, in the namespace of this thread.
pub(super) fn are_open() -> io::Result<bool> {
    let netlink = Netlink::open(SockProtocol::NetlinkSockDiag)?;
    let mut missing = POD_PORTS.to_vec();
    for family in [nix::libc::AF_INET6, nix::libc::AF_INET] {
        let outcome = netlink.request(
            SOCK_DIAG_BY_FAMILY,
            DUMP,
            &diag_request(family),
            |_, reply| {
                // struct inet_diag_msg: family, state, timer, retransmissions, then the source port
                // in network byte order.
                if let Some(port) = reply
                    .get(4..6)
                    .and_then(|port| port.try_into().ok())
                    .map(u16::from_be_bytes)
                {
                    missing.retain(|expected| *expected != port);
                }
            },
        );
        match outcome {
            Ok(()) if missing.is_empty() => return Ok(true),
            Ok(()) => {}
            // A kernel without IPv6 has no such family.
            Err(error) if family == nix::libc::AF_INET6 && is_unknown_family(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

fn is_unknown_family(error: &io::Error) -> bool {
    [Errno::ENOENT, Errno::EAFNOSUPPORT]
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, padding, states, and an empty socket
/// id.
fn diag_request(family: i32) -> Vec<u8> {
    let family = u8::try_from(family).unwrap_or_default();
    let tcp = u8::try_from(nix::libc::IPPROTO_TCP).unwrap_or_default();
    let mut request = vec![family, tcp, 0, 0];
    request.extend_from_slice(&LISTENING_STATES.to_ne_bytes());
    request.extend_from_slice(&[0; 48]);
    request
}
