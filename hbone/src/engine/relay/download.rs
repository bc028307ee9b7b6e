//! How bytes move from a stream to an application's socket.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::net::tcp::WriteHalf;
use tokio_util::io::poll_write_buf;

use super::context::{Progress, RelayContext, RelayError};
use crate::engine::recv_buffer::RecvBuffer;
use crate::relay::shutdown_write;

/// The direction from the stream to the application.
pub(super) struct Download<'a, 'b> {
    pub(super) context: &'a RelayContext<'a>,
    pub(super) write: WriteHalf<'b>,
    pub(super) progress: &'a Progress,
}

impl Download<'_, '_> {
    /// Resolves when END_STREAM has been passed on as FIN, or with an error.
    pub(super) async fn run(
        mut self,
        received: impl Future<Output = Result<RecvBuffer, RelayError>>,
    ) -> Result<(), RelayError> {
        let mut received = received.await?;
        self.progress.is_answered.set(true);
        loop {
            let written = poll_fn(|cx| self.poll_write(&mut received, cx));
            match written.await? {
                0 => break,
                n => self.context.count_download(received.consume(n)),
            }
        }
        shutdown_write(self.write.as_ref()).map_err(|_| RelayError::App)
    }

    /// Writes once. 0 bytes at END_STREAM.
    fn poll_write(
        &mut self,
        received: &mut RecvBuffer,
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize, RelayError>> {
        match received.poll_fill(cx) {
            Poll::Ready(Ok(())) => self.progress.has_received_end.set(true),
            Poll::Ready(Err(e)) => {
                write_available(self.context, received, &mut self.write, cx);
                let error = self.context.status.convert_error(e);
                return Poll::Ready(Err(RelayError::Tunnel(error)));
            }
            Poll::Pending if received.is_empty() => return Poll::Pending,
            Poll::Pending => {}
        }
        if received.is_empty() {
            return Poll::Ready(Ok(0));
        }
        poll_write_buf(Pin::new(&mut self.write), cx, received.queue()).map_err(|_| RelayError::App)
    }
}

/// Writes as many received bytes as the application's socket accepts without waiting.
pub(super) fn write_available(
    context: &RelayContext<'_>,
    received: &mut RecvBuffer,
    write: &mut WriteHalf<'_>,
    cx: &mut Context<'_>,
) {
    while !received.is_empty() {
        match poll_write_buf(Pin::new(write), cx, received.queue()) {
            Poll::Ready(Ok(n)) if n > 0 => context.count_download(received.consume(n)),
            _ => return,
        }
    }
}
