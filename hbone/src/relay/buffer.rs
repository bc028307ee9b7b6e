//! Buffers: they belong to the thread, and a connection has one only while bytes are in it.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BufMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// One read takes at most this much. Measured: with less than 256 KiB bulk transfer costs 0.5 to 2.5 CPU seconds more
/// per GiB.
pub(crate) const LARGE: usize = 256 * 1024;

/// A read of less is copied into an allocation of its own size, so that a few bytes which the peer does not take never
/// pin a large buffer; the copy costs less than the system call that it follows.
const SMALL: usize = 64 * 1024;

/// Large buffers that a thread keeps for the next read.
const KEPT: usize = 8;

thread_local! {
    static FREE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes on their way, in a buffer that goes back to its thread when they are gone.
#[derive(Default)]
pub(crate) struct Chunk {
    bytes: Vec<u8>,
    at: usize,
    flight: Option<Rc<Flight>>,
}

impl Chunk {
    /// The bytes that are left.
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Reads once, up to `max` bytes. Empty at the end of the stream. Without bytes to read nothing stays leased.
    pub(crate) fn poll_read(
        mut from: Pin<&mut impl AsyncRead>,
        cx: &mut Context<'_>,
        max: usize,
    ) -> Poll<io::Result<Self>> {
        let mut bytes = lease();
        let read = poll_read_buf(from.as_mut(), cx, &mut (&mut bytes).limit(max.min(LARGE)));
        let chunk = match &read {
            Poll::Ready(Ok(n)) if *n >= SMALL => return Poll::Ready(Ok(bytes.into())),
            Poll::Ready(Ok(_)) => bytes.as_slice().to_vec().into(),
            _ => Self::default(),
        };
        give_back(bytes);
        ready!(read)?;
        Poll::Ready(Ok(chunk))
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            at: 0,
            flight: None,
        }
    }
}

impl Buf for Chunk {
    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn chunk(&self) -> &[u8] {
        self.as_slice()
    }

    fn advance(&mut self, n: usize) {
        assert!(n <= self.remaining(), "advance past the end");
        self.at += n;
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        give_back(std::mem::take(&mut self.bytes));
        if let Some(flight) = self.flight.take() {
            flight.landed();
        }
    }
}

/// The chunks of one stream that its tunnel was given and has not written yet.
#[derive(Default)]
pub(crate) struct Flight {
    chunks: Cell<usize>,
    waiting: Cell<Option<Waker>>,
}

impl Flight {
    /// The chunk counts as in flight until it is dropped.
    pub(crate) fn board(self: &Rc<Self>, mut chunk: Chunk) -> Chunk {
        self.chunks.set(self.chunks.get() + 1);
        chunk.flight = Some(Rc::clone(self));
        chunk
    }

    fn landed(&self) {
        self.chunks.set(self.chunks.get() - 1);
        if self.chunks.get() == 0
            && let Some(waker) = self.waiting.take()
        {
            waker.wake();
        }
    }

    /// Ready when none is in flight: all are written, or their stream is dead.
    pub(crate) fn poll_empty(&self, cx: &Context<'_>) -> Poll<()> {
        if self.chunks.get() == 0 {
            return Poll::Ready(());
        }
        self.waiting.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

fn lease() -> Vec<u8> {
    FREE.try_with(|free| free.borrow_mut().pop())
        .ok()
        .flatten()
        .unwrap_or_else(|| Vec::with_capacity(LARGE))
}

fn give_back(mut bytes: Vec<u8>) {
    if bytes.capacity() != LARGE {
        return;
    }
    bytes.clear();
    // Nothing to give back to when the thread ends.
    let _thread_ends = FREE.try_with(|free| {
        let mut free = free.borrow_mut();
        if free.len() < KEPT {
            free.push(bytes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::pin::pin;

    fn kept() -> usize {
        FREE.with(|free| free.borrow().len())
    }

    async fn read(from: &[u8], max: usize) -> Chunk {
        let mut from = pin!(from);
        poll_fn(|cx| Chunk::poll_read(from.as_mut(), cx, max))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn a_small_read_owns_its_size_and_leases_nothing() {
        let chunk = read(b"abc", LARGE).await;
        assert_eq!(
            (chunk.as_slice(), chunk.bytes.capacity(), kept()),
            (&b"abc"[..], 3, 1)
        );
    }

    #[tokio::test]
    async fn a_large_read_keeps_its_buffer_until_it_is_dropped() {
        let bytes = vec![7; LARGE * 2];
        let chunk = read(&bytes, LARGE * 2).await;
        assert_eq!((chunk.remaining(), kept()), (LARGE, 0));
        drop(chunk);
        assert_eq!(kept(), 1);
    }

    #[tokio::test]
    async fn a_read_respects_its_limit_and_reports_the_end() {
        assert_eq!(read(b"abcdef", 4).await.as_slice(), b"abcd");
        assert_eq!(read(b"", 4).await.remaining(), 0);
    }

    #[test]
    fn a_thread_keeps_a_bounded_number_of_buffers() {
        let chunks: Vec<_> = (0..KEPT * 2)
            .map(|_| Chunk::from(Vec::with_capacity(LARGE)))
            .collect();
        drop(chunks);
        assert_eq!(kept(), KEPT);
    }
}
