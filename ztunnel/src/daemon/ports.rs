//! The daemon's own ports, in the node's namespace, and what the admin page shows of enrolment.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use mesh::Store;
use nix::errno::Errno;
use tokio::sync::watch;

use super::Error;
use crate::admin::WorkloadState;
use crate::config::Config;
use crate::enrolment::Statuses;

/// The open ports; nothing is served on them yet.
pub(super) struct Ports {
    pub(super) admin: TcpListener,
    pub(super) stats: TcpListener,
    pub(super) readiness: TcpListener,
}

impl Ports {
    /// Opens all of them, so that a second daemon on the node fails before it touches any pod.
    pub(super) fn open(config: &Config) -> Result<Self, Error> {
        Ok(Self {
            admin: listen("the admin page", config.admin)?,
            stats: listen("metrics", config.stats)?,
            readiness: listen("readiness", config.readiness)?,
        })
    }
}

/// On a node without IPv6, "any address" means any of IPv4.
fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, Error> {
    let listener = TcpListener::bind(address).or_else(|error| {
        let any = address.ip().is_unspecified() && address.is_ipv6();
        if any && error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32) {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port()))
        } else {
            Err(error)
        }
    });
    let ready = |listener: TcpListener| -> io::Result<TcpListener> {
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listener.and_then(ready).map_err(|source| Error::Listen {
        what,
        address,
        source,
    })
}

/// The verified states with what the model knows of each pod.
pub(super) fn workload_states(
    store: Store,
    statuses: watch::Receiver<Statuses>,
) -> Box<dyn Fn() -> Vec<WorkloadState>> {
    Box::new(move || {
        let model = store.model();
        let statuses = statuses.borrow().clone();
        statuses
            .iter()
            .map(|(uid, status)| {
                let workload = model.workload(uid);
                let text = |field: fn(&mesh::Workload) -> String| {
                    workload.map(|workload| field(workload)).unwrap_or_default()
                };
                let reason = status.reason.map(|code| match &status.message {
                    Some(message) => format!("{code}: {message}"),
                    None => code.to_string(),
                });
                WorkloadState {
                    uid: uid.clone(),
                    state: status.state.name(),
                    reason,
                    since: status.since,
                    name: text(|workload| workload.name.to_string()),
                    namespace: text(|workload| workload.namespace.to_string()),
                    service_account: text(|workload| workload.service_account.to_string()),
                    trust_domain: text(|workload| workload.identity.trust_domain().to_string()),
                }
            })
            .collect()
    })
}
