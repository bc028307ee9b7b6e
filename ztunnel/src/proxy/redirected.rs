//! The start of a redirected connection: its original destination and its registration.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::Error;
use super::connections::Direction;
use super::context::PodContext;
use super::sockets::canonical;
use super::tracker::{ConnectionTracker, reject};

/// Registers a redirected connection from `peer`; returns its tracker and original destination.
///
/// None if it cannot be served: that is counted and logged, and the caller resets it.
pub(super) fn register(
    pod: &Rc<PodContext>,
    direction: Direction,
    downstream: &TcpStream,
    peer: SocketAddr,
) -> Option<(ConnectionTracker, SocketAddr)> {
    let original_dst = original_dst(downstream)
        .map_err(|error| reject(pod, direction, peer, None, &error))
        .ok()?;
    let Some(permit) = pod.try_admit() else {
        let error = Error::ConnectionLimit;
        reject(pod, direction, peer, Some(original_dst), &error);
        return None;
    };
    let tracker = ConnectionTracker::start(pod, permit, direction, peer, original_dst);
    Some((tracker, original_dst))
}

/// Whether a connection was made to the listener itself and not redirected to it. To dial such a
/// destination, which may be an address of the pod that no object lists, would lead here again
/// without end.
pub(super) fn is_direct(downstream: &TcpStream, original_dst: SocketAddr) -> bool {
    let local = downstream.local_addr();
    local.is_ok_and(|local| canonical(local) == original_dst)
}

/// The destination before the pod's rules redirected the connection (`SO_ORIGINAL_DST`).
fn original_dst(stream: &TcpStream) -> Result<SocketAddr, Error> {
    let socket = SockRef::from(stream);
    // Which option works depends on the family of the packets. Sockets of a dual-stack listener are
    // IPv6 even for IPv4 packets.
    let address = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .map_err(Error::OriginalDestination)?;
    let address = address
        .as_socket()
        .ok_or_else(|| Error::OriginalDestination(io::ErrorKind::Unsupported.into()))?;
    Ok(canonical(address))
}
