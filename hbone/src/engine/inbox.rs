//! What has arrived on a stream and the application has not taken yet.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::RecvStream;

/// Smaller frames are copied together when they must wait. A frame shares its memory with others that arrived in the
/// same read, so one byte of it could hold much more.
const SMALL: usize = 4 * 1024;

/// Joined frames become a piece of this size.
const PIECE: usize = 64 * 1024;

/// The receive side of a stream: filled as fast as frames arrive, emptied as fast as the application reads.
///
/// The stream's window is given back only for bytes that were taken, and so it bounds what is held here.
pub(super) struct Inbox {
    stream: RecvStream,
    queue: Queue,
    /// Bytes at the head of the queue that did not come from the stream.
    foreign: usize,
    ended: bool,
}

impl Inbox {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            queue: Queue::default(),
            foreign: 0,
            ended: false,
        }
    }

    /// Takes in everything that has arrived. Ready when nothing will come any more: at END_STREAM, or with the error
    /// that broke the stream.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        while !self.ended {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(bytes)) => self.queue.push(bytes),
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => self.ended = true,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Puts bytes before all that will arrive. They are not counted by [`Inbox::took`].
    pub(super) fn put_first(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.foreign += bytes.len();
            self.queue.pieces.push_front(bytes.into());
        }
    }

    /// What is waiting. Advance it by what the application takes, then say so with [`Inbox::took`].
    pub(super) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.queue.has_remaining()
    }

    /// Gives the window for `n` bytes back to the peer. Returns how many of them were the stream's.
    pub(super) fn took(&mut self, n: usize) -> usize {
        let foreign = n.min(self.foreign);
        self.foreign -= foreign;
        let own = n - foreign;
        if own > 0 {
            // Fails only for more than was received; these bytes were. On a dead stream there is nobody to tell.
            let _dead = self.stream.flow_control().release_capacity(own);
        }
        own
    }
}

/// Bytes in order: whole pieces, then the small frames that are being joined.
#[derive(Default)]
pub(super) struct Queue {
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
}

impl Queue {
    fn push(&mut self, bytes: Bytes) {
        let waits = !self.pieces.is_empty() || !self.tail.is_empty();
        if waits && bytes.len() < SMALL {
            self.tail.extend_from_slice(&bytes);
            if self.tail.len() >= PIECE {
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
            // Give the memory back, not only the length.
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
        fn a_queue_gives_back_what_was_pushed(
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
    fn small_frames_that_wait_are_joined() {
        let mut queue = Queue::default();
        for _ in 0..100_000 {
            queue.push(Bytes::from_static(b"x"));
        }
        assert_eq!(queue.remaining(), 100_000);
        assert!(queue.pieces.len() < 4, "{} pieces", queue.pieces.len());
    }

    #[test]
    fn a_frame_that_need_not_wait_is_not_copied() {
        let mut queue = Queue::default();
        let frame = Bytes::from_static(b"abc");
        let at = frame.as_ptr();
        queue.push(frame);
        assert_eq!(queue.chunk().as_ptr(), at);
    }
}
