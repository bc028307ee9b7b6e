//! Where an attack comes from: a network namespace, with or without the daemon's mark.

use std::fs::File;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};

/// The daemon's own mark, which the redirect rules let pass. A pod that may set marks (CAP_NET_ADMIN) can reach the
/// network past its daemon, which is why the other side trusts nothing but certificates.
const MARK: u32 = 0x539;

/// Who attacks.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The namespace, a name for `ip netns`.
    pub netns: String,
    /// Whether the sockets carry the daemon's mark.
    pub marked: bool,
}

impl Origin {
    /// Connects, within five seconds.
    ///
    /// # Errors
    /// Refused, unreachable or silent.
    pub async fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        let socket = if to.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        if self.marked {
            SockRef::from(&socket).set_mark(MARK).context("mark")?;
        }
        let connect = tokio::time::timeout(Duration::from_secs(5), socket.connect(to)).await;
        let stream = connect
            .context("no answer to the connect")?
            .with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// Runs `work` on a thread of its own in the network namespace, so that every socket it makes belongs there.
///
/// # Errors
/// The namespace cannot be entered, the work fails, or it is not done within its time.
pub fn inside<T: Send>(
    origin: &Origin,
    within: Duration,
    work: impl AsyncFnOnce(&Origin) -> Result<T> + Send,
) -> Result<T> {
    let run = || {
        inside_until(origin, async |origin| {
            let done = tokio::time::timeout(within, work(origin)).await;
            done.with_context(|| format!("not done within {within:?}"))?
        })
    };
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// Runs `work` on this thread, which stays in the network namespace: it has to be a thread that ends with it.
pub(crate) fn inside_until<T>(
    origin: &Origin,
    work: impl AsyncFnOnce(&Origin) -> Result<T>,
) -> Result<T> {
    let path = format!("/run/netns/{}", origin.netns);
    let netns = File::open(&path).with_context(|| path.clone())?;
    setns(netns, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {path}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work(origin))
}
