//! Accepting: one loop per listener that survives what `accept` can answer, owns the connections it
//! accepted, and ends them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinError, JoinSet};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::telemetry::WorkerTelemetry;

/// How long accepting pauses after the first failure in a row, and at most. Out of descriptors, the
/// connection stays in the backlog and `accept` would fail again at once: without a pause the loop
/// would take the core from those who could close one.
const PAUSE: Duration = Duration::from_millis(5);
const PAUSE_AT_MOST: Duration = Duration::from_secs(1);

/// The two ways in which accepting ends.
#[derive(Clone)]
pub(crate) struct Ends {
    /// Accept nothing more; what is open lives on.
    pub(crate) drain: CancellationToken,
    /// End everything now.
    pub(crate) abort: CancellationToken,
    /// The listeners that are open still.
    pub(crate) open: TaskTracker,
}

/// A listener, which counts as open until it is closed.
pub(super) struct Listener {
    socket: TcpListener,
    // After the socket: fields are dropped in this order.
    _open: TaskTrackerToken,
}

impl Listener {
    /// Counts the socket among the open ones of `ends`.
    pub(super) fn new(socket: TcpListener, ends: &Ends) -> Self {
        Self {
            socket,
            _open: ends.open.token(),
        }
    }
}

/// Accepts until drained, serving each connection in a task of this loop, and returns when the last
/// of them has ended.
pub(crate) async fn accept_loop<F, S>(
    listener: Listener,
    ends: Ends,
    telemetry: &WorkerTelemetry,
    serve: S,
) where
    F: Future<Output = ()> + 'static,
    S: Fn(TcpStream, SocketAddr) -> F,
{
    let mut connections = JoinSet::new();
    let mut pause = PAUSE;
    loop {
        tokio::select! {
            biased;
            () = ends.drain.cancelled() => break,
            () = ends.abort.cancelled() => break,
            Some(ended) = connections.join_next() => ended.unwrap_or_else(|error| report_panic(&error)),
            accepted = listener.socket.accept() => match accepted {
                Ok((stream, peer)) => {
                    pause = PAUSE;
                    connections.spawn_local(serve(stream, peer));
                }
                // The client gave up while it waited in the backlog: its loss alone.
                Err(error) if is_of_one_connection(&error) => telemetry.accept_failed("aborted"),
                Err(error) => {
                    telemetry.accept_failed(accept_code(&error));
                    tracing::warn!(%error, pause = ?pause, "cannot accept connections, pausing");
                    tokio::select! {
                        () = ends.drain.cancelled() => break,
                        () = ends.abort.cancelled() => break,
                        () = sleep(pause) => {}
                    }
                    pause = (pause * 2).min(PAUSE_AT_MOST);
                }
            }
        }
    }
    drop(listener);
    // Each connection watches `abort` itself and ends with a reset and a line in the access log;
    // the set only waits for them.
    while connections.join_next().await.is_some() {}
}

/// A defect of ours ended one connection, and must not go unseen because it ended no more than that.
fn report_panic(error: &JoinError) {
    tracing::error!(%error, "a connection's task failed");
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

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
    fn a_client_that_gave_up_is_no_reason_to_pause_and_a_full_table_is() {
        assert!(is_of_one_connection(
            &io::ErrorKind::ConnectionAborted.into()
        ));
        let full = io::Error::from_raw_os_error(nix::libc::EMFILE);
        assert!(!is_of_one_connection(&full));
        assert_eq!(accept_code(&full), "out_of_descriptors");
    }
}
