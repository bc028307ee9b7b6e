//! Ears in a pod's namespace: the kernel tells of every change of rules and routes, so that repair
//! need not wait for the next round of verification.

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

/// Hears of changes in one namespace. What it hears is only ever a reason to verify, so lost
/// messages cost nothing but time.
#[derive(Debug)]
pub struct NetnsWatch {
    rules: AsyncFd<OwnedFd>,
    routing: AsyncFd<OwnedFd>,
}

impl NetnsWatch {
    /// Starts to listen. Must be called within the runtime that will wait.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered or the sockets cannot be made.
    pub fn new(netns: &Netns) -> io::Result<Self> {
        let (rules, routing) = netns.enter(|| {
            let rules = Netlink::listen(SockProtocol::NetlinkNetFilter, &[nftables::GROUP])?;
            Ok((
                rules,
                Netlink::listen(SockProtocol::NetlinkRoute, &ROUTING_GROUPS)?,
            ))
        })?;
        // The deprecation is about types whose descriptor may change under the runtime's eyes; that
        // of an `OwnedFd` never does.
        #[allow(deprecated)]
        let register = |fd: OwnedFd| AsyncFd::try_with_interest(fd, Interest::READABLE);
        Ok(Self {
            rules: register(rules)?,
            routing: register(routing)?,
        })
    }

    /// Waits until something has changed. Safe to drop at any time.
    ///
    /// # Errors
    /// Fails if the sockets can no longer be read.
    pub async fn changed(&self) -> io::Result<()> {
        tokio::select! {
            heard = drain(&self.rules) => heard,
            heard = drain(&self.routing) => heard,
        }
    }
}

async fn drain(socket: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = socket.readable().await?;
        let mut heard = false;
        loop {
            // One byte suffices: the kernel throws away what does not fit, and the content does not
            // matter.
            match recv(socket.get_ref().as_raw_fd(), &mut [0], MsgFlags::empty()) {
                Ok(_) | Err(Errno::ENOBUFS) => heard = true,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        if heard {
            return Ok(());
        }
    }
}
