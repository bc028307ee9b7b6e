//! How bytes that arrived on a stream are held until the application reads them, and when their window is released.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::RecvStream;

/// Smaller frames that have to wait are merged by a copy. A frame shares its memory with others of the same read, so one
/// byte of it could keep a large allocation alive.
const MERGE_BELOW_BYTES: usize = 4 * 1024;

/// Size of a piece of merged frames.
const MERGED_PIECE_BYTES: usize = 64 * 1024;

/// The receive side of a stream: filled as fast as frames arrive, emptied as fast as the application reads.
///
/// The stream's window is released only for consumed bytes, so the window bounds the size of the buffer.
pub(super) struct RecvBuffer {
    stream: RecvStream,
    queue: Queue,
    /// Bytes at the head of the queue that did not arrive on the stream.
    prefix_len: usize,
    has_ended: bool,
}

impl RecvBuffer {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            queue: Queue::default(),
            prefix_len: 0,
            has_ended: false,
        }
    }

    /// Takes all frames that have arrived. Ready when no more will arrive: at END_STREAM, or with the error of the
    /// stream.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        while !self.has_ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => self.queue.push(bytes),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => self.has_ended = true,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Inserts bytes before all others. [`RecvBuffer::consume`] does not count them.
    pub(super) fn prepend(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.prefix_len += bytes.len();
            self.queue.pieces.push_front(bytes.into());
        }
    }

    /// The unread bytes. The caller advances the queue by what the application takes, and then calls
    /// [`RecvBuffer::consume`].
    pub(super) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.queue.has_remaining()
    }

    /// Releases the window of `n` bytes. Returns how many of them arrived on the stream.
    pub(super) fn consume(&mut self, n: usize) -> usize {
        let from_prefix = n.min(self.prefix_len);
        self.prefix_len -= from_prefix;
        let from_stream = n - from_prefix;
        if from_stream > 0 {
            // Fails only for more bytes than were received, or on a closed stream.
            let _closed = self.stream.flow_control().release_capacity(from_stream);
        }
        from_stream
    }
}

/// Bytes in order: complete pieces, then the small frames that are being merged.
#[derive(Default)]
pub(super) struct Queue {
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        let must_wait = !self.pieces.is_empty() || !self.tail.is_empty();
        if must_wait && bytes.len() < MERGE_BELOW_BYTES {
            self.tail.extend_from_slice(&bytes);
            if self.tail.len() >= MERGED_PIECE_BYTES {
                self.close_tail();
            }
        } else if !bytes.is_empty() {
            self.close_tail();
            self.pieces.push_back(bytes);
        }
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.pieces
                .push_back(std::mem::take(&mut self.tail).freeze());
        }
    }
}

impl Buf for Queue {
    fn remaining(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum::<usize>() + self.tail.len()
    }

    fn has_remaining(&self) -> bool {
        !self.pieces.is_empty() || !self.tail.is_empty()
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&self.tail, |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let tail = (!self.tail.is_empty()).then_some(&self.tail[..]);
        let pieces = self.pieces.iter().map(|piece| &piece[..]).chain(tail);
        slices
            .iter_mut()
            .zip(pieces)
            .map(|(slice, piece)| *slice = IoSlice::new(piece))
            .count()
    }

    fn advance(&mut self, mut n: usize) {
        while let Some(piece) = self.pieces.front_mut() {
            if n < piece.len() {
                piece.advance(n);
                return;
            }
            n -= piece.len();
            self.pieces.pop_front();
        }
        self.tail.advance(n);
        if self.tail.is_empty() {
            // Frees the memory too, not only the length.
            self.tail = BytesMut::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn queue_returns_the_pushed_bytes_in_order(
            frames in proptest::collection::vec(prop_oneof![1usize..9, 4000usize..4200, Just(0), Just(70_000)], 0..40),
            takes in proptest::collection::vec(1usize..9000, 0..40),
        ) {
            let mut queue = Queue::default();
            let mut expected = Vec::new();
            for (i, len) in frames.iter().enumerate() {
                let frame = vec![u8::try_from(i).unwrap(); *len];
                expected.extend_from_slice(&frame);
                queue.push(frame.into());
            }
            prop_assert_eq!(queue.remaining(), expected.len());
            let mut got = Vec::new();
            for take in takes.into_iter().chain([usize::MAX]) {
                let mut slices = [IoSlice::new(&[]); 64];
                let used = queue.chunks_vectored(&mut slices);
                let visible: Vec<u8> = slices[..used].iter().flat_map(|s| s.iter().copied()).collect();
                let take = take.min(visible.len());
                got.extend_from_slice(&visible[..take]);
                queue.advance(take);
            }
            prop_assert_eq!(got, expected);
            prop_assert!(!queue.has_remaining());
        }
    }

    #[test]
    fn waiting_small_frames_are_merged() {
        let mut queue = Queue::default();
        for _ in 0..100_000 {
            queue.push(Bytes::from_static(b"x"));
        }
        assert_eq!(queue.remaining(), 100_000);
        assert!(queue.pieces.len() < 4, "{} pieces", queue.pieces.len());
    }

    #[test]
    fn frame_in_an_empty_queue_is_not_copied() {
        let mut queue = Queue::default();
        let frame = Bytes::from_static(b"abc");
        let at = frame.as_ptr();
        queue.push(frame);
        assert_eq!(queue.chunk().as_ptr(), at);
    }
}
