//! How bytes move between an application's socket and a tunnel stream.
//!
//! Both directions run in one task. The [`upload`] reads from the application only when the stream has window for the
//! bytes, so back-pressure reaches the application as without a tunnel, and bytes wait in the kernel and not here. The
//! [`download`] writes bytes that have arrived on the stream. A reset of either side ends both.

mod context;
mod download;
mod upload;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use h2::SendStream;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::recv_buffer::RecvBuffer;
use crate::relay::{
    Chunk, PendingWrites, READ_BUFFER_BYTES, RelayOutcome, ResetOnDrop, read_available,
};
use context::Progress;
pub(super) use context::{RESET_GRACE, RelayContext, RelayError};
use download::{Download, write_available};
use upload::Upload;

/// Relays until both directions have ended. `received` resolves when the stream can be read.
pub(super) async fn run(
    context: &RelayContext<'_>,
    app: TcpStream,
    prefix: Vec<u8>,
    mut send: SendStream<Chunk>,
    received: impl Future<Output = Result<RecvBuffer, RelayError>>,
) -> RelayOutcome {
    let mut app = ResetOnDrop::new(app);
    let pending = Rc::new(PendingWrites::default());
    let progress = Progress::default();
    let outcome = {
        let (read, write) = app.split();
        let upload = Upload {
            context,
            read,
            send: &mut send,
            pending: &pending,
            progress: &progress,
        };
        let download = Download {
            context,
            write,
            progress: &progress,
        };
        let mut upload = pin!(upload.run(prefix));
        let mut download = pin!(download.run(received));
        let mut is_downloaded = false;
        let mut stopped = pin!(context.stop.stopped());
        poll_fn(|cx| {
            if let Poll::Ready(reason) = stopped.as_mut().poll(cx) {
                return Poll::Ready(RelayOutcome::Stopped { reason });
            }
            if !is_downloaded && let Poll::Ready(result) = download.as_mut().poll(cx) {
                match result {
                    Ok(()) => is_downloaded = true,
                    Err(error) => return Poll::Ready(context.outcome(error)),
                }
            }
            if let Poll::Ready(error) = upload.as_mut().poll(cx) {
                return Poll::Ready(context.outcome(error));
            }
            let is_closed = is_downloaded && progress.has_sent_end.get();
            if is_closed {
                Poll::Ready(RelayOutcome::Closed)
            } else {
                Poll::Pending
            }
        })
        .await
    };
    match &outcome {
        RelayOutcome::Closed => app.finish(),
        RelayOutcome::Reset { by } if *by == context.app_side => {
            if !progress.has_sent_end.get() {
                flush_before_reset(context, &app, &mut send, &pending);
            }
            // Boxed, because it is rare, and its timer would enlarge every relay.
            Box::pin(wait_for_writes(context, &pending)).await;
            // RFC 9113, section 8.5: the error code of a proxy whose TCP connection was reset.
            send.send_reset(h2::Reason::CONNECT_ERROR);
        }
        _ => send.send_reset(h2::Reason::CANCEL),
    }
    outcome
}

/// Delivers the bytes of a stream that the peer reset before it was answered, and then resets the application.
pub(super) async fn deliver_received(
    context: &RelayContext<'_>,
    app: TcpStream,
    mut received: RecvBuffer,
    error: h2::Error,
) -> RelayOutcome {
    let mut app = ResetOnDrop::new(app);
    if let Some(reason) = context.stop.reason() {
        return RelayOutcome::Stopped { reason };
    }
    let (_, mut write) = app.split();
    let filled = poll_fn(|cx| {
        let filled = received.poll_fill(cx);
        write_available(context, &mut received, &mut write, cx);
        Poll::Ready(filled)
    });
    let error = match filled.await {
        Poll::Ready(Err(reset)) => reset,
        _ => error,
    };
    context.outcome(RelayError::Tunnel(context.status.convert_error(error)))
}

/// Sends what the application sent before its reset, as would happen without a tunnel. Example: the response of a server
/// that closes without reading the rest of an upload. Limited to the window that the stream has; does not wait.
fn flush_before_reset(
    context: &RelayContext<'_>,
    app: &TcpStream,
    send: &mut SendStream<Chunk>,
    pending: &Rc<PendingWrites>,
) {
    loop {
        send.reserve_capacity(READ_BUFFER_BYTES);
        let mut bytes = vec![0; send.capacity().min(READ_BUFFER_BYTES)];
        let n = read_available(app, &mut bytes);
        bytes.truncate(n);
        if n == 0 || send.send_data(pending.track(bytes.into()), false).is_err() {
            return;
        }
        context.count_upload(n);
    }
}

/// Waits up to [`RESET_GRACE`] for queued bytes to be written, because h2 sends a reset before them and discards them.
async fn wait_for_writes(context: &RelayContext<'_>, pending: &PendingWrites) {
    tokio::select! {
        biased;
        _ = context.stop.stopped() => {}
        _ = timeout(RESET_GRACE, poll_fn(|cx| pending.poll_empty(cx))) => {}
    }
}
