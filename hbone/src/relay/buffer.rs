//! Where relayed bytes are held: read buffers of the thread, which a connection leases only while they contain bytes.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BufMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// Largest read, and size of a leased buffer. Measured: with less than 256 KiB, bulk transfer costs 0.5 to 2.5 CPU
/// seconds more per GiB.
pub(crate) const READ_BUFFER_BYTES: usize = 256 * 1024;

/// A smaller read is copied into an allocation of its own size, so that a few unread bytes never pin a large buffer.
/// The copy costs less than the system call before it.
const COPY_BELOW_BYTES: usize = 64 * 1024;

/// Free buffers that a thread keeps for the next read.
const MAX_FREE_BUFFERS: usize = 8;

thread_local! {
    static FREE_BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that were read and are to be passed on. A leased buffer returns to its thread when the chunk is dropped.
#[derive(Default)]
pub(crate) struct Chunk {
    bytes: Vec<u8>,
    consumed: usize,
    tracker: Option<Rc<PendingWrites>>,
}

impl Chunk {
    /// The bytes that are not consumed yet.
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(self.consumed..).unwrap_or_default()
    }

    /// Reads once, up to `max` bytes. Empty at the end of the stream. Leases no buffer while there is nothing to read.
    pub(crate) fn poll_read(
        mut from: Pin<&mut impl AsyncRead>,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<io::Result<Self>> {
        let mut bytes = lease_buffer();
        let read = poll_read_buf(
            from.as_mut(),
            cx,
            &mut (&mut bytes).limit(max.min(READ_BUFFER_BYTES)),
        );
        let chunk = match &read {
            Poll::Ready(Ok(n)) if *n >= COPY_BELOW_BYTES => return Poll::Ready(Ok(bytes.into())),
            Poll::Ready(Ok(_)) => bytes.as_slice().to_vec().into(),
            _ => Self::default(),
        };
        return_buffer(bytes);
        ready!(read)?;
        Poll::Ready(Ok(chunk))
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            consumed: 0,
            tracker: None,
        }
    }
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.consumed
    }

    fn chunk(&self) -> &[u8] {
        self.as_slice()
    }

    fn advance(&mut self, n: usize) {
        assert!(n <= self.remaining(), "advance past the end");
        self.consumed += n;
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        return_buffer(std::mem::take(&mut self.bytes));
        if let Some(tracker) = self.tracker.take() {
            tracker.complete();
        }
    }
}

/// The chunks of one stream that its tunnel has queued and not written yet.
#[derive(Default)]
pub(crate) struct PendingWrites {
    chunks: Cell<usize>,
    waker: Cell<Option<Waker>>,
}

impl PendingWrites {
    /// Counts the chunk as pending until it is dropped.
    pub(crate) fn track(self: &Rc<Self>, mut chunk: Chunk) -> Chunk {
        self.chunks.set(self.chunks.get() + 1);
        chunk.tracker = Some(Rc::clone(self));
        chunk
    }

    fn complete(&self) {
        self.chunks.set(self.chunks.get() - 1);
        if self.chunks.get() == 0
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }

    /// Ready when no chunk is pending: all are written, or their stream has failed.
    pub(crate) fn poll_empty(&self, cx: &Context<'_>) -> Poll<()> {
        if self.chunks.get() == 0 {
            return Poll::Ready(());
        }
        self.waker.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

fn lease_buffer() -> Vec<u8> {
    FREE_BUFFERS
        .try_with(|free| free.borrow_mut().pop())
        .ok()
        .flatten()
        .unwrap_or_else(|| Vec::with_capacity(READ_BUFFER_BYTES))
}

fn return_buffer(mut bytes: Vec<u8>) {
    if bytes.capacity() != READ_BUFFER_BYTES {
        return;
    }
    bytes.clear();
    // Fails only when the thread ends.
    let _thread_ends = FREE_BUFFERS.try_with(|free| {
        let mut free = free.borrow_mut();
        if free.len() < MAX_FREE_BUFFERS {
            free.push(bytes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::pin::pin;

    fn free_buffers() -> usize {
        FREE_BUFFERS.with(|free| free.borrow().len())
    }

    async fn read(from: &[u8], max: usize) -> Chunk {
        let mut from = pin!(from);
        poll_fn(|cx| Chunk::poll_read(from.as_mut(), cx, max))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn small_read_is_copied_and_its_buffer_returned() {
        let chunk = read(b"abc", READ_BUFFER_BYTES).await;
        assert_eq!(
            (chunk.as_slice(), chunk.bytes.capacity(), free_buffers()),
            (&b"abc"[..], 3, 1)
        );
    }

    #[tokio::test]
    async fn large_read_leases_its_buffer_until_dropped() {
        let bytes = vec![7; READ_BUFFER_BYTES * 2];
        let chunk = read(&bytes, READ_BUFFER_BYTES * 2).await;
        assert_eq!((chunk.remaining(), free_buffers()), (READ_BUFFER_BYTES, 0));
        drop(chunk);
        assert_eq!(free_buffers(), 1);
    }

    #[tokio::test]
    async fn read_respects_its_limit_and_is_empty_at_the_end() {
        assert_eq!(read(b"abcdef", 4).await.as_slice(), b"abcd");
        assert_eq!(read(b"", 4).await.remaining(), 0);
    }

    #[test]
    fn free_buffers_per_thread_are_bounded() {
        let chunks: Vec<_> = (0..MAX_FREE_BUFFERS * 2)
            .map(|_| Chunk::from(Vec::with_capacity(READ_BUFFER_BYTES)))
            .collect();
        drop(chunks);
        assert_eq!(free_buffers(), MAX_FREE_BUFFERS);
    }
}
