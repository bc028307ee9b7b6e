//! When rules or routes in a pod's namespace change: netlink multicast notifications, so that
//! repair does not wait for the next periodic verification.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockProtocol, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::nftables;

/// `RTNLGRP_IPV4_ROUTE`, `RTNLGRP_IPV4_RULE`, `RTNLGRP_IPV6_ROUTE`, `RTNLGRP_IPV6_RULE`
/// (`linux/rtnetlink.h`).
const ROUTING_GROUPS: [u32; 4] = [7, 8, 11, 19];

/// Watches one namespace for changes of nftables rules and of policy routing. A notification is
/// only a reason to verify, so a lost one delays a repair and loses nothing.
#[derive(Debug)]
pub struct NetnsWatch {
    rules: AsyncFd<OwnedFd>,
    routing: AsyncFd<OwnedFd>,
}

impl NetnsWatch {
    /// Subscribes to changes. Must be called inside the runtime that will await [`Self::changed`].
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered or a socket cannot be opened.
    pub fn new(netns: &Netns) -> io::Result<Self> {
        let (rules, routing) = netns.enter(|| {
            let rules =
                Netlink::subscribe(SockProtocol::NetlinkNetFilter, &[nftables::MULTICAST_GROUP])?;
            Ok((
                rules,
                Netlink::subscribe(SockProtocol::NetlinkRoute, &ROUTING_GROUPS)?,
            ))
        })?;
        // Deprecated for types whose descriptor may change while it is registered. That of an
        // `OwnedFd` does not.
        #[allow(deprecated)]
        let register = |fd: OwnedFd| AsyncFd::try_with_interest(fd, Interest::READABLE);
        Ok(Self {
            rules: register(rules)?,
            routing: register(routing)?,
        })
    }

    /// Waits for a change. Cancel safe.
    ///
    /// # Errors
    /// Fails if a socket can no longer be read.
    pub async fn changed(&self) -> io::Result<()> {
        tokio::select! {
            result = drain(&self.rules) => result,
            result = drain(&self.routing) => result,
        }
    }
}

/// Waits for a notification, and discards all that are queued.
async fn drain(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = socket.readable().await?;
        let mut is_notified = false;
        loop {
            // The content does not matter, and the kernel discards what does not fit into one byte.
            match recv(socket.get_ref().as_raw_fd(), &mut [0], MsgFlags::empty()) {
                Ok(_) | Err(Errno::ENOBUFS) => is_notified = true,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        if is_notified {
            return Ok(());
        }
    }
}
