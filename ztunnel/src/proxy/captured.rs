//! The start of every redirected connection: where it was going, and a place among the pod's.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::net::TcpStream;

use super::address::{canonical, original_destination};
use super::flow::Flow;
use super::{Error, inbound};
use crate::dataplane::PodContext;
use crate::dataplane::registry::Direction;

/// Registers a connection that `peer` opened, and says where it was going before it was redirected.
/// None if it cannot be taken: that is in log and metric, and the caller resets it.
pub(super) fn register(
    pod: &Rc<PodContext>,
    direction: Direction,
    downstream: &TcpStream,
    peer: SocketAddr,
) -> Option<(Flow, SocketAddr)> {
    let refuse = |wanted, error: Error| inbound::refused(pod, direction, peer, wanted, &error);
    let wanted = original_destination(downstream)
        .map_err(|error| refuse(None, error))
        .ok()?;
    let Some(slot) = pod.admit() else {
        refuse(Some(wanted), Error::ConnectionLimit);
        return None;
    };
    Some((Flow::begin(pod, slot, direction, peer, wanted), wanted))
}

/// Whether a connection was made to the listener itself, and not redirected to it. To follow such a
/// destination, which may be an address of the pod that nobody knows, would lead here without end.
pub(super) fn is_direct(downstream: &TcpStream, wanted: SocketAddr) -> bool {
    let local = downstream.local_addr();
    local.is_ok_and(|local| canonical(local) == wanted)
}
