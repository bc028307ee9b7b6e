//! The daemon's own listeners, in the node's namespace: admin page, metrics, readiness.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use nix::errno::Errno;

use super::Error;
use crate::config::Config;

/// The listeners. Connections queue until a server accepts them.
pub(super) struct Ports {
    pub(super) admin: TcpListener,
    pub(super) stats: TcpListener,
    pub(super) readiness: TcpListener,
}

impl Ports {
    /// Opens all ports, so that a second daemon on the node fails before it changes any pod.
    pub(super) fn open(config: &Config) -> Result<Self, Error> {
        Ok(Self {
            admin: listen("the admin page", config.admin)?,
            stats: listen("metrics", config.stats)?,
            readiness: listen("readiness", config.readiness)?,
        })
    }
}

/// Listens on `address`. On a node without IPv6, `[::]` falls back to `0.0.0.0`.
fn listen(service: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let listener = TcpListener::bind(address).or_else(|error| {
        let is_any_v6 = address.ip().is_unspecified() && address.is_ipv6();
        if is_any_v6 && error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32) {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))
        } else {
            Err(error)
        }
    });
    let set_nonblocking = |listener: TcpListener| -> io::Result<TcpListener> {
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listener
        .and_then(set_nonblocking)
        .map_err(|source| Error::Listen {
            service,
            address,
            source,
        })
}
