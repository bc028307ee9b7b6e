//! The network namespace in which an attacking client or server makes its sockets.

use std::fs::File;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

/// The daemon's packet mark. The redirect rules do not capture sockets that carry it, so a pod that may set marks
/// (CAP_NET_ADMIN) bypasses its own daemon. The receiving daemon therefore trusts certificates only.
const DAEMON_MARK: u32 = 0x539;

/// How long a connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A network namespace, and how sockets are made in it.
#[derive(Debug, Clone)]
pub struct Netns {
    /// The name under `/run/netns`.
    pub name: String,
    /// Whether client sockets carry the daemon's mark, and so bypass the pod's own daemon.
    pub is_marked: bool,
}

impl Netns {
    /// Connects from the namespace. The caller must run inside it, see [`run_in_netns`].
    ///
    /// # Errors
    /// The connect is refused, has no route, or takes more than 5 s.
    pub async fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        let socket = if to.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        if self.is_marked {
            SockRef::from(&socket)
                .set_mark(DAEMON_MARK)
                .context("SO_MARK")?;
        }
        let connect = tokio::time::timeout(CONNECT_TIMEOUT, socket.connect(to)).await;
        let stream = connect
            .with_context(|| format!("connect to {to}: no answer in {CONNECT_TIMEOUT:?}"))?
            .with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Runs `work` on a new thread inside the network namespace: every socket that it makes belongs there.
///
/// # Errors
/// The namespace cannot be entered, `work` fails, or it takes longer than `timeout`.
pub fn run_in_netns<T: Send>(
    netns: &Netns,
    timeout: Duration,
    work: impl AsyncFnOnce(&Netns) -> Result<T> + Send,
) -> Result<T> {
    let run = || {
        block_on_in_netns(netns, async |netns| {
            let done = tokio::time::timeout(timeout, work(netns)).await;
            done.with_context(|| format!("not done within {timeout:?}"))?
        })
    };
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Moves the calling thread into the network namespace and runs `work` there. The thread stays in the namespace, so it
/// must end afterwards.
pub(crate) fn block_on_in_netns<T>(
    netns: &Netns,
    work: impl AsyncFnOnce(&Netns) -> Result<T>,
) -> Result<T> {
    let path = format!("/run/netns/{}", netns.name);
    let file = File::open(&path).with_context(|| path.clone())?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {path}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work(netns))
}
