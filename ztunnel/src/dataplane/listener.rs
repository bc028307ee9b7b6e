//! Accepts connections: one loop per listener, which continues after a failed `accept`, owns the
//! connections it accepted, and waits for their end.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::task::{JoinError, JoinSet};
use tokio::time::sleep;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::proxy::{PodContext, set_tcp_options};

/// How long accepting pauses after the first of consecutive failures, and at most. Without file
/// descriptors the connection stays in the backlog and `accept` fails again at once: without a
/// pause the loop would take the core from the connections that could release a descriptor.
const MIN_PAUSE: Duration = Duration::from_millis(5);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// A listener that counts as open until it is dropped.
pub(super) struct Listener {
    socket: tokio::net::TcpListener,
    // Fields are dropped in this order, so the socket is closed before it stops counting.
    _open: TaskTrackerToken,
}

impl Listener {
    /// Registers a listener with the runtime of this thread, and counts it in `open`.
    pub(super) fn new(listener: std::net::TcpListener, open: &TaskTracker) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        set_tcp_options(&SockRef::from(&listener))?;
        Ok(Self {
            socket: tokio::net::TcpListener::from_std(listener)?,
            _open: open.token(),
        })
    }
}

/// Serves each accepted connection in a task of its own until the pod is drained or aborted.
/// Returns when the last connection has ended.
pub(super) async fn accept_loop<F, S>(listener: Listener, pod: Rc<PodContext>, serve: S)
where
    F: Future<Output = ()> + 'static,
    S: Fn(Rc<PodContext>, TcpStream, SocketAddr) -> F,
{
    let shutdown = pod.shutdown.clone();
    let mut connections = JoinSet::new();
    let mut pause = MIN_PAUSE;
    loop {
        tokio::select! {
            biased;
            () = shutdown.drain.cancelled() => break,
            () = shutdown.abort.cancelled() => break,
            Some(ended) = connections.join_next() => {
                ended.unwrap_or_else(|error| report_panic(&error));
            }
            accepted = listener.socket.accept() => match accepted {
                Ok((stream, peer)) => {
                    pause = MIN_PAUSE;
                    connections.spawn_local(serve(pod.clone(), stream, peer));
                }
                // The client reset its connection in the backlog; the next one is not affected.
                Err(error) if is_of_one_connection(&error) => {
                    pod.telemetry().record_accept_failure("aborted");
                }
                Err(error) => {
                    pod.telemetry().record_accept_failure(accept_code(&error));
                    let pod = &pod.uid;
                    tracing::warn!(%error, %pod, ?pause, "cannot accept connections, pausing");
                    tokio::select! {
                        () = shutdown.drain.cancelled() => break,
                        () = shutdown.abort.cancelled() => break,
                        () = sleep(pause) => {}
                    }
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }
    drop(listener);
    // Each connection watches `abort` itself, and ends with a reset and a line in the access log.
    while connections.join_next().await.is_some() {}
}

/// Logs a panic, which ended one connection only.
fn report_panic(error: &JoinError) {
    tracing::error!(%error, "the task of a connection panicked; please report this defect");
}

/// Whether an error of `accept` concerns only the connection that would have been accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// The reason code in `ambit_accept_failures_total`.
fn accept_code(error: &io::Error) -> &'static str {
    use nix::libc::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
    match error.raw_os_error() {
        Some(EMFILE | ENFILE) => "out_of_descriptors",
        Some(ENOBUFS | ENOMEM) => "out_of_memory",
        _ => "accept_failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aborted_client_needs_no_pause_and_a_full_descriptor_table_does() {
        assert!(is_of_one_connection(
            &io::ErrorKind::ConnectionAborted.into()
        ));
        let full = io::Error::from_raw_os_error(nix::libc::EMFILE);
        assert!(!is_of_one_connection(&full));
        assert_eq!(accept_code(&full), "out_of_descriptors");
    }
}
